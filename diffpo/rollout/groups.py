"""Judged samples of a round -> groups, and these -> regression problems."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor

from .. import links
from ..common.rng import Draws
from ..config import ObjectiveSettings
from ..data.batches import Batches
from ..data.judgement import Judgement
from ..problems.forward import Forward
from ..problems.regression import Regression
from ..problems.transitions import Step, StepPair
from ..scorers.judge import pairs, standardised
from .prompts import PromptConditions
from .sampler import Forks


@dataclass(frozen=True)
class Sampled:
    """What was sampled for one prompt of a round.

    ``place``: in the round (self_play: since the start of training). ``prompt``: its index (self_play: that of the
    data's group). ``states`` (samples, k, C, h, w) float32 on the CPU, x_0 last; ``scores`` (samples, scorers) float64.
    A pool has ``forks`` instead of these two.
    """

    place: int
    prompt: int
    states: Tensor
    scores: Tensor
    forks: Forks | None = None


@dataclass(frozen=True)
class SampledGroup:
    """Finished images of one prompt: ``x_0`` of each, best first, (C, h, w), and their ``scores``."""

    prompt: int
    x_0: tuple[Tensor, ...]
    scores: tuple[float, ...] | None
    preference: float = 1.0


@dataclass(frozen=True)
class SelfPlay:
    """The reference's own image ``x_0`` for the group ``index`` of the data, read with the draws of ``position``."""

    index: int
    position: int
    x_0: Tensor


Item = StepPair | SampledGroup | SelfPlay
ItemT = TypeVar("ItemT", StepPair, SampledGroup, SelfPlay)


def all_are(items: Sequence[Item], kind: type[ItemT]) -> TypeGuard[Sequence[ItemT]]:
    """Are all ``items`` of this kind?"""
    return all(isinstance(item, kind) for item in items)


def harvest(
    records: Sequence[Sampled], settings: ObjectiveSettings, steps: Sequence[Step], names: Sequence[str]
) -> tuple[list[Item], dict[str, float]]:
    """The groups of a round, and its metrics.

    rollout/groups, and rollout/empty: 1 if there are none. rollout/ties: the share of comparisons (of two images, of a
    pool, of a prompt's images) without a winner. rollout/score, or rollout/score/NAME for each of several scorers: the
    mean over the images (pools: over the pairs).
    """
    items: list[Item] = []
    compared = decided = 0
    scores = []
    for record in records:
        if record.forks is not None:
            items += _of_forks(record.prompt, record.forks)
            compared, decided = compared + record.forks.pools, decided + record.forks.decided
            scores.append(record.forks.scores.reshape(-1, 1))
        elif settings.source == "self_play":
            items.append(SelfPlay(record.prompt, record.place, record.states[0, -1]))
            compared, decided = compared + 1, decided + 1
        elif settings.source == "trajectory":
            winners = pairs(record.scores)
            for winner, loser in winners:
                items += step_pairs(
                    record.prompt,
                    record.states[winner],
                    record.states[loser],
                    steps[: settings.rollout.transitions],
                    scores=_alone(record.scores, (winner, loser)),
                )
            samples = len(record.scores)
            compared, decided = compared + samples * (samples - 1) // 2, decided + len(winners)
            scores.append(record.scores)
        else:
            groups = list(_final(record, links.kind(settings.link)))
            items += groups
            compared, decided = compared + 1, decided + bool(groups)
            scores.append(record.scores)
    metrics = {"rollout/groups": float(len(items)), "rollout/empty": float(not items)}
    metrics["rollout/ties"] = 1 - decided / compared if compared else 0.0
    table = torch.cat(scores) if scores else torch.empty(0, 0)
    for name, column in zip(names, table.T if len(table) else (), strict=False):
        metrics["rollout/score" if len(names) == 1 else f"rollout/score/{name}"] = column.mean().item()
    return items, metrics


def step_pairs(
    prompt: int,
    chosen: Tensor,
    rejected: Tensor,
    steps: Sequence[Step],
    preference: float = 1.0,
    scores: tuple[float, ...] | None = None,
) -> Iterator[StepPair]:
    """Two trajectories (steps + 1, C, h, w) as a pair at each step that has noise."""
    for k, step in enumerate(steps):
        if step.transition.std:
            x, x_next = (chosen[k], rejected[k]), (chosen[k + 1], rejected[k + 1])
            yield StepPair(prompt, k, x, x_next, scores, preference)


def _of_forks(prompt: int, forks: Forks) -> Iterator[StepPair]:
    for (best, worst), k, scores in zip(forks.states, forks.steps, forks.scores.tolist(), strict=True):
        yield StepPair(prompt, k, (best[0], worst[0]), (best[1], worst[1]), tuple(scores))


def _final(record: Sampled, kind: str) -> Iterator[SampledGroup]:
    """A prompt's final images as its best against its worst, as single images with a liking, or as a ranked list.

    Several scorers: pairs are all those with Pareto dominance; lists and likings go by the mean of the standardised
    numbers. The liking is DiffusionNFT's (arXiv 2509.16117): clip(A / 5, -1, 1) / 2 + 1/2, A standardised within the
    prompt's images. Nothing where all images are equally good.
    """
    x_0, merit = record.states[:, -1], standardised(record.scores)
    if (record.scores == record.scores[0]).all():
        return
    if kind == "single":
        for i, advantage in enumerate(merit.tolist()):
            liked = min(1.0, max(-1.0, advantage / 5)) / 2 + 0.5
            yield SampledGroup(record.prompt, (x_0[i],), _alone(record.scores, (i,)), liked)
        return
    ranked = merit.argsort(descending=True, stable=True).tolist()
    chains = [tuple(ranked)]
    if kind == "pair":
        chains = pairs(record.scores) if record.scores.shape[1] > 1 else [(ranked[0], ranked[-1])]
    for chain in chains:
        yield SampledGroup(record.prompt, tuple(x_0[i] for i in chain), _alone(record.scores, chain))


def _alone(scores: Tensor, rows: Sequence[int]) -> tuple[float, ...] | None:
    """The scores of these images if there is one scorer. With several, a difference has no size."""
    return tuple(scores[list(rows), 0].tolist()) if scores.shape[1] == 1 else None


# ---- groups -> problems


def noised(
    groups: Sequence[SampledGroup], conditions: PromptConditions, forward: Forward, draws: Draws, device: torch.device
) -> Regression:
    """Groups of finished images with noise added."""
    members = len(groups[0].x_0)
    x_0 = torch.stack([group.x_0[member] for member in range(members) for group in groups]).to(device)
    cond = conditions([group.prompt for group in groups] * members).cond
    return forward.noised(x_0, cond, Judgement.of(groups, members, device), draws)


def against_itself(
    items: Sequence[SelfPlay], positions: Sequence[int], batches: Batches, forward: Forward
) -> Regression:
    """The data's (best) image against the reference's own for the same caption, with noise added."""
    data = batches.batch([item.index for item in items], [item.position for item in items])
    n, device = len(items), data.x_0.device
    x_0 = torch.cat([data.x_0[:n], torch.stack([item.x_0 for item in items]).to(device)])
    cond = {name: torch.cat([value[:n], value[:n]]) for name, value in data.cond.items()}
    draws = Draws(data.draws.seed, data.draws.purpose, positions)
    return forward.noised(x_0, cond, Judgement(torch.ones(n, device=device)), draws)
