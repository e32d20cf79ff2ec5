"""How often a step scorer ranks a pair that it was not trained on as people did, by noise level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..common.tables import Table
from ..config import ScorerTrain
from ..data.batches import Batch, Batches
from ..evaluation.statistics import mean_difference, win_rate
from ..models.family import Family
from ..problems.forward import Forward
from ..problems.policy import Policy
from ..problems.regression import Conditioning, Regression
from ..scorers.step.base import StepScorer
from .metrics import BINS

CLEAN = "clean"


def captions(batches: Batches, indices: list[int]) -> list[str]:
    """The captions of a batch's rows, chosen images first."""
    each = [batches.groups.groups[index].captions for index in indices]
    return [found[0] for found in each] + [found[-1] for found in each]


def noised(family: Family, batches: Batches, batch: Batch, clean: bool) -> Regression:
    """One noise and one t for both images of a pair; ``clean``: none, at t = 0. With the empty prompt's condition."""
    problem = Forward(family)(batch)
    if clean:
        problem = replace(problem, x_t=batch.x_0, t=torch.zeros_like(problem.t))
    return replace(problem, conditioning=Conditioning(batch.cond, batches.unconditional(batch.cond, batch.indices)))


@torch.no_grad()
def estimated(policy: Policy, problem: Regression, guidance: float, clean: bool) -> Tensor:
    """x_0 (N, C, h, w) from one call of the network, with classifier-free guidance where it is not 1."""
    if clean:
        return problem.x_t
    given = problem.conditioning
    given = Conditioning(given.cond, None if guidance == 1 else given.uncond, guidance)
    return policy.family.to_x_0(policy.output(problem.x_t, problem.t, given), problem.x_t, problem.t)


@torch.no_grad()
def measure(
    scorers: dict[str, StepScorer], batches: Batches, policy: Policy, guidance: float, settings: ScorerTrain
) -> list[dict[str, Any]]:
    """One line for each part of the times (finished pictures, then `metrics.BINS` equal parts) and scorer: ``times``,
    ``scorer``, ``accuracy`` with its Wilson interval, ``pairs``; and ``first_minus``, the first scorer's accuracy minus
    this one's on the very same noisy pairs, with its bootstrap interval. Intervals are clustered by caption.

    Ties are left out. At most ``settings.eval_pairs`` pairs are measured, with ``settings.eval_draws`` of noise for
    each pair and part, ``settings.batch_size`` pairs at once. Every scorer gets the same noise.
    """
    decided = [i for i, group in enumerate(batches.groups.groups) if group.preference != 0.5]
    limit, rows = min(settings.eval_pairs, len(decided)), settings.batch_size
    chosen_pairs = [decided[i * len(decided) // limit] for i in range(limit)]
    width = policy.family.train_timesteps / BINS
    parts: list[tuple[int, int] | None] = [None]
    parts += [(math.ceil(part * width), math.ceil((part + 1) * width)) for part in range(BINS)]
    lines = []
    for number, part in enumerate(parts):
        todo = [index for index in chosen_pairs for _ in range(settings.eval_draws if part else 1)]
        margins: dict[str, list[Tensor]] = {name: [] for name in scorers}
        prompts = []
        for start in range(0, len(todo), rows):
            indices = todo[start : start + rows]
            positions = [(start + i) * len(parts) + number for i in range(len(indices))]
            batch = batches.batch(indices, positions, "eval", [part or (0, 1)] * len(indices))
            problem, texts = noised(policy.family, batches, batch, part is None), captions(batches, indices)
            x_0 = estimated(policy, problem, guidance, part is None)
            prompts += texts[: len(indices)]
            for name, scorer in scorers.items():
                found = scorer.score(problem.x_t, x_0, problem.t, texts, problem.conditioning.cond)
                margins[name].append((found[: len(indices)] - found[len(indices) :]).cpu().double())
        right = {}
        for name in scorers:
            margin = torch.cat(margins[name]).numpy()
            right[name] = (margin > 0) + 0.5 * (margin == 0)
            first = next(iter(right))
            share = win_rate(0 * margin, margin, prompts)
            line = {
                "times": f"{part[0]}-{part[1] - 1}" if part else CLEAN,
                "scorer": name,
                "accuracy": [share.value, share.low, share.high],
                "pairs": len(chosen_pairs),
            }
            if name != first:
                gap = mean_difference(right[name], right[first], prompts)
                line["first_minus"] = [gap.value, gap.low, gap.high]
            lines.append(line)
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """The lines of `measure` as Markdown."""
    names = list(dict.fromkeys(line["scorer"] for line in lines))
    rows: list[Sequence[object]] = []
    for times in dict.fromkeys(line["times"] for line in lines):
        cells = []
        for line in (line for line in lines if line["times"] == times):
            value, low, high = (100 * each for each in line["accuracy"])
            cell = f"{value:.1f} % [{low:.1f}, {high:.1f}]"
            if "first_minus" in line:
                value, low, high = (100 * each for each in line["first_minus"])
                cell += f", {value:+.1f} [{low:+.1f}, {high:+.1f}]"
            cells.append(cell)
        rows.append([times, *cells])
    return Table(["t", *names], rows).markdown()
