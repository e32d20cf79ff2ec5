"""Tables of texts, as Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable


def row(cells: Iterable[object]) -> str:
    """One line of a Markdown table. Text from elsewhere goes through `text.markdown` first."""
    return f"| {' | '.join(map(str, cells))} |"


def head(columns: Sequence[str]) -> str:
    """The first two lines of a Markdown table, for one that is printed row by row."""
    return f"{row(columns)}\n{row(['---'] * len(columns))}"


@dataclass
class Table:
    """Rows of cells, one for each of ``columns``. The title is shown in the terminal only."""

    columns: Sequence[str]
    rows: list[Sequence[object]] = field(default_factory=list)
    title: str = ""

    def markdown(self) -> str:
        return "\n".join([head(self.columns), *map(row, self.rows)])

    def terminal(
        self, left: Collection[int] = (0,), bold: Collection[int] = (), rule_after: Collection[int] = ()
    ) -> RichTable:
        """``left``: columns that are aligned to the left, all others to the right. ``bold`` and ``rule_after``: rows.

        In a narrow terminal intervals, [low, high], go to a second line; names and numbers stay whole.
        """
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as RichTable

        table = RichTable(title=self.title or None, title_justify="left", box=SIMPLE_HEAD)
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="left" if number in left else "right", no_wrap="[" not in column)
        for number, cells in enumerate(self.rows):
            style = "bold" if number in bold else None
            table.add_row(*map(str, cells), style=style, end_section=number in rule_after)
        return table


def console(width: int = 120) -> Console:
    """Prints texts as they are: [bold] and :cat: are not markup. ``width`` is used for log files, which have none."""
    from rich.console import Console

    found = Console(markup=False, emoji=False, highlight=False)
    if not found.is_terminal:
        found.width = width
    return found
