"""Which layers of a network are coupled: the dependency graph and the dependency matrix of report A's equations 2-9."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap, to_hex
from matplotlib.figure import Figure

from experiments.plots import save

_INK, _GRID = "#222222", "#dddddd"
_PAIRS = [to_hex(colour) for colour in colormaps["tab20"](range(20))]
_COLOURS = [*_PAIRS[::2], *_PAIRS[1::2]]  # strong ones first
_STRIPES = 12  # of a square, shared by the widths that meet in it
_MARKS = {"made by": ("^", 46), "along": ("|", 60), "read by": ("o", 34)}


def dependency_graph(table: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draws layers in program order as columns and the widths between them as rows.

    A triangle stands where a layer makes the units of a width (f^out), a circle where it reads them (f^in), a tick
    where a bias, scale or position runs along; the line that joins them says that they are cut together.

    Args:
      table: `Groups.table()`, also after a round trip through JSON.
      path: PNG to write.
      title: above.
    """
    layers = list(dict.fromkeys(row["path"] for row in table))
    ties = list(dict.fromkeys(row["tie"] for row in table))
    figure = Figure(figsize=(1.6 + 0.3 * len(layers), 2.3 + 0.32 * len(ties)), dpi=150, layout="constrained")
    axis = figure.subplots()
    for y, tie in enumerate(ties):
        colour = _COLOURS[y % len(_COLOURS)]
        rows = [row for row in table if row["tie"] == tie]
        columns = [layers.index(row["path"]) for row in rows]
        axis.plot([min(columns), max(columns)], [y, y], color=colour, linewidth=1.2, zorder=1)
        for role, (mark, size) in _MARKS.items():
            x = [c for c, row in zip(columns, rows, strict=True) if row["role"] == role]
            face = "white" if role == "read by" else colour
            edge: dict[str, Any] = {} if mark == "|" else {"edgecolors": colour}
            axis.scatter(x, [y] * len(x), marker=mark, s=size, c=face if mark != "|" else colour, zorder=2, **edge)
    for role, (mark, size) in _MARKS.items():
        paint: dict[str, Any] = {"facecolors": "white", "edgecolors": _INK} if role == "read by" else {"color": _INK}
        axis.scatter([], [], marker=mark, s=size, label=role, **paint)
    figure.legend(loc="outside upper right", ncols=3, fontsize=8, frameon=False, handletextpad=0.2)
    axis.set_xticks(range(len(layers)), [_short(name) for name in layers], rotation=90, fontsize=7, color=_INK)
    kinds = {row["tie"]: row["kind"] for row in table}
    axis.set_yticks(range(len(ties)), [f"{kinds[tie]} {tie}" for tie in ties], fontsize=8, color=_INK)
    axis.set_ylim(len(ties) - 0.4, -0.6)
    axis.set_xlim(-0.6, len(layers) - 0.4)
    axis.grid(axis="x", color=_GRID, linewidth=0.5)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=10, color=_INK, loc="left")
    save(figure, path)


def dependency_matrix(table: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draws D of equation 9: a square where two parameter axes are cut together, in the colours of their widths.

    Args:
      table: `Groups.table()`, also after a round trip through JSON.
      path: PNG to write.
      title: above.
    """
    names = list(dict.fromkeys((row["path"], row["axis"]) for row in table))
    ties = list(dict.fromkeys(row["tie"] for row in table))
    n = len(names)
    shared: dict[tuple[int, int], list[int]] = {}
    for number, tie in enumerate(ties):
        at = sorted({names.index((row["path"], row["axis"])) for row in table if row["tie"] == tie})
        for place in itertools.product(at, at):
            shared.setdefault(place, []).append(number % len(_COLOURS) + 1)
    colour = np.zeros((n, n, _STRIPES), int)
    for place, numbers in shared.items():
        colour[place] = np.asarray(numbers)[np.arange(_STRIPES) * len(numbers) // _STRIPES]
    side = 1.9 + 0.17 * n
    figure = Figure(figsize=(side, side), dpi=150, layout="constrained")
    axis = figure.subplots()
    axis.imshow(
        colour.reshape(n, n * _STRIPES),
        cmap=ListedColormap(["#f4f4f4", *_COLOURS]),
        vmin=0,
        vmax=len(_COLOURS),
        extent=(-0.5, n - 0.5, n - 0.5, -0.5),
        interpolation="nearest",
    )
    labels = [f"{_short(name)} [{where}]" for name, where in names]
    axis.set_xticks(range(n), labels, rotation=90, fontsize=6.5, color=_INK)
    axis.set_yticks(range(n), labels, fontsize=6.5, color=_INK)
    axis.set_xticks(np.arange(n + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(n + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=0.8)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=10, color=_INK, loc="left")
    save(figure, path)


def _short(name: str) -> str:
    return name.removeprefix("params/").removesuffix("/kernel")
