"""Pictures of prompts, judged by scorers, as rows that training reads (Syn-Pic of RankDPO; AI feedback).

OUT/images/..., manifest.jsonl   the pictures that were made (see `diffpo.evaluation.generate`)
OUT/labels.parquet               pairs, rankings or likes, with the pictures inside
OUT/label.json                   settings, counts, agreement of the scorers, what was left out
OUT/label.png                    the best and the worst picture of some prompts
OUT/.scores/                     finished numbers: another rule, margin or form does not score anything again
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..common import processes
from ..common.errors import DiffpoError
from ..common.text import plain
from ..evaluation import items
from ..evaluation.arms import Source
from ..evaluation.manifest import json_bytes, save
from ..evaluation.scoring import Scoring, score_pictures
from . import captions, displacement, files, pictures, rows
from .aggregate import RULES, agreement, judge, scales
from .captions import Captions
from .displacement import Filter
from .rows import Choice, Row


@dataclass(frozen=True)
class Labelling:
    """How pictures are judged, and what is made of that.

    Attributes:
        scorers: as in `objective.rollout.scorers`: of a scorer with several numbers one is named, e.g. shapes.total.
        rule: of `aggregate.RULES`.
        choice: the form, the pairs, margin, ties and flips.
        captions: one for each picture of a pair; None: the prompt alone.
        filter: which pairs the displacement score leaves out; None does not compute it.
        device: of the scorers; None is each one's own default.
    """

    scorers: tuple[str, ...]
    rule: str = "win-rate"
    choice: Choice = field(default_factory=Choice)
    captions: Captions | None = None
    filter: Filter | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise DiffpoError(f"--rule {plain(self.rule, 60)}: use {', '.join(RULES)}")
        for option, value in (("captions", self.captions), ("filter", self.filter)):
            if value is not None and self.choice.form != "pairs":
                raise DiffpoError(f"--{option} is for pairs: leave out --as {self.choice.form}")


@dataclass
class Labelled:
    """What was made: the rows, and counts and sentences about them.

    Attributes:
        counts: pictures, prompts, rows, ties, flipped.
        agreement: by two numbers, the share of pairs that both order alike [low, high], and the pairs.
        left_out: sentences.
    """

    path: Path
    rows: list[Row]
    counts: dict[str, int]
    agreement: dict[str, dict[str, float]]
    left_out: list[str]


def run(
    out: str | Path, arms: Mapping[str, Source], labelling: Labelling, prompts: Any = None, n: int | None = None
) -> Labelled:
    """Make the pictures of ``arms`` for the first ``n`` of ``prompts``, judge them, and write the files above.

    A killed run goes on with the same command and gives the same file. Under `accelerate launch` each process makes and
    scores its share, and the first one writes.

    What cannot be judged (a picture that cannot be read, a number that is NaN, a prompt with a single picture) is left
    out, counted and said. DiffpoError for a prompt file without prompts, for a scorer that gives up (labels by fewer
    scorers would be others), and if nothing is left.
    """
    out, ours = Path(out), processes.here()
    files.check_target(out / files.LABELS)
    texts = items.prompts_of(prompts)
    numbers_of = pictures.resolve(labelling.scorers, texts[:n] if texts else [])
    numbers = [name for own in numbers_of.values() for name in own]
    gaps: list[str] = []
    with ours.lock(out):
        singles, _ = pictures.collect(arms, prompts, out, n, gaps)
        scores = score_pictures(singles, list(arms), Scoring(tuple(numbers_of), device=labelling.device), out)
        if scores.stopped:
            spec, reason = next(iter(scores.stopped.items()))
            raise DiffpoError(
                f"the scorer {spec} gave up, and no labels were written: {reason}. What is scored is kept: the same "
                f"command continues. Or leave the scorer out with the other --scorers"
            )
        gaps += scores.gaps()
        prompted, more = pictures.group(singles, scores, numbers)
        scale = scales([each.scores for each in prompted])
        judged = [(each, judge(each.asked, labelling.rule, scale[each.there])) for each in prompted]
        made, ties = rows.make(judged, labelling.choice)
        if labelling.captions is not None:
            made, said = captions.add(made, labelling.captions, out)
            more += said
        if labelling.filter is not None:
            made, said = displacement.add(made, labelling.filter, out)
            more += said
        agree = agreement([each.scores for each in prompted], numbers)
        counts = {"pictures": len(singles), "judged": sum(len(each.pictures) for each in prompted)}
        counts |= {"prompts": len(prompted), "rows": len(made), "ties": ties}
        counts |= {"flipped": sum(row.flipped for row in made)}
        found = Labelled(out / files.LABELS, made, counts, _flat(agree), [*gaps, *more])
        if ours.main:
            _write(out, found, labelling, numbers, list(arms))
        ours.wait()
    return found


def _write(out: Path, found: Labelled, labelling: Labelling, numbers: Sequence[str], arms: Sequence[str]) -> None:
    about = {"scorers": list(labelling.scorers), "rule": labelling.rule, "arms": list(arms), **asdict(labelling.choice)}
    about |= {
        "captions": labelling.captions and asdict(labelling.captions),
        "filter": labelling.filter and labelling.filter.share,
    }
    files.write(found.path, labelling.choice.form, found.rows, numbers, about)
    left_out = [plain(line, 2000) for line in found.left_out]
    summary = {"settings": about, **found.counts, "agreement": found.agreement, "left_out": left_out}
    save(out / files.SUMMARY, json_bytes(summary, indent=2) + b"\n")
    if pairs := list(files.extremes(found.rows)):
        save(out / files.SHEET, files.sheet(pairs))


def _flat(agree: Mapping[tuple[str, str], tuple[Any, int]]) -> dict[str, dict[str, float]]:
    return {f"{a} and {b}": {**asdict(estimate), "pairs": pairs} for (a, b), (estimate, pairs) in agree.items()}


def show(found: Labelled) -> None:
    """Print what was made and what was left out."""
    from ..common.tables import Table, console

    for line in found.left_out:
        print(line)
    counts = found.counts
    print(f"{counts['judged']} of {counts['pictures']} pictures of {counts['prompts']} prompts are judged")
    print(f"{counts['rows']} rows, {counts['ties']} ties, {counts['flipped']} flipped: {found.path}")
    if found.agreement:
        table = Table(["scorers", "order alike [95 %]", "pairs"])
        for names, each in found.agreement.items():
            table.rows.append([names, f"{each['value']:.1%} [{each['low']:.1%}, {each['high']:.1%}]", each["pairs"]])
        console().print(table.terminal())
