"""The pages of the documentation, taken apart: their fenced blocks, their marks and their inline code."""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "samplers/README.md",
    *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")),
]
LANGUAGES = ("sh", "python", "yaml", "json", "text")
NEEDS = ("gpu", "network", "weights", "server")
FENCE = re.compile(r"^\s*```(\w*)\s*$")
MARK = re.compile(r"^\s*<!-- (.+?) -->\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced block: ``line`` is that of the fence; ``marks`` are the comments right above it, top first."""

    page: str
    line: int
    language: str
    marks: tuple[str, ...]
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        return not any(mark.startswith(("needs: ", "not run: ")) for mark in self.marks)

    @property
    def continues(self) -> bool:
        return "continues" in self.marks

    @property
    def given(self) -> list[str]:
        """Names that the block uses without making them; the test provides them."""
        lists = [mark.removeprefix("given: ") for mark in self.marks if mark.startswith("given: ")]
        return [name.strip() for text in lists for name in text.split(",")]

    def commands(self) -> list[list[str]]:
        """The words of each command of a shell block: continued lines are joined, comments left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


@cache
def blocks(page: str) -> tuple[Block, ...]:
    found, marks, start, inside = [], [], 0, []
    language = None
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        fence = FENCE.match(line)
        if language is not None and not fence:
            inside.append(line)
        elif language is not None:
            text = textwrap.dedent("\n".join(inside)) + "\n"
            found.append(Block(page, start, language, tuple(marks), text))
            language, marks, inside = None, [], []
        elif fence:
            language, start = fence[1], number
        elif mark := MARK.match(line):
            marks.append(mark[1])
        elif line.strip():
            marks = []
    assert language is None, f"{page}:{start}: the block has no end"
    return tuple(found)


@cache
def inline(page: str) -> frozenset[str]:
    """What stands in `backticks` outside of blocks."""
    text = re.sub(
        r"^\s*```.*?^\s*```\s*$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    return frozenset(span.strip() for span in re.findall(r"`([^`]+)`", text))
