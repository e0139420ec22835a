"""From a parsed command to a finished run, and from finished runs to the report."""

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import rich.console

from experiments import config, runs, tables
from experiments.config import Options
from experiments.files import cache_folder, write_atomically


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
    started = datetime.now(UTC)
    runs.git_commit()
    jax.config.update("jax_traceback_filtering", "off")  # an error shows where it really comes from
    for library in ("absl", "asyncio"):  # Orbax's pages about a damaged file or a full disk, which is said in a line
        logging.getLogger(library).setLevel(logging.CRITICAL)
    use_compilation_cache()
    join_processes(options)
    study = config.study(study_name)
    first = jax.process_index() == 0
    console = rich.console.Console(quiet=not first)
    directory = runs.directory_of(study_name, preset_name, asked.seed, options)
    run = runs.Run(study_name, preset_name, directory, options, console, tuple(arguments))
    with runs.claimed(directory):
        runs.check_config(directory, asked)
        result, drawn = runs.read_result(directory), False
        if result is None:
            runs.note_session(directory, started)
            content = study.run(asked, run)
            result = runs.write_result(run, asked, started, content)
        else:
            console.print(f"already done on {result['provenance']['started']}; delete {directory} to do it again")
            drawn = all((directory / figure).exists() for figure in result["figures"])
        if first:
            if not drawn:
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

    Results that are there from earlier reports, also of other machines, stay: only a newer result of the same folder
    name replaces one. So the report can be made again without the runs.

    Returns:
      The path of the README.

    Raises:
      ValueError: no results.
      RunError: a damaged result, or one whose figures are missing.
    """
    for source, result in _results(runs_dir):
        target = results_dir / source.parent.name / source.name
        there = runs.read_result(target)
        if there is not None and _started(there) >= _started(result):
            continue
        missing = [figure for figure in result["figures"] if not (source / figure).exists()]
        if missing:
            raise runs.RunError(f"{source} lacks {', '.join(missing)}; to draw them again: {result['command']}")
        for figure in result["figures"]:
            write_atomically(target / figure, (source / figure).read_bytes())
        write_atomically(target / "result.json", (source / "result.json").read_bytes())
    collected = []
    for folder, result in _results(results_dir):
        figures = [(folder / figure).relative_to(results_dir).as_posix() for figure in result["figures"]]
        collected.append({**result, "figures": figures})
    path = results_dir / "README.md"
    tables.write_report(collected, path)
    return path


def _results(directory: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every `STUDY/RUN` folder with a result, in a fixed order."""
    found = [(path.parent, runs.read_result(path.parent)) for path in sorted(directory.glob("*/*/result.json"))]
    return [(folder, result) for folder, result in found if result is not None]


def _started(result: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(result["provenance"]["started"])


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache directory, unless JAX_COMPILATION_CACHE_DIR says where."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("compiled")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # small programs are many


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
