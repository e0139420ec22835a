#!/usr/bin/env bash
# A study on a Cloud TPU VM, one host or many; run from the repository root on your own machine, where gcloud is set up.
#   experiments/launch/tpu_vm.sh create                       make the TPU VM
#   experiments/launch/tpu_vm.sh install                      copy the committed files to all workers and install
#   experiments/launch/tpu_vm.sh run functa mnist-c1          start on all workers, detached; again: resume
#   experiments/launch/tpu_vm.sh log                          follow the log of worker 0; Ctrl-C leaves the run alone
#   experiments/launch/tpu_vm.sh stop                         SIGTERM to all workers: the run saves and ends
#   experiments/launch/tpu_vm.sh fetch                        copy runs/ from worker 0 to here
#   experiments/launch/tpu_vm.sh delete                       give the TPU VM back (its disk is lost: fetch first)
# Settings are taken from the environment:
set -euo pipefail

name=${TPU_NAME:-compact-jax}
zone=${TPU_ZONE:-us-west4-a}
type=${TPU_TYPE:-v5litepod-8}               # v5litepod-16 and up have several hosts
image=${TPU_IMAGE:-v2-alpha-tpuv5-lite}     # must fit the type; Google lists both under "TPU software versions"
runs=${RUNS_DIR:-runs}                      # with several hosts: a directory that all of them mount (Filestore)
if [[ -n ${TFDS_DATA_DIR:-} ]]; then data="TFDS_DATA_DIR=$(printf %q "$TFDS_DATA_DIR") "; else data=""; fi

tpu() { gcloud compute tpus tpu-vm "$@" --zone="$zone"; }
on_all() { tpu ssh "$name" --worker=all --command="$1"; }

case ${1:-} in
  create)
    # TPU_SPOT=yes is cheaper and can be taken away at any time; keep the runs on a mounted directory then.
    if [[ ${TPU_SPOT:-no} == yes ]]; then spot=(--spot); else spot=(); fi
    tpu create "$name" --accelerator-type="$type" --version="$image" ${spot[@]+"${spot[@]}"}
    ;;
  install)
    # A git bundle brings the commit along, so that results name it; changes not committed stay behind.
    bundle=$(mktemp -d)/compact-jax.bundle
    git bundle create "$bundle" HEAD
    tpu scp "$bundle" "$name:compact-jax.bundle" --worker=all
    # The image's own Python may be older than 3.11, therefore uv, which brings one. A second install updates the files
    # and keeps runs/ and .venv/.
    on_all 'set -e
      git init -q compact-jax
      cd compact-jax
      git fetch -q ../compact-jax.bundle HEAD
      git checkout -q --detach FETCH_HEAD
      python3 -m pip install -q --user uv
      if [ ! -d .venv ]; then python3 -m uv venv -q --seed --python 3.12 .venv; fi
      .venv/bin/pip install -q -e ".[tpu]" -c constraints.txt
      .venv/bin/python -m experiments list > /dev/null'
    ;;
  run)
    shift
    if [[ $# -lt 2 ]]; then
      echo "usage: $0 run STUDY PRESET [--field value ...]" >&2
      exit 2
    fi
    # All workers must run the same command. nohup and the closed standard input let it outlive the ssh connection;
    # nohup becomes Python (exec), so that run.pid names the process that must get the signals.
    study="$(printf '%q ' "$@")--distributed auto --runs-dir $(printf %q "$runs")"
    on_all "cd compact-jax
      if kill -0 \$(cat run.pid 2> /dev/null) 2> /dev/null; then echo 'already running: stop it first' >&2; exit 1; fi
      ${data}nohup .venv/bin/python -m experiments run $study > run.log 2>&1 < /dev/null &
      echo \$! > run.pid"
    ;;
  log) tpu ssh "$name" --worker=0 --command='tail -n 50 -F compact-jax/run.log' ;;
  stop) on_all 'kill -TERM $(cat compact-jax/run.pid)' ;;
  fetch)
    # scp starts in the home directory; a relative RUNS_DIR is one below the repository.
    if [[ $runs == /* ]]; then from=$runs; else from=compact-jax/$runs; fi
    tpu scp "$name:$from" . --worker=0 --recurse
    ;;
  delete) tpu delete "$name" ;;
  *)
    sed -n '2,10p' "$0" >&2
    exit 2
    ;;
esac
