"""Figures made of images: rows and tables of them."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.plots import INK, MUTED, save


def image_rows(
    rows: Mapping[str, Sequence[np.ndarray] | np.ndarray],
    path: Path,
    *,
    title: str,
    cell: float = 1.1,
    captions: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Draws rows of images of one shape on the page, each row with its name; no image is interpolated.

    Args:
      rows: name -> N images, uint8 (H, W, C); H and W may differ between images (their ratio should not), N may not.
      path: PNG to write.
      title: above all.
      cell: width of an image on the page, inches.
      captions: row name -> N texts, each below its image; rows without are left out.
    """
    captions = captions or {}
    count = len(next(iter(rows.values())))
    first = next(iter(rows.values()))[0]
    longest = max(len(line) for name in rows for line in name.splitlines() or [""])
    label, line = max(1.5, 0.085 * longest), 0.17 if captions else 0.0
    tall = cell * first.shape[0] / first.shape[1] + line
    figure = Figure(figsize=(label + count * cell, len(rows) * tall + 0.45), dpi=150)
    grid = figure.subplots(len(rows), count, squeeze=False)
    for axes, (name, images) in zip(grid, rows.items(), strict=True):
        for axis, image in zip(axes, images, strict=True):
            axis.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
        for axis, text in zip(axes, captions.get(name, ()), strict=False):
            axis.set_xlabel(text, fontsize=7, color=MUTED, labelpad=2)
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, color=INK, labelpad=6)
    width, height = figure.get_size_inches()
    figure.subplots_adjust(
        left=label / width,
        right=1 - 0.05 / width,
        top=1 - 0.4 / height,
        bottom=(0.05 + line) / height,
        wspace=0.06,
        hspace=0.06 + line / (tall - line),
    )
    figure.suptitle(title, fontsize=10, color=INK, y=1 - 0.12 / height, va="top")
    save(figure, path)


def image_table(grid: Mapping[str, Mapping[str, np.ndarray]], path: Path, *, title: str, cell: float = 2.0) -> None:
    """Draws a table of images with names for its rows and columns; images may differ in size, none is interpolated.

    Args:
      grid: row -> column -> uint8 (H, W, C); a cell may be missing.
      path: PNG to write.
      title: above all.
      cell: width and height of a cell on the page, inches.
    """
    columns = list(dict.fromkeys(column for row in grid.values() for column in row))
    size = (1.1 + cell * len(columns), 0.6 + cell * len(grid))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    for axes, (row, images) in zip(figure.subplots(len(grid), len(columns), squeeze=False), grid.items(), strict=True):
        for axis, column in zip(axes, columns, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if column in images:
                image = images[column]
                axis.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
            if row == next(iter(grid)):
                axis.set_title(column, fontsize=9, color=INK)
        axes[0].set_ylabel(row, rotation=0, ha="right", va="center", fontsize=9, color=INK, labelpad=6)
    figure.suptitle("\n".join(textwrap.wrap(title, round(14 * size[0]))), fontsize=10, color=INK)
    save(figure, path)
