"""What is asked of a run: the study's config, which decides the result, and options, which do not."""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, TypeVar

import tyro

from experiments.data import check_choice

STUDIES = {
    "bn-probes": "experiments.studies.bn_probes",
    "classify": "experiments.studies.classify",
    "dimap": "experiments.studies.dimap",
    "functa": "experiments.studies.functa",
    "functaset": "experiments.studies.functaset",
    "latent-tasks": "experiments.studies.latent_tasks",
    "siren": "experiments.studies.siren",
    "dessilbi-mnist": "experiments.studies.dessilbi_mnist",
    "dessilbi-cifar10": "experiments.studies.dessilbi_cifar10",
    "prune-at-init": "experiments.studies.prune_at_init",
    "structural-pruning": "experiments.studies.structural_pruning",
    "vit": "experiments.studies.vit",
    "l1-regularization": "experiments.studies.l1_regularization",
    "l1-pruning": "experiments.studies.l1_pruning",
    "token-pruning": "experiments.studies.token_pruning",
}

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class Preset:
    """A named config of a study, with what to expect of it.

    Attributes:
      config: frozen dataclass with at least a field `seed`.
      summary: one line.
      time: how long it takes, and on what.
      expect: the result to expect.
    """

    config: Any
    summary: str
    time: str
    expect: str


@dataclass(frozen=True)
class Options:
    """Where and how to run; nothing here changes the result.

    Attributes:
      runs_dir: folder of all runs.
      run_name: name of the run's folder, instead of PRESET-SEED.
      tensorboard: also write TensorBoard event files.
      data_dir: TFDS data directory, instead of TFDS_DATA_DIR; for the data set "folder", the folder of pictures.
      distributed: "auto" joins the processes of a Slurm or TPU job, as the environment describes it.
      coordinator_address: HOST:PORT of process 0, to join processes by hand.
      num_processes: number of processes, with coordinator_address.
      process_id: index of this process, with coordinator_address.
    """

    runs_dir: Path = Path("runs")
    run_name: str | None = None
    tensorboard: bool = False
    data_dir: Path | None = None
    distributed: Literal["off", "auto"] = "off"
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def study(name: str) -> ModuleType:
    """Returns the module of a study: SUMMARY, PRESETS, run(config, run) and draw(directory).

    Raises:
      ValueError: no such study; names the nearest.
    """
    check_choice("study", name, STUDIES)
    return importlib.import_module(STUDIES[name])


def preset(study_name: str, preset_name: str) -> Preset:
    """Returns a preset of a study.

    Raises:
      ValueError: no such study or preset; names the nearest.
    """
    presets: dict[str, Preset] = study(study_name).PRESETS
    check_choice(f"preset of {study_name}", preset_name, presets)
    return presets[preset_name]


def parse(base: ConfigT, arguments: Sequence[str], *, prog: str, description: str) -> tuple[ConfigT, Options]:
    """Overrides fields of a config, and of the options, from command line arguments.

    Args:
      base: the preset's config.
      arguments: such as ["--steps", "100", "--seed", "1"].
      prog: the command in front of them, for the help text.
      description: of the preset, for the help text.

    Raises:
      SystemExit: wrong arguments (2; the message names the nearest right field), or --help (0).
    """
    flat = tyro.conf.arg(name="")
    fields: list[Any] = [
        ("config", Annotated[type(base), flat], dataclasses.field(default=base)),
        ("options", Annotated[Options, flat], dataclasses.field(default=Options())),
    ]
    request: Callable[..., Any] = dataclasses.make_dataclass("Request", fields, frozen=True)
    parsed = tyro.cli(request, args=list(arguments), prog=prog, description=description)
    return parsed.config, parsed.options


def differences(asked: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """One line for each field in which two configs, as plain dicts, differ."""
    missing = "(not there)"
    return [
        f"{name}: the run has {found.get(name, missing)!r}, asked for {asked.get(name, missing)!r}"
        for name in sorted(asked.keys() | found.keys())
        if asked.get(name, missing) != found.get(name, missing)
    ]
