"""A round of on-policy sampling: prompts are sampled, their images judged and turned into problems.

Draws are addressed by (seed, round, place in the round), so that it does not matter which process samples a prompt nor
beside which others.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..common.errors import DiffpoError
from ..common.rng import Draws, generator, normal
from ..config import ObjectiveSettings
from ..data.batches import PIXELS, Batches
from ..data.groups import Groups
from ..data.order import order
from ..objective.reference import Behaviour, Reference
from ..problems import transitions
from ..problems.forward import Forward
from ..problems.policy import Policy
from ..problems.regression import Conditioning, Regression
from ..problems.transitions import StepGroup
from ..scorers.judge import Judge
from ..scorers.step.base import pictures
from ..scorers.step.load import load as load_step_scorer
from .groups import Item, Sampled, SampledGroup, SelfPlay, against_itself, all_are, noised
from .prompts import PromptConditions
from .sampler import Walker

LATENTS = 2**15  # latent pixels that go through the network at once: 8 rows of 64 x 64 (twice that with guidance)


class Rounds(ABC):
    """Samples rounds by the current policy, or by its reference where the settings say so (`by_reference`).

    Attributes:
        reference: what samples in place of the policy then, the reference or the behaviour policy.
        names: of the scores.
        crowd: samples of a prompt that are in memory at once.
    """

    names: Sequence[str] = ()
    crowd: int

    def __init__(
        self, settings: ObjectiveSettings, resolution: int, policy: Policy, reference: Reference | Behaviour, seed: int
    ):
        self.settings, self.rollout, self.resolution, self.seed = settings, settings.rollout, resolution, seed
        self.policy, self.reference, self.family, self.device = policy, reference, policy.family, policy.device
        self.walker = Walker(settings.rollout, policy.family)
        self.forward = Forward(policy.family, settings.forward)

    @abstractmethod
    def _sample(self, number: int, places: Sequence[int]) -> Iterator[Sampled]:
        """What is sampled at ``places`` of round ``number``, in their order."""

    @abstractmethod
    def regression(self, items: Sequence[Item], positions: Sequence[int]) -> Regression:
        """Groups that this kind of round gave as problems; ``positions`` address their draws."""

    def sample(self, number: int, places: Sequence[int], quiet: bool = False) -> list[Sampled]:
        """The prompts at ``places`` (of 0..prompts-1) of round ``number``; ``quiet``: no progress bar."""
        found: list[Sampled] = []
        with tqdm(total=len(places), desc="sampling", unit="prompt", leave=False, delay=5, disable=quiet) as bar:
            for part in self.portions(places):
                found += self._sample(number, part)
                bar.update(len(part))
        return found

    def portions(self, places: Sequence[int]) -> Iterator[Sequence[int]]:
        """``places`` in parts that fit into memory."""
        _, height, width = self._shape()
        portion = max(1, LATENTS // (height * width * self.crowd))
        for start in range(0, len(places), portion):
            yield places[start : start + portion]

    def _sampler(self) -> AbstractContextManager[Policy]:
        return self.reference.on() if by_reference(self.settings) else nullcontext(self.policy)

    def _draw(self, number: int, place: int, sample: int = 0) -> torch.Generator:
        return generator(self.seed, f"rollout {number} sample {sample}", place)

    def _shape(self) -> tuple[int, int, int]:
        return self.family.latent_shape(self.policy.network, self.resolution)


class PromptRounds(Rounds):
    """Rounds for the prompts of ``conditions``: all are visited once in a random order, then all again."""

    def __init__(
        self,
        settings: ObjectiveSettings,
        conditions: PromptConditions,
        policy: Policy,
        reference: Reference | Behaviour,
        seed: int,
    ) -> None:
        super().__init__(settings, conditions.resolution, policy, reference, seed)
        self.conditions = conditions

    def regression(self, items: Sequence[Item], positions: Sequence[int]) -> Regression:
        if all_are(items, SampledGroup):
            return noised(items, self.conditions, self.forward, Draws(self.seed, "train", positions), self.device)
        if all_are(items, StepGroup):
            condition = functools.partial(self.conditions, guidance=self.rollout.guidance)
            return transitions.regression(items, condition, self.device)
        raise TypeError("these are no groups of sampled images")

    def _prompt(self, number: int, place: int) -> int:
        return order(self.seed, len(self.conditions.prompts), number * self.rollout.prompts + place)


class ImageRounds(PromptRounds):
    """Sources `trajectory` and `samples`: several images of each prompt, which are judged when they are finished."""

    def __init__(
        self,
        settings: ObjectiveSettings,
        conditions: PromptConditions,
        policy: Policy,
        reference: Reference | Behaviour,
        seed: int,
    ) -> None:
        super().__init__(settings, conditions, policy, reference, seed)
        self.judge = Judge(settings.rollout.scorers, self.device)
        self.names, self.crowd = self.judge.names, settings.rollout.samples

    def trajectories(self, number: int, places: Sequence[int], prompts: Sequence[int]) -> Tensor:
        """The sampler's own for these prompts, (n, samples, steps + 1, C, h, w) float32 on the CPU."""
        return self._walk(number, places, prompts)[0]

    def _walk(self, number: int, places: Sequence[int], prompts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`trajectories`, and the targets of their steps, (n, samples, steps, C, h, w), empty for source samples."""
        samples = self.rollout.samples
        draws = [self._draw(number, place, j) for place in places for j in range(samples)]
        noise = normal(draws, self._shape())
        if self.rollout.same_noise:  # each has drawn its own nevertheless, so that later draws do not depend on this
            noise = noise[::samples].repeat_interleave(samples, 0)
        each = [prompt for prompt in prompts for _ in range(samples)]
        given = self.conditions(each, self.rollout.guidance)
        with self._sampler() as policy:
            on_steps = self.settings.source == "trajectory"
            walked = self.walker.walk(policy, noise.to(self.device), draws, given, number, on_steps)
        states, targets = walked
        shaped = targets.unflatten(0, (-1, samples)) if len(targets) else targets.expand(len(prompts), 0)
        return states.unflatten(0, (-1, samples)), shaped

    def _sample(self, number: int, places: Sequence[int]) -> Iterator[Sampled]:
        prompts = [self._prompt(number, place) for place in places]
        states, targets = self._walk(number, places, prompts)
        captions = [self.conditions.prompts[prompt] for prompt in prompts for _ in range(self.rollout.samples)]
        scores = self._judged(states[:, :, -1].flatten(0, 1), captions).unflatten(0, (len(places), -1))
        if self.settings.source == "samples":
            states = states[:, :, -1:].clone()
        for place, prompt, state, score, target in zip(places, prompts, states, scores, targets, strict=True):
            yield Sampled(place, prompt, state, score, targets=target)

    def _judged(self, x_0: Tensor, prompts: list[str]) -> Tensor:
        side = x_0.shape[-1] * self.family.vae_factor()
        images = []
        for part in x_0.split(max(1, PIXELS // side**2)):
            images += pictures(self.family.decode(part.to(self.device)))
        return self.judge.scores(images, prompts)


class PoolRounds(PromptRounds):
    """Source `pool`: the candidates for each next state are judged while an image is sampled (SPO, LPO)."""

    def __init__(
        self,
        settings: ObjectiveSettings,
        conditions: PromptConditions,
        policy: Policy,
        reference: Reference | Behaviour,
        seed: int,
    ) -> None:
        super().__init__(settings, conditions, policy, reference, seed)
        spec = settings.rollout.step_scorer
        assert spec is not None  # noqa: S101 (`ObjectiveSettings` requires it for this source)
        self.step_scorer = load_step_scorer(spec, policy.family, policy.network)
        self.names, self.crowd = [spec], settings.rollout.pool

    def _sample(self, number: int, places: Sequence[int]) -> Iterator[Sampled]:
        prompts = [self._prompt(number, place) for place in places]
        draws = [self._draw(number, place) for place in places]
        noise = normal(draws, self._shape()).to(self.device)
        captions = [self.conditions.prompts[prompt] for prompt in prompts]
        given = self.conditions(prompts, self.rollout.guidance)
        with self._sampler() as policy:
            found = self.walker.forks(policy, noise, draws, given, self.step_scorer, captions)
        for place, prompt, forks in zip(places, prompts, found, strict=True):
            yield Sampled(place, prompt, torch.empty(0), torch.empty(0), forks)


class SelfPlayRounds(Rounds):
    """Source `self_play`: one image by the reference for the caption of each group of ``batches``."""

    crowd = 1

    def __init__(
        self, settings: ObjectiveSettings, batches: Batches, policy: Policy, reference: Reference | Behaviour, seed: int
    ) -> None:
        super().__init__(settings, batches.data.resolution, policy, reference, seed)
        self.batches, self._groups = batches, worth_imitating(batches.groups)

    def _sample(self, number: int, places: Sequence[int]) -> Iterator[Sampled]:
        positions = [number * self.rollout.prompts + place for place in places]
        indices = [self._groups[order(self.seed, len(self._groups), position)] for position in positions]
        batch = self.batches.batch(indices, positions)
        cond = {name: value[: len(indices)] for name, value in batch.cond.items()}
        uncond = None if self.rollout.guidance == 1 else self.batches.unconditional(cond, indices)
        draws = [self._draw(number, place) for place in places]
        noise = normal(draws, batch.x_0.shape[1:]).to(self.device)
        with self._sampler() as policy:
            states = self.walker.trajectories(policy, noise, draws, Conditioning(cond, uncond, self.rollout.guidance))
        for index, position, state in zip(indices, positions, states[:, -1:].clone(), strict=True):
            yield Sampled(position, index, state[None], torch.empty(1, 0))

    def regression(self, items: Sequence[Item], positions: Sequence[int]) -> Regression:
        if all_are(items, SelfPlay):
            return against_itself(items, positions, self.batches, self.forward)
        raise TypeError("these are no groups of self_play")


def by_reference(settings: ObjectiveSettings) -> bool:
    """Does the reference (or the behaviour policy) sample, not the policy?"""
    return settings.source == "self_play" or settings.rollout.sampler != "policy"


def worth_imitating(groups: Groups) -> list[int]:
    """The groups whose first image self_play sets against its own: all pairs and lists, and the liked single images."""
    found = [i for i, group in enumerate(groups.groups) if groups.members > 1 or group.preference >= 0.5]
    if not found:
        raise DiffpoError(f"{groups.source} holds no liked image, but source self_play imitates liked images")
    return found
