"""What a round teaches: judged samples -> groups of regression problems."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import links
from ..config import ObjectiveSettings
from ..data.batches import Batch
from ..problems.forward import Forward
from ..problems.regression import Regression
from ..problems.transitions import Step, Transition
from ..scorers.judge import pairs, standardised
from .sampler import Forks


@dataclass(frozen=True)
class Sampled:
    """What one prompt of a round gave. ``place`` in the round (self_play: since the start of training); ``prompt``, its
    index (self_play: of the data's group); ``states`` (samples, k, C, h, w) float32 on the CPU, x_0 last; ``scores``
    (samples, scorers) float64. Of a pool, ``forks`` instead."""

    place: int
    prompt: int
    states: Tensor
    scores: Tensor
    forks: Forks | None = None


@dataclass(frozen=True)
class Pictures:
    """A group to be noised: ``x_0`` of its members, best first, (C, h, w) each, and their ``scores``."""

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


Item = Transition | Pictures | SelfPlay


def harvest(
    records: Sequence[Sampled], settings: ObjectiveSettings, steps: Sequence[Step], names: Sequence[str]
) -> tuple[list[Item], dict[str, float]]:
    """The groups of a round, and its metrics: rollout/groups; rollout/ties, the share of comparisons (of two images, of
    a pool, of a prompt's images) without a winner; rollout/empty; rollout/score or rollout/score/NAME, the means of
    the images' scores (pools: of the pairs')."""
    items: list[Item] = []
    compared = decided = 0
    scores = []
    for record in records:
        if record.forks is not None:
            items += _of_forks(record)
            compared, decided = compared + record.forks.pools, decided + len(record.forks.steps)
            scores.append(record.forks.scores.reshape(-1, 1))
        elif settings.source == "self_play":
            items.append(SelfPlay(record.prompt, record.place, record.states[0, -1]))
            compared, decided = compared + 1, decided + 1
        elif settings.source == "trajectory":
            winners = pairs(record.scores)
            for winner, loser in winners:
                items += transitions(
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
            groups = list(_pictures(record, links.kind(settings.link)))
            items += groups
            compared, decided = compared + 1, decided + bool(groups)
            scores.append(record.scores)
    metrics = {"rollout/groups": float(len(items)), "rollout/empty": float(not items)}
    metrics["rollout/ties"] = 1 - decided / compared if compared else 0.0
    table = torch.cat(scores) if scores else torch.empty(0, 0)
    for name, column in zip(names, table.T if len(table) else (), strict=False):
        metrics["rollout/score" if len(names) == 1 else f"rollout/score/{name}"] = column.mean().item()
    return items, metrics


def transitions(
    prompt: int,
    chosen: Tensor,
    rejected: Tensor,
    steps: Sequence[Step],
    preference: float = 1.0,
    scores: tuple[float, ...] | None = None,
) -> Iterator[Transition]:
    """Two trajectories (steps + 1, C, h, w) as a pair at each step that has noise."""
    for k, step in enumerate(steps):
        if step.noise:
            x, x_next = (chosen[k], rejected[k]), (chosen[k + 1], rejected[k + 1])
            yield Transition(prompt, k, x, x_next, scores, preference)


def _of_forks(record: Sampled) -> Iterator[Transition]:
    forks = record.forks
    for (x, best, worst), k, scores in zip(forks.states, forks.steps, forks.scores.tolist(), strict=True):
        yield Transition(record.prompt, k, (x, x), (best, worst), tuple(scores))


def _pictures(record: Sampled, kind: str) -> Iterator[Pictures]:
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
            yield Pictures(record.prompt, (x_0[i],), _alone(record.scores, (i,)), liked)
        return
    ranked = merit.argsort(descending=True, stable=True).tolist()
    chains = [tuple(ranked)]
    if kind == "pair":
        chains = pairs(record.scores) if record.scores.shape[1] > 1 else [(ranked[0], ranked[-1])]
    for chain in chains:
        yield Pictures(record.prompt, tuple(x_0[i] for i in chain), _alone(record.scores, chain))


def _alone(scores: Tensor, rows: Sequence[int]) -> tuple[float, ...] | None:
    """The scores of these images, if there is a single scorer to speak of the size of a difference."""
    return tuple(scores[list(rows), 0].tolist()) if scores.shape[1] == 1 else None


# ---- groups -> problems


def noised(
    items: Sequence[Pictures], positions: Sequence[int], conditions: Any, forward: Forward, seed: int, device: Any
) -> Regression:
    """Groups of pictures with noise added: the draws are addressed by ``positions``, those of the training."""
    members = len(items[0].x_0)
    prompts = [item.prompt for item in items]
    scores = None
    if items[0].scores is not None:
        scores = torch.tensor([item.scores for item in items], device=device).T
    batch = Batch(
        x_0=torch.stack([item.x_0[member] for member in range(members) for item in items]).to(device),
        cond=conditions(prompts * members)[0],
        members=members,
        preference=torch.tensor([item.preference for item in items], device=device),
        scores=scores,
        indices=prompts,
        seed=seed,
        purpose="train",
        positions=list(positions),
    )
    return forward(batch)


def against_itself(items: Sequence[SelfPlay], positions: Sequence[int], batches: Any, forward: Forward) -> Regression:
    """The data's (best) image against the reference's own for the same caption, with noise added."""
    data = batches.batch([item.index for item in items], [item.position for item in items])
    n, device = len(items), data.x_0.device
    batch = Batch(
        x_0=torch.cat([data.x_0[:n], torch.stack([item.x_0 for item in items]).to(device)]),
        cond={name: torch.cat([value[:n], value[:n]]) for name, value in data.cond.items()},
        members=2,
        preference=torch.ones(n, device=device),
        scores=None,
        indices=data.indices,
        seed=data.seed,
        purpose=data.purpose,
        positions=list(positions),
    )
    return forward(batch)
