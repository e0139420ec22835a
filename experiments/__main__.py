"""Command line: list, run, report, data."""

import argparse
import itertools
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import rich.console
import rich.markup

from experiments import config, tables

_PACKAGES = ("experiments", "functa_jax", "optim_jax", "prune_jax", "__main__")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["run"]:  # its fields belong to the preset, and are parsed by tyro
        return _guarded(lambda: _run(arguments))
    parsed = _parser().parse_args(arguments)
    return _guarded(lambda: parsed.action(parsed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="studies and presets, with expected time and result")
    listing.set_defaults(action=lambda _: _list())
    commands.add_parser("run", help="run STUDY PRESET [--field value ...]; the same command again resumes")
    report = commands.add_parser("report", help="write results/README.md from all finished runs")
    report.add_argument("--runs-dir", type=Path, default=Path("runs"), help="folder of the runs (default: runs)")
    report.add_argument("--results-dir", type=Path, default=Path("results"), help="where to (default: results)")
    report.set_defaults(action=lambda parsed: _report(parsed.runs_dir, parsed.results_dir))
    sets = commands.add_parser("data", help="data sets: list, prepare")
    actions = sets.add_subparsers(required=True, metavar="ACTION")
    data_list = actions.add_parser("list", help="what is known and what is on this machine")
    data_prepare = actions.add_parser("prepare", help="download (or take) the originals and write the TFDS directory")
    data_prepare.add_argument("name", metavar="NAME", help="mnist, fashion_mnist, cifar10 or cifar100")
    data_prepare.add_argument(
        "--from-archives", type=Path, metavar="DIR", help="take the original files from here instead of the network"
    )
    for action in (data_list, data_prepare):
        action.add_argument("--data-dir", type=Path, help="TFDS data directory (default: TFDS_DATA_DIR, else TFDS's)")
    data_list.set_defaults(action=lambda parsed: _data_list(parsed.data_dir))
    data_prepare.set_defaults(action=lambda parsed: _data_prepare(parsed.name, parsed.data_dir, parsed.from_archives))
    return parser


def _list() -> int:
    console = rich.console.Console()
    for name in config.STUDIES:
        _print_presets(console, name)
    console.print(
        "\nRun one: python -m experiments run STUDY PRESET [--field value ...]", markup=False, highlight=False
    )
    return 0


def _run(arguments: list[str]) -> int:
    names = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments[1:3]))
    if len(names) < 2:
        return _help_run(names, asked=not {"-h", "--help"}.isdisjoint(arguments))
    study_name, preset_name = names
    preset = config.preset(study_name, preset_name)
    asked, options = config.parse(
        preset.config,
        arguments[3:],
        prog=f"python -m experiments run {study_name} {preset_name}",
        description=f"{preset.summary}. Takes {preset.time}. Expect {preset.expect}.",
    )
    from experiments import execute

    execute.execute(study_name, preset_name, asked, options, arguments)
    return 0


def _help_run(names: list[str], asked: bool) -> int:
    """What may follow `run` or `run STUDY`; an error unless asked for."""
    console = rich.console.Console(stderr=not asked)
    console.print("usage: python -m experiments run STUDY PRESET [--field value ...]", markup=False, highlight=False)
    for name in names or config.STUDIES:
        _print_presets(console, name)
    console.print("\nAll fields of a preset: python -m experiments run STUDY PRESET --help", highlight=False)
    return 0 if asked else 2


def _print_presets(console: rich.console.Console, study_name: str) -> None:
    study = config.study(study_name)
    rows = [[preset, entry.summary, entry.time, entry.expect] for preset, entry in study.PRESETS.items()]
    console.print(f"\n[bold]{study_name}[/]  {study.SUMMARY}", highlight=False)
    console.print(tables.console_table(["preset", "what", "time", "expect"], rows))


def _report(runs_dir: Path, results_dir: Path) -> int:
    from experiments import execute

    path = execute.report(runs_dir, results_dir)
    print(f"wrote {path}")
    return 0


def _data_list(data_dir: Path | None) -> int:
    from experiments import data, prepare

    rows = [
        [s.name, "yes" if s.prepared else "no", s.examples, s.description, s.licence] for s in prepare.status(data_dir)
    ]
    console = rich.console.Console()
    console.print(tables.console_table(["name", "prepared", "examples", "what", "licence"], rows))
    console.print(f"\nTFDS directory: {data.resolve_data_dir(data_dir)}")
    console.print(f"Photographs inside scikit-image: {', '.join(data.PHOTOGRAPHS)}")
    return 0


def _data_prepare(name: str, data_dir: Path | None, archives: Path | None) -> int:
    from experiments import prepare

    print(f"prepared: {prepare.prepare(name, data_dir=data_dir, from_archives=archives)}")
    return 0


def _guarded(action: Callable[[], int]) -> int:
    """Failures that explain themselves become one message; set COMPACT_JAX_TRACEBACK=1 to see where one comes from."""
    console = rich.console.Console(stderr=True)
    try:
        return action()
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from what is saved")
        return 130
    except Exception as error:
        if os.environ.get("COMPACT_JAX_TRACEBACK") or not _explains_itself(error):
            raise
        text = rich.markup.escape(str(error))
        console.print(f"[bold red]error:[/] {text}", highlight=False, soft_wrap=True)
        return 1


def _explains_itself(error: Exception) -> bool:
    """Whether the message was written for the user, so that a traceback would only bury it; all others are bugs."""
    if isinstance(error, OSError):
        return True
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    raised_here = innermost.f_globals.get("__name__", "").partition(".")[0] in _PACKAGES  # not in a library below
    return raised_here and isinstance(error, ValueError | RuntimeError | FloatingPointError)


if __name__ == "__main__":
    sys.exit(main())
