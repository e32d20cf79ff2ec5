"""Tables and nearest names."""

from io import StringIO

import pytest
from rich.console import Console

from diffpo.common import tables
from diffpo.common.names import hint, nearest
from diffpo.common.tables import Table


def test_a_markdown_table_is_read_back_cell_by_cell():
    table = Table(["name", "n", ""], [("a", 1, "x"), ("b", 2.5, "")])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.markdown().split("\n")]
    assert lines == [["name", "n", ""], ["---"] * 3, ["a", "1", "x"], ["b", "2.5", ""]]
    # printed row by row it is the same table
    assert "\n".join([tables.head(table.columns), *map(tables.row, table.rows)]) == table.markdown()


def test_the_terminals_table_shows_every_cell_as_it_is():
    table = Table(["name", "interval [95 %]"], [("[bold]a", "+0.1 [0.0, 0.2]"), (":cat:", "-0.1 [-0.2, 0.0]")], "both")
    shown = StringIO()
    console = tables.console(width=80)
    console.file = shown
    console.print(table.terminal(bold=[1], rule_after=[0]))
    text = shown.getvalue()
    for part in ("both", *table.columns, *(cell for row in table.rows for cell in row)):
        assert part in text
    names = [line for line in text.split("\n") if "[bold]a" in line or ":cat:" in line]
    assert names[0].index("[bold]a") == names[1].index(":cat:")  # left
    assert len(names[0].rstrip()) == len(names[1].rstrip())  # right


def test_a_narrow_terminal_breaks_intervals_and_nothing_else():
    table = Table(["score", "difference [95 %]"], [("a_long_name_of_a_score", "+0.1234 [+0.1000, +0.2000]")])
    console = Console(width=40, file=StringIO(), markup=False)
    console.print(table.terminal())
    lines = console.file.getvalue().split("\n")
    assert any("a_long_name_of_a_score" in line for line in lines) and not any(
        "+0.2000]" in line and "+0.1234" in line for line in lines
    )


@pytest.mark.parametrize(("word", "near"), [("sigmoit", "sigmoid"), ("sigmoid", "sigmoid"), ("xyz", None), ("", None)])
def test_the_nearest_name(word, near):
    known = ["hinge", "sigmoid", "ipo"]
    assert nearest(word, iter(known)) == near
    assert (f"did you mean {near}?" if near else "hinge, sigmoid, ipo") in hint(word, iter(known))


def test_without_any_name_there_is_no_nearest():
    assert nearest("a", []) is None and "there is none" in hint("a", [])
