"""Figures, drawn from what a run logged and nothing else."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

INK, MUTED, GRID = "#222222", "#666666", "#dddddd"
_COLOURS = ("#2166ac", "#b2182b", "#4d9221", "#8856a7", "#d95f02", "#35978f")


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: Path,
    *,
    title: str,
    x_label: str,
    y_label: str,
    levels: Mapping[str, float] | None = None,
    log_x: bool = False,
    log_y: bool = False,
    last: bool = True,
    bottom: float | None = None,
) -> None:
    """Draws lines named with their last values, and horizontal levels (such as a published number) named on the line.

    Args:
      series: name -> x and y values.
      path: PNG to write.
      title: above.
      x_label: with unit.
      y_label: with unit.
      levels: name -> y.
      log_x: logarithmic x; few different values are its ticks.
      log_y: logarithmic y.
      last: whether the names carry the last values.
      bottom: of the y axis; None where the data decide.
    """
    figure = Figure(figsize=(6.4, 3.8), dpi=150, layout="constrained")
    axis = figure.subplots()
    for i, (name, (x, y)) in enumerate(series.items()):
        colour, style = _line(i)
        marker = "o" if len(x) < 30 else None
        counts = all(float(value).is_integer() for value in y)
        label = f"{name}: {y[-1]:{'.0f' if counts else '.2f'}}" if last else name
        axis.plot(x, y, color=colour, linestyle=style, linewidth=1.8, marker=marker, markersize=3, label=label)
    if log_x:
        axis.set_xscale("log")
        ticks = sorted({value for x, _ in series.values() for value in x})
        if len(ticks) < 12:
            axis.set_xticks(ticks, [f"{value:.3g}" for value in ticks])
            axis.set_xticks([], minor=True)
    if log_y:
        axis.set_yscale("log")
    # A legend, since names at the ends of lines that end close together would write over each other.
    axis.legend(fontsize=9, frameon=False, labelcolor="linecolor", loc="best")
    for level in (levels or {}).values():
        axis.axhline(level, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axis.margins(y=0.15)
    for name, level in (levels or {}).items():
        across, upwards = _free_corner(axis, series.values(), level)
        axis.annotate(
            f"{name}: {level:g}",
            (across, level),
            xycoords=("axes fraction", "data"),
            xytext=(4 - 8 * across, 8 * upwards - 4),
            textcoords="offset points",
            ha=("left", "right")[across],
            va=("top", "bottom")[upwards],
            fontsize=8,
            color=MUTED,
        )
    axis.set_ylim(bottom=bottom)
    if not log_x:
        _whole_ticks(axis, [x for x, _ in series.values()])
    _dress(axis, title, x_label, y_label)
    save(figure, path)


def _whole_ticks(axis: Axes, values: Iterable[Sequence[float]]) -> None:
    """No ticks between the values of an axis that counts, as blocks and epochs do."""
    if all(float(v).is_integer() for x in values for v in x):
        axis.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))


def _line(number: int) -> tuple[str, str]:
    """Colour and style of the lines of a figure, in order; the second round of colours is dashed."""
    return _COLOURS[number % len(_COLOURS)], "-" if number < len(_COLOURS) else "--"


def _free_corner(axis: Axes, lines: Iterable[tuple[Sequence[float], Sequence[float]]], level: float) -> tuple[int, int]:
    """Where a label of a level meets the fewest points of lines: left or right end (0, 1), below or above (0, 1)."""
    right, _ = axis.get_xlim()[1], axis.get_ylim()  # sets the limits, which the transformation needs
    to_axes = axis.transData + axis.transAxes.inverted()
    points = [np.zeros((0, 2))]
    for x, y in lines:
        if not len(x):
            continue
        corners = to_axes.transform(np.column_stack([x, y]))
        place = np.linspace(0, len(corners) - 1, 200)
        points.append(np.column_stack([np.interp(place, np.arange(len(corners)), c) for c in corners.T]))
    across, upwards = np.concatenate(points).T
    height = upwards - to_axes.transform((right, level))[1]

    def met(corner: tuple[int, int]) -> int:
        at_end = across > 0.7 if corner[0] else across < 0.3
        beside = (height > -0.01) & (height < 0.08) if corner[1] else (height < 0.01) & (height > -0.08)
        return int(np.sum(at_end & beside))

    return min([(1, 0), (1, 1), (0, 0), (0, 1)], key=met)


def histogram(
    edges: Sequence[float],
    shares: Mapping[str, Sequence[float]],
    path: Path,
    *,
    title: str,
    x_label: str,
    y_label: str,
    means: Mapping[str, float],
) -> None:
    """Draws histograms over the same bins as outlines, each named in the legend with its mean.

    Args:
      edges: of the bins, one more than there are bins.
      shares: name -> heights.
      path: PNG to write.
      title: above.
      x_label: with unit.
      y_label: of the heights.
      means: name -> mean of the values.
    """
    figure = Figure(figsize=(6.4, 3.8), dpi=150, layout="constrained")
    axis = figure.subplots()
    for i, (name, heights) in enumerate(shares.items()):
        colour, style = _line(i)
        axis.stairs(
            heights, edges, color=colour, linestyle=style, linewidth=1.4, label=f"{name}: mean {means[name]:.2f}"
        )
    axis.legend(fontsize=8, frameon=False)
    axis.set_ylim(bottom=0)
    _dress(axis, title, x_label, y_label)
    save(figure, path)


def scatter(points: np.ndarray, labels: np.ndarray, names: Sequence[str], path: Path, *, title: str) -> None:
    """Draws labelled points in the plane; each class in its colour, its name at its mean.

    Args:
      points: (N, 2).
      labels: (N,), indices into `names`.
      names: of the classes.
      path: PNG to write.
      title: above.
    """
    figure = Figure(figsize=(6.4, 5.2), dpi=150, layout="constrained")
    axis = figure.subplots()
    palette = colormaps["tab10" if len(names) <= 10 else "tab20"]
    for label, name in enumerate(names):
        chosen = points[labels == label]
        if not len(chosen):
            continue
        colour = palette(label % palette.N)
        axis.scatter(chosen[:, 0], chosen[:, 1], s=7, color=colour, linewidths=0, alpha=0.6)
        axis.annotate(
            name,
            chosen.mean(axis=0),
            ha="center",
            va="center",
            fontsize=10,
            weight="bold",
            color=colour,
            path_effects=[patheffects.withStroke(linewidth=3, foreground="white")],
        )
    axis.set_aspect("equal")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_color(GRID)
    axis.set_title(title, fontsize=10, color=INK, loc="left")
    save(figure, path)


def panels(
    series: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    path: Path,
    *,
    title: str,
    x_label: str,
    y_label: str,
    y_limits: tuple[float | None, float | None] = (None, None),
    band_limits: tuple[float, float] = (-np.inf, np.inf),
    log_x: bool = False,
    log_y: bool = False,
    marks: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]] | None = None,
    variants: Mapping[str, str] | None = None,
) -> None:
    """Draws several plots side by side on the same axes; a name has one colour in all, told by the legend.

    Args:
      series: panel -> line -> x, y and, where there is one, the spread drawn as a band around y.
      path: PNG to write.
      title: above all.
      x_label: with unit.
      y_label: with unit.
      y_limits: bottom and top, None where the data decide.
      band_limits: what y can be at all; bands end there.
      log_x: logarithmic x axis.
      log_y: logarithmic y axis.
      marks: panel -> name -> x and y of single points, such as published numbers; in grey.
      variants: of a line the one whose colour it shares; the first is dashed, the next dotted.
    """
    figure = Figure(figsize=(1.9 + 3.1 * len(series), 3.6), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(series), sharex=True, sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(name for lines in series.values() for name in lines))
    variants = variants or {}
    plain = [name for name in names if name not in variants]
    looks = {name: _line(plain.index(name)) for name in plain}
    for name, whose in variants.items():
        if name in names:
            shown = sum(of == whose for other, of in variants.items() if other in looks)
            looks[name] = (looks[whose][0] if whose in looks else _line(len(looks))[0], ("--", ":")[shown])
    handles: dict[str, Any] = {}
    for axis, (panel, lines) in zip(axes, series.items(), strict=True):
        for name, (x, y, *spread) in lines.items():
            colour, style = looks[name]
            marker = "o" if len(x) < 30 else None
            (handles[name],) = axis.plot(
                x, y, color=colour, linestyle=style, linewidth=1.6, marker=marker, markersize=3
            )
            if spread:
                low, high = (np.clip(end, *band_limits) for end in (np.subtract(y, spread[0]), np.add(y, spread[0])))
                axis.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        for (name, (x, y)), shape in zip((marks or {}).get(panel, {}).items(), "sD^v", strict=False):
            (handles[name],) = axis.plot(x, y, shape, markerfacecolor="none", markeredgecolor=MUTED, markersize=5)
        _dress(axis, panel, x_label, size=9)
    axes[0].set_ylabel(y_label, color=INK)
    if not log_x:
        _whole_ticks(axes[0], [line[0] for lines in series.values() for line in lines.values()])
    if log_x:
        axes[0].set_xscale("log")
    if log_y:
        _log(axes[0])
    if y_limits != (None, None):
        axes[0].set_ylim(*y_limits)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10, color=INK, x=0.01, ha="left")
    save(figure, path)


def confusion(counts: np.ndarray, names: Sequence[str], path: Path, *, title: str) -> None:
    """Draws a confusion matrix: share of each true class, a row, given each answer, a column.

    Args:
      counts: (K, K), of true class by answer.
      names: of the classes.
      path: PNG to write.
      title: above.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(6.4, 5.8), dpi=150, layout="constrained")
    axis = figure.subplots()
    # The colours are of the errors; the diagonal, far above them, would leave them all pale.
    largest = max((shares * (1 - np.eye(len(names)))).max(), 1e-9)
    axis.imshow(np.where(np.eye(len(names), dtype=bool), np.nan, shares), cmap="Reds", vmin=0, vmax=1.3 * largest)
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.0005:
            axis.text(
                column,
                row,
                f"{100 * share:.1f}",
                ha="center",
                va="center",
                fontsize=8,
                color=INK,
                weight="bold" if row == column else "normal",
            )
    axis.set_xticks(range(len(names)), names, rotation=45 if max(map(len, names)) > 2 else 0)
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(length=0)
    axis.spines[:].set_color(GRID)
    axis.set_xlabel("answer", color=INK)
    axis.set_ylabel("true class (rows add up to 100 %)", color=INK)
    axis.set_title(title, fontsize=10, color=INK, loc="left")
    save(figure, path)


def matrix(
    rows: Mapping[str, Sequence[float]],
    columns: Sequence[str],
    path: Path,
    *,
    title: str,
    x_label: str,
    log: bool = False,
) -> None:
    """Draws a table of shares in %, each cell as dark as its number.

    Args:
      rows: name -> a value in 0..100 for each column.
      columns: names.
      path: PNG to write.
      title: above.
      x_label: of the columns.
      log: as dark as the logarithm, for shares of very different sizes; zeros are red.
    """
    values = np.array(list(rows.values()))
    longest = max(map(len, rows))
    size = (1.2 + 0.075 * longest + 0.55 * len(columns), 1.1 + 0.22 * len(rows))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axis = figure.subplots()
    least = values[values > 0].min(initial=100.0)
    scale = LogNorm(least / 2, 1000) if log else Normalize(0, 130)  # the largest stay light enough to read
    axis.imshow(np.where(log & (values == 0), np.nan, values), cmap="Blues", norm=scale, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        zero = log and value == 0
        shown = "<1" if 0 < value < 0.5 else f"{value:.0f}"
        text = f"{value:#.2g}".rstrip(".") if log and not zero else shown
        colour, weight = (_COLOURS[1], "bold") if zero else (INK, "normal")
        axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour, weight=weight)
    axis.set_xticks(range(len(columns)), columns, fontsize=8)
    axis.set_yticks(range(len(rows)), list(rows), fontsize=7)
    axis.tick_params(length=0)
    axis.spines[:].set_color(GRID)
    axis.set_xlabel(x_label, color=INK, fontsize=9)
    figure.suptitle("\n".join(textwrap.wrap(title, round(13 * size[0]))), fontsize=10, color=INK)
    save(figure, path)


def bands(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]]],
    path: Path,
    *,
    title: str,
    x_label: str,
    y_label: str = "",
    log: bool = False,
    share_y: bool = True,
    caption: str = "",
) -> None:
    """Draws filled bands between a lower and an upper curve, in plots side by side; one colour a name, one legend.

    Args:
      panels: panel -> name -> x, lower y and upper y.
      path: PNG to write.
      title: above all.
      x_label: with unit.
      y_label: with unit.
      log: logarithmic y.
      share_y: one y axis for all panels.
      caption: below all.
    """
    width = max(7.6, 1.8 + (2.2 if share_y else 2.8) * len(panels))
    figure = Figure(figsize=(width, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=True, sharey=share_y, squeeze=False)[0]
    for axis, (panel, series) in zip(axes, panels.items(), strict=True):
        for colour, (name, (x, low, high)) in zip(reversed(_COLOURS[:2]), series.items(), strict=True):
            axis.fill_between(x, low, high, color=colour, alpha=0.35, linewidth=0, label=name)
            axis.plot(x, low, color=colour, linewidth=0.9)
            axis.plot(x, high, color=colour, linewidth=0.9)
        _dress(axis, panel, size=9)
    for axis in (axes[:1] if share_y else axes) if log else ():
        _log(axis)
    axes[0].set_ylabel(y_label, color=INK)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", fontsize=8, frameon=False)
    wrapped = textwrap.fill(caption, int(16 * width))
    figure.supxlabel(x_label + (f"\n\n{wrapped}" if caption else ""), fontsize=8, color=INK)
    figure.suptitle(title, fontsize=10, color=INK, x=0.01, ha="left")
    save(figure, path)


def _log(axis: Axes) -> None:
    """A logarithmic y axis with plain numbers, few enough to read; after all is drawn, as its range decides."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    decades = np.log10(high / low)
    steps = (1, 1.5, 2, 3, 5) if decades < 1.5 else (1, 2, 5) if decades < 3 else (1,)
    axis.yaxis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")


def _dress(axis: Axes, title: str, x_label: str = "", y_label: str = "", *, size: float = 10) -> None:
    """The look of all axes with numbers: level lines, no frame, a title of that size at the left."""
    axis.grid(axis="y", color=GRID, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel(x_label, color=INK)
    axis.set_ylabel(y_label, color=INK)
    axis.set_title(title, fontsize=size, color=INK, loc="left")


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, whole or not at all; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    FigureCanvasAgg(figure)
    figure.savefig(partial, format="png", metadata={"Software": None})
    partial.replace(path)
