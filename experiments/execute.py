"""From a parsed command to a finished run, and from finished runs to the report."""

import os
import shutil
from pathlib import Path
from typing import Any

import jax
import rich.console

from experiments import config, runs, tables
from experiments.config import Options


def execute(study_name: str, preset_name: str, asked: Any, options: Options, arguments: list[str]) -> dict[str, Any]:
    """Runs a study, or resumes it, or says that it is done; writes result and figures.

    Args:
      study_name: name of the study.
      preset_name: name of the preset.
      asked: the config.
      options: where and how to run.
      arguments: of the command line, for the record.

    Returns:
      The result, as in `result.json`.

    Raises:
      RunError: the run folder is in use, or belongs to another config.
      and what the study raises.
    """
    started = runs.now()
    use_compilation_cache()
    join_processes(options)
    study = config.study(study_name)
    first = jax.process_index() == 0
    console = rich.console.Console(quiet=not first)
    directory = runs.directory_of(study_name, preset_name, asked.seed, options)
    run = runs.Run(study_name, preset_name, directory, options, console, runs.command_line(arguments))
    with runs.claimed(directory):
        runs.check_config(directory, asked)
        result = runs.read_result(directory)
        if result is None:
            content = study.run(asked, run)
            result = runs.write_result(run, asked, started, content)
        else:
            console.print(f"already done on {result['provenance']['started']}; delete {directory} to do it again")
        if first:
            if not all((directory / figure).exists() for figure in result["figures"]):
                study.draw(directory, result)
            summarise(console, directory, result)
    return result


def summarise(console: rich.console.Console, directory: Path, result: dict[str, Any]) -> None:
    """Prints the table of a result, the published numbers beside it, and where the figures are."""
    table = result["table"]
    console.print()
    console.print(tables.console_table(table["columns"], table["rows"], title=f"{result['study']} {table['title']}"))
    if result["comparisons"]:
        rows = [
            [c["quantity"], c["setting"], c["ours"], c["published"], f"{c['report']} table {c['table']}"]
            for c in result["comparisons"]
        ]
        console.print()
        console.print(tables.console_table(["quantity", "setting", "ours", "published", "where"], rows))
    console.print()
    for figure in result["figures"]:
        console.print(f"figure: {directory / figure}", highlight=False, soft_wrap=True)
    console.print(f"result: {directory / 'result.json'}", highlight=False, soft_wrap=True)


def report(runs_dir: Path, results_dir: Path) -> Path:
    """Copies results and figures of all finished runs into `results_dir` and writes its README.md.

    Results that are there from earlier reports stay, so that the report can be made again without their runs.

    Returns:
      The path of the README.

    Raises:
      ValueError: no results, or a damaged one.
    """
    for result in tables.load_results(runs_dir):
        source = runs_dir / result["study"] / f"{result['preset']}-{result['seed']}"
        if not source.exists():
            continue
        target = results_dir / result["study"] / source.name
        target.mkdir(parents=True, exist_ok=True)
        for name in ["result.json", *result["figures"]]:
            shutil.copyfile(source / name, target / name)
    collected = tables.load_results(results_dir)
    for result in collected:
        folder = f"{result['study']}/{result['preset']}-{result['seed']}"
        result["figures"] = [f"{folder}/{figure}" for figure in result["figures"]]
    path = results_dir / "README.md"
    tables.write_report(collected, path)
    return path


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache directory, unless JAX_COMPILATION_CACHE_DIR says where."""
    if jax.config.jax_compilation_cache_dir is None:
        base = os.environ.get("COMPACT_JAX_CACHE")
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        cache = (Path(base).expanduser() if base else home / "compact-jax") / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(cache))


def join_processes(options: Options) -> None:
    """Joins this process to the others of its job, where the options ask for it.

    Raises:
      ValueError: some but not all of coordinator_address, num_processes and process_id.
    """
    by_hand = (options.coordinator_address, options.num_processes, options.process_id)
    if any(value is not None for value in by_hand):
        if any(value is None for value in by_hand):
            raise ValueError("--coordinator-address, --num-processes and --process-id go together; one is missing")
        jax.distributed.initialize(*by_hand)
    elif options.distributed == "auto":
        jax.distributed.initialize()
