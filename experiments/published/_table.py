"""A published table: rows of cells, found by the number it has in its report."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

Cell = int | float | str | None


@dataclass(frozen=True)
class Table:
    """One table as its report printed it, turned so that every setting is a row.

    Args:
      report: letter of the report (see `REPORTS`).
      number: the table's number in the report; a word where the report prints none.
      title: what the table measures.
      columns: column names with their units; the first `keys` columns identify a row.
      rows: the cells, exactly as printed; `None` where nothing was printed.
      note: what a reader must know before comparing with these numbers.
      source: the report's section.
      keys: how many leading columns identify a row.

    Raises:
      ValueError: a row is not as long as `columns`, or two rows have the same key.

    Example:
      >>> t = Table("A", 2, "Quality", ("configuration", "PSNR, dB"), ((1, 21.37), (2, 19.36)))
      >>> t.cell(2, "PSNR, dB"), t.column("configuration")
      (19.36, (1, 2))
    """

    report: str
    number: int | str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    source: str = ""
    keys: int = 1

    def __post_init__(self) -> None:
        """Refuse a ragged table and rows that cannot be told apart."""
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.name}: row {row} has {len(row)} cells, expected {len(self.columns)}")
        if len({row[: self.keys] for row in self.rows}) < len(self.rows):
            raise ValueError(f"{self.name}: two rows have the same first {self.keys} cells")

    @property
    def name(self) -> str:
        """How the table is cited, such as `A Table 2`."""
        return f"{self.report} Table {self.number}" if isinstance(self.number, int) else f"{self.report} {self.number}"

    def column(self, column: str) -> tuple[Cell, ...]:
        """All cells of one column, from top to bottom."""
        index = position(column, self.columns, f"{self.name}: column")
        return tuple(row[index] for row in self.rows)

    def cell(self, row: Cell | tuple[Cell, ...], column: str) -> Cell:
        """The cell in `column` of the row whose first cells (a tuple where `keys` is over 1) are `row`."""
        known = [cells[0] if self.keys == 1 else cells[: self.keys] for cells in self.rows]
        return self.column(column)[position(row, known, f"{self.name}: row")]


def position(wanted: object, known: Sequence, what: str) -> int:
    """Index of `wanted` in `known`; a ValueError that names the nearest one where it is missing."""
    if wanted in known:
        return known.index(wanted)
    numbers = [name for name in known if isinstance(name, int | float)]
    if isinstance(wanted, int | float) and numbers:
        nearest = min(numbers, key=lambda number: abs(number - wanted))
    else:
        by_text = {repr(name).lower(): name for name in known}  # case is the commonest slip: it must not count
        nearest = by_text[get_close_matches(repr(wanted).lower(), list(by_text), n=1, cutoff=0.0)[0]]
    raise ValueError(f"{what} {wanted!r} is unknown; nearest: {nearest!r}; all: {', '.join(map(repr, known))}")
