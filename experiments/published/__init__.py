"""The numbers that were published before this project, by report and table.

A and B are reports of student projects, C a course report, D notes on a paper, E a discussion of a paper;
`papers` gathers what other papers reach. Cells are as printed, misprints included; each `note` says which.
"""

from experiments.published import other_papers, report_a, report_b, reports_cde
from experiments.published._table import Cell, Table, position

__all__ = ["REPORTS", "TABLES", "Cell", "Table", "published", "table"]

REPORTS = {
    "A": "Mao Keyu, Shen Jianzhi: Exploring Functa, Pruning Vision Transformers, and Optimization Strategies for Deep "
    "Learning (Fudan University)",
    "B": "Wanyi Wang, Siyu Wang: NN Final Project Report (Functa, CP-ViT, batch normalisation, DessiLBI)",
    "C": "Pruning Vision Transformers (patch skipping by a small MLP, CIFAR-100)",
    "D": "Yang He, Joey Tianyi Zhou: Data-independent Module-aware Pruning for Hierarchical Vision Transformers, "
    "arXiv 2404.13648",
    "E": "Discussion with the author of Finding Lottery Tickets in Vision Models via Data-driven Spectral Foresight "
    "Pruning (PX, CVPR 2024)",
    "papers": "Other papers and public re-runs; each row names its own source",
}

TABLES: tuple[Table, ...] = report_a.TABLES + report_b.TABLES + reports_cde.TABLES + other_papers.TABLES


def table(report: str, number: int | str) -> Table:
    """The table of `report` ("A", ..., "E", "papers") with that number.

    Raises:
      ValueError: no such report or table; names the nearest.

    Example:
      >>> table("A", 2).title
      'Reconstruction quality of Functa and Spatial Functa'
    """
    position(report, tuple(REPORTS), "report")
    candidates = [t for t in TABLES if t.report == report]
    return candidates[position(number, [t.number for t in candidates], f"report {report}: table")]


def published(report: str, number: int | str, *, row: Cell | tuple[Cell, ...], column: str) -> Cell:
    """One published cell: the row is named by its first cell, or by a tuple of its first `Table.keys` cells.

    Raises:
      ValueError: no such report, table, row or column; names the nearest.

    Example:
      >>> published("A", 2, row=(1, "MNIST"), column="PSNR, dB")
      21.37
      >>> published("A", 5, row=0.5, column="accuracy, %")
      96.34
    """
    return table(report, number).cell(row, column)


def published_number(report: str, number: int | str, *, row: Cell | tuple[Cell, ...], column: str) -> float:
    """As `published`, for what one calculates with.

    Raises:
      ValueError: as `published`, or the cell is no number.

    Example:
      >>> published_number("A", 4, row=0, column="accuracy")
      0.9852
    """
    cell = published(report, number, row=row, column=column)
    if not isinstance(cell, int | float):
        raise ValueError(f"report {report}, table {number}, row {row!r}, {column!r} is no number but {cell!r}")
    return float(cell)
