"""Judged samples of a round -> groups, and these -> regression problems."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor

from .. import links
from ..common.rng import Draws
from ..config import ObjectiveSettings, RolloutSettings
from ..data.batches import Batches
from ..data.judgement import Judgement
from ..problems.forward import Forward
from ..problems.regression import Regression
from ..problems.transitions import Step, StepGroup
from ..scorers.judge import advantages, pairs, standardised
from .prompts import PromptConditions
from .sampler import Forks


@dataclass(frozen=True)
class Sampled:
    """What was sampled for one prompt of a round.

    ``place``: in the round (self_play: since the start of training). ``prompt``: its index (self_play: that of the
    data's group). ``states`` (samples, k, C, h, w) float32 on the CPU, x_0 last; ``scores`` (samples, scorers) float64.
    ``targets`` (samples, steps, C, h, w): of a trajectory's steps, see `Walker.walk`. A pool has ``forks`` instead.
    """

    place: int
    prompt: int
    states: Tensor
    scores: Tensor
    forks: Forks | None = None
    targets: Tensor | None = None

    @property
    def spread(self) -> float:
        """The smallest standard deviation of its scores, over the scorers that tell its images apart; 0 if none do."""
        differs = (self.scores != self.scores[0]).any(0)  # a mean of equal numbers may be off by rounding
        return self.scores[:, differs].std(0, correction=0).min().item() if differs.any() else 0.0


@dataclass(frozen=True)
class SampledGroup:
    """Finished images of one prompt: ``x_0`` of each, best first, (C, h, w), their ``scores`` and ``advantages``."""

    prompt: int
    x_0: tuple[Tensor, ...]
    scores: tuple[float, ...] | None
    preference: float = 1.0
    advantages: tuple[float, ...] | None = None


@dataclass(frozen=True)
class SelfPlay:
    """The reference's own image ``x_0`` for the group ``index`` of the data, read with the draws of ``position``."""

    index: int
    position: int
    x_0: Tensor


Item = StepGroup | SampledGroup | SelfPlay
ItemT = TypeVar("ItemT", StepGroup, SampledGroup, SelfPlay)


def all_are(items: Sequence[Item], kind: type[ItemT]) -> TypeGuard[Sequence[ItemT]]:
    """Are all ``items`` of this kind?"""
    return all(isinstance(item, kind) for item in items)


def harvest(
    records: Sequence[Sampled], settings: ObjectiveSettings, steps: Sequence[Step], names: Sequence[str]
) -> tuple[list[Item], dict[str, float]]:
    """The groups of a round, and its metrics. ``steps``: of the round's sampler, for the sources that train on them.

    rollout/groups, and rollout/empty: 1 if there are none. rollout/ties: the share of comparisons (of two images, of a
    pool, of a prompt's images) without a winner. rollout/score, or rollout/score/NAME for each of several scorers: the
    mean over the images (pools: over the pairs).
    """
    items: list[Item] = []
    compared = decided = 0
    signed = _advantages(records, settings)
    for record, merits in zip(records, signed, strict=True):
        if record.forks is not None:
            items += _of_forks(record.prompt, record.forks, steps)
            compared, decided = compared + record.forks.pools, decided + record.forks.decided
        elif settings.source == "self_play":
            items.append(SelfPlay(record.prompt, record.place, record.states[0, -1]))
            compared, decided = compared + 1, decided + 1
        elif settings.source == "trajectory" and not settings.single_steps:
            kept = _kept(merits, settings.rollout)
            winners = [pair for pair in pairs(record.scores) if set(pair) <= set(kept)]
            for pair in winners:
                items += step_groups(record, pair, steps[: settings.rollout.transitions])
            samples = len(kept)
            compared, decided = compared + samples * (samples - 1) // 2, decided + len(winners)
        else:
            groups: list[Item] = []
            if record.spread > settings.rollout.min_spread:
                groups = list(_rated(record, merits, settings, steps))
            items += groups
            compared, decided = compared + 1, decided + bool(groups)
    scores = [each.scores if each.forks is None else each.forks.scores.reshape(-1, 1) for each in records]
    metrics = {"rollout/groups": float(len(items)), "rollout/empty": float(not items)}
    metrics["rollout/ties"] = 1 - decided / compared if compared else 0.0
    table = torch.cat(scores) if scores and settings.source != "self_play" else torch.empty(0, 0)
    for name, column in zip(names, table.T if len(table) else (), strict=False):
        metrics["rollout/score" if len(names) == 1 else f"rollout/score/{name}"] = column.mean().item()
    return items, metrics


def _advantages(records: Sequence[Sampled], settings: ObjectiveSettings) -> list[Tensor]:
    """(samples,) signed advantages of each record; empty where the source has no scores of images."""
    if settings.source not in ("trajectory", "samples"):
        return [torch.empty(0)] * len(records)
    return advantages([record.scores for record in records], settings.rollout.advantages)


def step_groups(
    record: Sampled,
    members: Sequence[int],
    steps: Sequence[Step],
    preference: float = 1.0,
    merits: tuple[float, ...] | None = None,
) -> Iterator[StepGroup]:
    """The images ``members`` of a prompt as a group at each step that has noise."""
    assert record.targets is not None  # noqa: S101 (trajectories have them)
    chosen = list(members)
    scores = _alone(record.scores, chosen) if len(record.scores) else None
    for k, step in enumerate(steps):
        if step.transition.std:
            x, target = tuple(record.states[chosen, k]), tuple(record.targets[chosen, k])
            yield StepGroup(record.prompt, step, x, target, scores, preference, merits)


def _of_forks(prompt: int, forks: Forks, steps: Sequence[Step]) -> Iterator[StepGroup]:
    for (best, worst), k, scores in zip(forks.states, forks.steps, forks.scores.tolist(), strict=True):
        target = tuple(steps[k].transition.target(x, after) for x, after in (best, worst))
        yield StepGroup(prompt, steps[k], (best[0], worst[0]), target, tuple(scores))


def _kept(merits: Tensor, rollout: RolloutSettings) -> list[int]:
    """The images of a prompt that are trained on, best first, by their advantages: all, or `rollout.keep` of them."""
    ranked: list[int] = merits.argsort(descending=True, stable=True).tolist()
    if rollout.keep is None or rollout.keep >= len(ranked):
        return ranked
    best = (rollout.keep + 1) // 2
    return ranked[:best] + ranked[best - rollout.keep :]


def _rated(record: Sampled, merits: Tensor, settings: ObjectiveSettings, steps: Sequence[Step]) -> Iterator[Item]:
    """A prompt's images, of which `rollout.keep` are kept: each step of each image, or the finished images
    (`_final`)."""
    rollout = settings.rollout
    kept = _kept(merits, rollout)
    if not settings.single_steps:
        yield from _final(record, merits, kept, settings)
        return
    for i in kept:
        merit = merits[i].item()
        yield from step_groups(record, (i,), steps[: rollout.transitions], float(merit > 0), (merit,))


def _final(record: Sampled, merits: Tensor, kept: list[int], settings: ObjectiveSettings) -> Iterator[SampledGroup]:
    """The images ``kept``, best first, as best against worst, as single images with a liking, or as a ranked list.

    Several scorers: pairs are all those with Pareto dominance; lists and likings go by the mean of the standardised
    numbers. The liking is DiffusionNFT's (arXiv 2509.16117): clip(A / 5, -1, 1) / 2 + 1/2, where 5 is
    rollout.advantages.limit.
    """
    x_0, kind = record.states[:, -1], links.kind(settings.link)
    if kind == "single":
        for i in sorted(kept):
            merit = merits[i].item()
            liked = merit / settings.rollout.advantages.limit / 2 + 0.5
            yield SampledGroup(record.prompt, (x_0[i],), _alone(record.scores, (i,)), liked, (merit,))
        return
    ranked = standardised(record.scores).argsort(descending=True, stable=True).tolist()
    chains = [tuple(i for i in ranked if i in kept)]
    if kind == "pair":
        chains = pairs(record.scores) if record.scores.shape[1] > 1 else [(ranked[0], ranked[-1])]
    for chain in chains:
        order = tuple(merits[list(chain)].tolist())
        yield SampledGroup(record.prompt, tuple(x_0[i] for i in chain), _alone(record.scores, chain), 1.0, order)


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
    return forward.noised(
        x_0, cond, Judgement.of(groups, members, device, [group.advantages for group in groups]), draws
    )


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
