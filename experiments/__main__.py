"""Command line: list, run, report, data."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import rich.console
import rich.markup

from experiments import config, tables


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    if arguments[:1] == ["run"]:  # its fields belong to the preset, and are parsed by tyro
        positional = [argument for argument in arguments[1:3] if not argument.startswith("-")]
        asked_help = [a for a in arguments[1:] if a in ("-h", "--help")]
        if len(positional) < 2:
            return _help_run(positional) if asked_help or not positional else _missing_preset(positional[0])
        return _guarded(lambda: _run(positional[0], positional[1], arguments))
    parsed = parser.parse_args(arguments)
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
        study = config.study(name)
        rows = [[preset, entry.summary, entry.time, entry.expect] for preset, entry in study.PRESETS.items()]
        console.print(f"\n[bold]{name}[/]  {study.SUMMARY}")
        console.print(tables.console_table(["preset", "what", "time", "expect"], rows))
    console.print("\nRun one: python -m experiments run STUDY PRESET [--field value ...]")
    return 0


def _help_run(positional: list[str]) -> int:
    print("usage: python -m experiments run STUDY PRESET [--field value ...]\n")
    print("All fields of a preset: python -m experiments run STUDY PRESET --help")
    for name in config.STUDIES if not positional else positional:
        study = config.study(name)
        print(f"\n{name}: {study.SUMMARY}")
        for preset, entry in study.PRESETS.items():
            print(f"  {preset:<16} {entry.summary} ({entry.time})")
    return 0


def _missing_preset(name: str) -> int:
    return _guarded(lambda: _refuse(f"run {name} needs a preset: one of {', '.join(config.study(name).PRESETS)}"))


def _refuse(message: str) -> int:
    raise ValueError(message)


def _run(study_name: str, preset_name: str, arguments: list[str]) -> int:
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
    """Expected failures become one clear message; set COMPACT_JAX_TRACEBACK=1 to see where one comes from."""
    try:
        return action()
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        if os.environ.get("COMPACT_JAX_TRACEBACK"):
            raise
        console = rich.console.Console(stderr=True)
        console.print(f"[bold red]error:[/] {rich.markup.escape(str(error))}", highlight=False, soft_wrap=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
