"""What an evaluation looks like in the terminal: the table, diversity, the best and worst prompts."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ..common import tables
from ..common.text import plain
from . import people

if TYPE_CHECKING:
    from .compare import Comparison, Evaluation

AXES = {"following": "prompt following", "appearance": "appearance"}
SHOWN = 1000  # characters of a text


def columns(evaluation: Evaluation) -> tuple[str, ...]:
    """Of the table. Two arms share a line; of more, each has one."""
    first, *others = evaluation.arms
    if len(others) == 1:
        return ("score", first, others[0], "difference [95 %]", "win rate [95 %]", "n", "trained on?")
    return ("score", "arm", "mean", "difference [95 %]", "win rate [95 %]", "p", "n", "trained on?")


def section(scorer: str) -> tuple[str, str]:
    """Rows of one section stand together: a total, the two axes that must not be mixed up, their parts."""
    name, _, key = scorer.partition(".")
    return name, "axes" if key in AXES else "total" if key == "total" else "parts"


def lines(evaluation: Evaluation) -> list[tuple[Comparison, tuple[str, ...]]]:
    """Each comparison with its texts, in the order of `columns`. Of more than two arms the first line of a score is the
    first arm's, which has a mean only."""
    several, previous = len(evaluation.arms) > 2, None
    found: list[tuple[Comparison, tuple[str, ...]]] = []
    for row in evaluation.rows:
        d, w = row.difference, row.win_rate
        numbers = (f"{d.value:+.4f} [{d.low:+.4f}, {d.high:+.4f}]", f"{w.value:.1%} [{w.low:.1%}, {w.high:.1%}]")
        if not several:
            means = (plain(row.scorer, 100), f"{row.base:.4f}", f"{row.tuned:.4f}")
            found.append((row, (*means, *numbers, str(row.n), row.training_signal)))
            continue
        if row.scorer != previous:
            first = evaluation.arms[0]
            values = evaluation.scores[row.scorer][first]
            mean = f"{np.nanmean(values):.4f}"
            about = (str(int(np.isfinite(values).sum())), row.training_signal)
            found.append((row, (plain(row.scorer, 100), first, mean, "", "", "", *about)))
            previous = row.scorer
        found.append((row, ("", row.arm, f"{row.tuned:.4f}", *numbers, p_text(row.p), str(row.n), "")))
    return found


def p_text(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def strengths_text(evaluation: Evaluation, score: str) -> str:
    """The arms in the order of their strength on a score; empty for two arms."""
    if score not in evaluation.strengths:
        return ""
    ranked = sorted(evaluation.strengths[score].items(), key=lambda each: -each[1].value)
    numbers = [f"{arm} {each.value:+.2f} [{each.low:+.2f}, {each.high:+.2f}]" for arm, each in ranked]
    return f"strengths (Bradley-Terry, logits) on {plain(score, 100)}: {', '.join(numbers)}"


def diversity_text(evaluation: Evaluation) -> str:
    first, *_ = evaluation.arms
    base = evaluation.diversity[first]
    several = len(evaluation.items) > evaluation.prompts
    between = "seeds of one prompt" if several else "pictures of different prompts"
    features = evaluation.traits.features
    what = "pixel distance" if features == "pixels" else f"distance of {features}"
    numbers = [
        f"{arm} {value:.4f}" + (f" ({value / base - 1:+.1%})" if arm != first and base > 0 else "")
        for arm, value in evaluation.diversity.items()
        if not np.isnan(value)
    ]
    return f"diversity (mean {what} between {between}): {', '.join(numbers) or 'too few pictures'}"


def title(evaluation: Evaluation) -> str:
    first, *others = evaluation.arms
    return f"{', '.join(others)} against {first}: {len(evaluation.items)} pictures each of {evaluation.prompts} prompts"


def show(evaluation: Evaluation) -> None:
    """The table, diversity, the best and worst five prompts of one arm, the files and the verdict, to the terminal."""
    console, several = tables.console(), len(evaluation.arms) > 2
    names, rows = columns(evaluation), lines(evaluation)
    table = tables.Table(names, [texts for _, texts in rows], title(evaluation))
    bold = [number for number, (row, _) in enumerate(rows) if row.scorer == evaluation.primary]
    kind = (lambda row: row.scorer) if several else (lambda row: section(row.scorer))
    ends = [number for number, ((row, _), (after, _)) in enumerate(pairwise(rows)) if kind(row) != kind(after)]
    console.print(table.terminal(left=(0, *([1] if several else []), len(names) - 1), bold=bold, rule_after=ends))
    if several:
        console.print("p: that the win rate is 1/2, after Holm's correction over the arms")
        console.print(strengths_text(evaluation, evaluation.verdict.score))
    console.print(diversity_text(evaluation))
    for line in people.lines(evaluation):
        console.print(plain(line, SHOWN))
    ranked = evaluation.by_prompt[evaluation.shown]
    for which, entries in (("best", ranked[:5]), ("worst", ranked[::-1][:5])):
        console.print(
            f"{which} prompts by {plain(evaluation.primary, 100)}, {evaluation.shown} - {evaluation.arms[0]}:"
        )
        for entry in entries:
            console.print(f"  {entry['difference']:+.4f}  {plain(entry['prompt'], SHOWN)}")
    for name, path in evaluation.files.items():
        console.print(f"{name}: {plain(path, 5000)}", soft_wrap=True)
    for finding in evaluation.verdict.findings:
        console.print(f"hacking: {plain(finding, 1000)}")
    console.print(plain(evaluation.verdict.sentence, 1000))
