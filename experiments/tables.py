"""Results as text: a console table, Markdown tables, and the report that sets our numbers beside the published ones."""

import json
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import rich.box
import rich.table
import rich.text

from experiments.files import write_atomically
from experiments.published import REPORTS, table

SCHEMA = 1  # of result.json

_KEYS = {
    "result": "schema study preset seed command config metrics table comparisons figures provenance",
    "table": "title columns rows",
    "provenance": "started seconds device versions git_commit git_dirty",
    "comparison": "quantity setting ours report table published published_setting higher_is_better note",
}
_MISSING = "\N{EM DASH}"
_NUMBER = re.compile(r"[+-]?\d[\d.]*(e[+-]?\d+)?( ± .*)?")  # a number written as text, also as mean ± deviation

Row = Sequence[Any]


def counted(number: float, noun: str) -> str:
    """A number of things in words: "1 epoch", "0.5 epochs", "2 epochs"."""
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def console_table(columns: Sequence[str], rows: Sequence[Row], title: str | None = None) -> rich.table.Table:
    """An aligned table to print with a rich console: numbers to the right, a dash for `None`.

    Raises:
      ValueError: a row is not as long as `columns`.

    Example:
      >>> import rich
      >>> rich.print(console_table(["quantity", "value"], [["PSNR, dB", 23.1], ["steps", 4000]]))
       quantity   value
      ──────────────────
       PSNR, dB    23.1
       steps       4000
    """
    texts, numbers = _layout(columns, rows)
    made = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, show_edge=False)
    for i, (column, numeric) in enumerate(zip(columns, numbers, strict=True)):
        made.add_column(rich.text.Text(column), justify="right" if numeric else "left", no_wrap=i == 0)
    for row in texts:
        made.add_row(*map(rich.text.Text, row))  # Text, so that brackets in a cell are not taken for markup
    return made


def markdown_table(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """A GitHub Markdown table: numbers to the right, a dash for `None`, pipes escaped.

    Raises:
      ValueError: a row is not as long as `columns`.

    Example:
      >>> print(markdown_table(["quantity", "value"], [["PSNR, dB", 23.1], ["FLOPs", None]]))
      | quantity | value |
      | --- | ---: |
      | PSNR, dB | 23.1 |
      | FLOPs | — |
    """
    texts, numbers = _layout(columns, rows)
    lines = [list(columns), ["---:" if numeric else "---" for numeric in numbers], *texts]
    return "\n".join("| " + " | ".join(_escape(text) for text in line) + " |" for line in lines)


def check_result(result: dict, where: str) -> None:
    """Check the content of one `result.json`, named `where` in errors.

    Raises:
      ValueError: unknown schema, missing keys, a number that is none, a citation of no published table, or a figure
        whose path is not relative to the report.
    """
    if result.get("schema") != SCHEMA:
        raise ValueError(f"{where}: schema is {result.get('schema')!r}, expected {SCHEMA}")
    parts = [("result", result), ("table", result.get("table")), ("provenance", result.get("provenance"))]
    parts += [("comparison", comparison) for comparison in result.get("comparisons", [])]
    for kind, part in parts:
        missing = [key for key in _KEYS[kind].split() if key not in (part or {})]
        if missing:
            raise ValueError(f"{where}: {kind} lacks {', '.join(missing)}")
    for row in result["table"]["rows"]:
        if len(row) != len(result["table"]["columns"]):
            raise ValueError(f"{where}: table row {row} has not as many cells as columns {result['table']['columns']}")
    for comparison in result["comparisons"]:
        if not _is_number(comparison["ours"]):
            raise ValueError(f"{where}: ours is {comparison['ours']!r}, expected a number: {comparison['quantity']}")
        if comparison["published"] is not None:
            if not _is_number(comparison["published"]):
                raise ValueError(f"{where}: published is {comparison['published']!r}, expected a number or null")
            try:
                table(comparison["report"], comparison["table"])
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
    for figure in map(PurePosixPath, result["figures"]):
        if figure.is_absolute() or ".." in figure.parts:
            raise ValueError(f"{where}: figure {figure} must be a path relative to the report, without '..'")


def write_report(results: Sequence[dict], path: Path) -> None:
    """Write one Markdown file with all results beside the published numbers; the same results give the same bytes.

    Runs that differ by nothing but the seed become mean ± sample standard deviation (n runs). The file appears whole
    or not at all.

    Args:
      results: contents of `result.json` files.
      path: file to write; figures are linked relative to its directory.

    Raises:
      ValueError: no results, a result that does not follow the schema, or two results of one study, preset, config
        and seed.
    """
    if not results:
        raise ValueError("results is empty: run a study first (python -m experiments list)")
    for result in results:
        check_result(result, f"{result.get('study')}/{result.get('preset')}-{result.get('seed')}")
    results = sorted(results, key=lambda result: (result["study"], result["preset"], result["seed"], _config(result)))
    cited = {c["report"] for result in results for c in result["comparisons"] if c["published"] is not None}
    blocks = [
        "# Results",
        "Written by `python -m experiments report` from the `result.json` of each run; edits made here are lost. "
        "Several seeds are given as mean ± sample standard deviation (n runs); difference is ours minus published.",
    ]
    if cited:
        blocks.append("\n".join(f"- **{report}**: {title}" for report, title in REPORTS.items() if report in cited))
    for study in dict.fromkeys(result["study"] for result in results):
        groups = _groups([result for result in results if result["study"] == study])
        blocks += [f"## {study}", *_comparisons(groups), *_own_tables(groups), *_runs(groups)]
    write_atomically(Path(path), "\n\n".join(blocks) + "\n")


def _config(result: dict) -> str:
    """What was asked for except the seed, as comparable text."""
    return json.dumps({key: value for key, value in result["config"].items() if key != "seed"}, sort_keys=True)


def _groups(results: list[dict]) -> dict[str, list[dict]]:
    """Label -> runs that differ by their seed only. Configs of one preset are told apart by their differing fields."""
    groups: dict[str, list[dict]] = {}
    for result in results:
        config, missing = result["config"], object()
        siblings = [other["config"] for other in results if other["preset"] == result["preset"]]
        differing = [
            f"{key}={config.get(key)}"
            for key in sorted({key for sibling in siblings for key in sibling} - {"seed"})
            if any(sibling.get(key, missing) != config.get(key, missing) for sibling in siblings)
        ]
        label = result["preset"] + (f" ({', '.join(differing)})" if differing else "")
        group = groups.setdefault(label, [])
        if result["seed"] in [other["seed"] for other in group]:
            raise ValueError(f"two results for {result['study']} {label} seed {result['seed']}: keep one")
        group.append(result)
    return groups


def _comparisons(groups: dict[str, list[dict]]) -> Iterator[str]:
    """A table for every compared quantity, and the notes of its rows."""
    collected: dict[str, dict[tuple, list[dict]]] = {}
    for label, runs in groups.items():
        for comparison in (comparison for run in runs for comparison in run["comparisons"]):
            cited = tuple(comparison[k] for k in ("report", "table", "published", "published_setting"))
            key = (label, comparison["setting"], *cited, comparison["higher_is_better"])
            collected.setdefault(comparison["quantity"], {}).setdefault(key, []).append(comparison)
    for quantity, entries in collected.items():
        rows: list[list[Any]] = []
        notes: dict[tuple[str, str, str], list[str]] = {}  # label, table, note -> the rows that it is for
        for (label, setting, report, number, published, published_setting, higher_is_better), found in entries.items():
            ours = [comparison["ours"] for comparison in found]
            where = difference = verdict = None
            if published is not None:
                where = table(report, number).name + (f": {published_setting}" if published_setting else "")
                gap = statistics.fmean(ours) - published
                difference = f"{gap:+.4g}"
                # Written so that a NaN falls short too.
                verdict = "reached" if (gap >= 0 if higher_is_better else gap <= 0) else "**falls short**"
            rows.append([label, setting, published, where, _summary(ours), difference, verdict])
            about = f"{label}, {setting}" + (f" ({where})" if where else "")
            name = table(report, number).name if published is not None else ""
            for note in dict.fromkeys(c["note"] for c in found if c["note"]):
                notes.setdefault((label, name, note), []).append(about)
        yield f"### {quantity}"
        yield markdown_table(["preset", "setting", "published", "where", "ours", "difference", "verdict"], rows)
        if notes:
            yield "\n".join(
                f"- {of[0] if len(of) == 1 else label + (f' ({name})' if name else '')}: {note}"
                for (label, name, note), of in notes.items()
            )


def _own_tables(groups: dict[str, list[dict]]) -> Iterator[str]:
    """The table that each study made of its run, cells summarised over the seeds where the tables agree in form."""
    for label, runs in groups.items():
        tables = [run["table"] for run in runs]
        if len({(t["title"], *t["columns"], len(t["rows"])) for t in tables}) == 1:
            same_rows = zip(*(t["rows"] for t in tables), strict=True)
            rows = [[_merge(cells) for cells in zip(*same, strict=True)] for same in same_rows]
            yield f"### {label}: {tables[0]['title']}"
            yield markdown_table(tables[0]["columns"], rows)
        else:
            for run in runs:
                yield f"### {label}, seed {run['seed']}: {run['table']['title']}"
                yield markdown_table(run["table"]["columns"], run["table"]["rows"])


def _runs(groups: dict[str, list[dict]]) -> Iterator[str]:
    """Where each number comes from, and the figures."""
    runs = [(label, run) for label, group in groups.items() for run in group]
    lines = []
    for label, run in runs:
        origin = run["provenance"]
        versions = ", ".join(f"{name} {version}" for name, version in sorted(origin["versions"].items()))
        commit = f"commit {origin['git_commit']}" if origin["git_commit"] else "no git commit"
        dirty = " with uncommitted changes" if origin["git_dirty"] else ""
        seconds = f"{origin['seconds']:.1f} s"
        if origin.get("sessions", 1) > 1:
            begin = origin["first_session"]
            seconds += f" in the last of {origin['sessions']} sessions, the first of {begin['started']}, "
            seconds += f"commit {begin['git_commit']}"
        facts = [f"{label}, seed {run['seed']}", origin["device"], seconds, versions, commit + dirty, origin["started"]]
        lines.append(f"- `{run['command']}`: {'; '.join(facts)}")
    yield "### Runs"
    yield "\n".join(lines)
    figures = list(dict.fromkeys(figure for _, run in runs for figure in run["figures"]))
    if figures:
        yield "### Figures"
        yield "\n".join(f"- [{figure}]({quote(figure)})" for figure in figures)


def _merge(cells: Sequence[Any]) -> Any:
    """One cell for several seeds: the common value, the summary of numbers, or all that was said."""
    if all(cell == cells[0] for cell in cells):
        return cells[0]
    if all(map(_is_number, cells)):
        return _summary(cells)
    return " / ".join(dict.fromkeys(map(_text, cells)))


def _summary(values: Sequence[float]) -> float | str:
    """The value of one run; mean ± sample standard deviation of several."""
    if len(values) == 1:
        return values[0]
    return f"{_text(statistics.fmean(values))} ± {statistics.stdev(values):.2g} (n = {len(values)})"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    """A cell as text: floats with four significant digits, or as whole numbers from a thousand on."""
    if value is None:
        return _MISSING
    if isinstance(value, float):
        return f"{value:.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"
    return str(value)


def _layout(columns: Sequence[str], rows: Sequence[Row]) -> tuple[list[list[str]], list[bool]]:
    """The cells as text, and which columns hold numbers only (and at least one)."""
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"row {list(row)} has {len(row)} cells, expected {len(columns)}: {', '.join(columns)}")
    filled = [[row[i] for row in rows if row[i] is not None] for i in range(len(columns))]
    numeric = [bool(cells) and all(_is_number(c) or _NUMBER.fullmatch(str(c)) for c in cells) for cells in filled]
    return [[_text(cell) for cell in row] for row in rows], numeric


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")
