"""Networks that a finished run has trained, for the runs that build on it."""

import hashlib
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import functa_jax as fj
from experiments import logs, runs
from experiments.checkpoints import Checkpoints, digests
from experiments.models.functa import Functa
from experiments.runs import RunError
from experiments.studies import functa as study


def load_trained(directory: Path, mesh: Mesh) -> tuple[Functa, fj.MetaParams, study.Config]:
    """The Functa of a finished run of the study `functa`, as that run measured it: the state after its last step.

    Args:
      directory: the run's folder, as `runs.finished_run` gives it.
      mesh: devices to fit on; the parameters are replicated over them.

    Returns:
      The Functa, its parameters and learned rates, and the config it was trained with.

    Raises:
      RunError: the run is not finished, or was made by another version of the program.
      CheckpointError: its last checkpoint is gone, or damaged.
    """
    result = runs.read_result(directory)
    if result is None:
        raise RunError(f"{directory} holds no finished run")
    config = runs.from_json(study.Config, result["config"], directory)
    # The run's own log knows the shape of its images, wherever they came from and even if they are gone.
    originals = logs.read_images(directory / "images.jsonl", "test_originals")
    functa = study.build(config, originals[config.steps].shape[1:], mesh)
    everywhere = NamedSharding(mesh, P())
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        jax.eval_shape(partial(study.initial_state, config, functa)),
    )
    checkpoints = Checkpoints(directory / "checkpoints")
    try:
        state = checkpoints.load(config.steps, like)
    finally:
        checkpoints.close()
    return functa, state.params, config


def model_checksum(params: fj.MetaParams) -> str:
    """Digest of the parameters and the learned rates of a Functa: latents belong to one of them and no other."""
    arrays = digests(params)
    return hashlib.blake2b(repr(sorted(arrays.items())).encode(), digest_size=16).hexdigest()
