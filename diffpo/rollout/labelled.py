"""Trajectories that people have judged: the feed of `objective.rollout.labels`."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from ..common.errors import DiffpoError
from ..common.text import plain
from ..config import RolloutSettings
from ..data.cache import content_key
from ..problems import transitions
from ..problems.policy import Policy
from ..problems.regression import Regression
from ..problems.transitions import Step, StepGroup, sampler_steps, without_history
from .feed import visited
from .groups import Sampled, step_groups
from .labels import read_labels
from .prompts import PromptConditions


class Labelled:
    """A feed (train/feeds.py) of the judged pairs in the file ``labels``, each a pair of trajectories.

    Their steps are visited once in a random order before any is visited again.
    """

    def __init__(
        self,
        labels: Path,
        settings: RolloutSettings,
        conditions: PromptConditions,
        policy: Policy,
        seed: int,
        sampler: str | None = None,
    ) -> None:
        """``sampler``: what the policy starts from, as in `read_trajectories`."""
        self.labels, self.settings, self.conditions = labels, settings, conditions
        self.seed, self.device = seed, policy.device
        self.steps = sampler_steps(settings, policy.family.schedule(), policy.family.prediction)
        self.items = judged_steps(labels, settings, self.steps, conditions.prompts, sampler)
        self.hash = content_key([astuple(label) for label in read_labels(labels)])  # of people's verdicts

    def begin(self, step: int) -> dict[str, float]:
        return {}

    def regression(self, positions: Sequence[int]) -> Regression | None:
        if not self.items:
            return None
        condition = functools.partial(self.conditions, guidance=self.settings.guidance)
        return transitions.regression(visited(self.items, self.seed, 0, positions), condition, self.device)

    def state(self) -> dict[str, Any]:
        return {"labels": self.hash}

    def load(self, state: dict[str, Any]) -> None:
        """DiffpoError if the labels are not those of `state()`."""
        if state.get("labels", "") != self.hash:
            raise DiffpoError(
                f"objective.rollout.labels={self.labels}: the judged pairs are not those that the run "
                f"started with; choose another output folder"
            )


def judged_steps(
    labels: Path, settings: RolloutSettings, steps: Sequence[Step], prompts: Sequence[str], sampler: str | None = None
) -> list[StepGroup]:
    """The judged pairs of the file ``labels`` as pairs of steps of the trajectories beside it.

    ``prompts``: all that were judged; an item names its prompt by the place here. ``sampler``: see
    `read_trajectories`.

    Raises DiffpoError: a trajectory file is missing or damaged, or was sampled with other settings (steps would have
    another likelihood) or from another LoRA.
    """
    if not without_history(steps):
        raise DiffpoError(
            f"objective.rollout.step={settings.step} uses earlier outputs, which the files of trajectories lack: use a "
            f"solver without, such as ddim or flow_sde"
        )
    folder = labels.expanduser().parent
    index = {prompt: i for i, prompt in enumerate(prompts)}
    items: list[StepGroup] = []
    read = functools.lru_cache(maxsize=1)(lambda group: read_trajectories(folder, group, settings, sampler))
    for label in read_labels(labels):
        states = read(label.group)
        if max(label.chosen, label.rejected) >= len(states):
            raise DiffpoError(
                f"{labels} names image {max(label.chosen, label.rejected)} of {label.group}, but its "
                f"trajectory file holds {len(states)} images: correct that line"
            )
        pair = states[[label.chosen, label.rejected]]
        targets = torch.stack([_targets(own, steps) for own in pair])
        record = Sampled(0, index[label.prompt], pair, torch.empty(0, 0), targets=targets)
        items += step_groups(record, (0, 1), steps[: settings.transitions], label.preference)
    return items


def _targets(states: torch.Tensor, steps: Sequence[Step]) -> torch.Tensor:
    """Of one trajectory, as `Walker.walk` gives them."""
    each = zip(states[:-1], states[1:], steps, strict=True)
    return torch.stack(
        [step.transition.target(x, after) if step.transition.std else torch.zeros_like(x) for x, after, step in each]
    )


# settings of objective.rollout that decide a step's likelihood; LATER: what those were that older files lack
KEPT = ("steps", "eta", "guidance", "step", "step_options", "end")
LATER: dict[str, Any] = {"step_options": {}, "end": "clean"}


def kept(settings: RolloutSettings) -> dict[str, Any]:
    """The settings `KEPT`, without those that are as in older files, so that an older collection can go on."""
    found = {key: getattr(settings, key) for key in KEPT}
    return {key: value for key, value in found.items() if key not in LATER or value != LATER[key]}


def trajectory_file(folder: Path, group: str) -> Path:
    return folder / "trajectories" / f"{group}.safetensors"


def read_trajectories(folder: Path, group: str, settings: RolloutSettings, sampler: str | None = None) -> torch.Tensor:
    """(samples, steps + 1, C, h, w) as `diffpo collect` wrote them. ``sampler``: the hash of the LoRA that training
    starts from (`weights.trained.file_hash`), which must have sampled them; None: the base model. Files without a
    record of it are from before `collect` could use a LoRA."""
    from safetensors import SafetensorError, safe_open

    path = trajectory_file(folder, group)
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            about, made = (json.loads(header.get(key, "{}")) for key in ("rollout", "made"))
            states = file.get_tensor("states")
            if not isinstance(about, dict) or not isinstance(made, dict):
                raise ValueError("its header has no record of how it was sampled")
            about = LATER | about
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise DiffpoError(
            f"cannot read the trajectories {path}, which the labels name: {error}; run `diffpo collect` again"
        ) from None
    if made.get("lora") != sampler:
        found = (made.get("lora"), sampler)
        there, here = (f"the LoRA {plain(str(one)[:12])}" if one else "the base model" for one in found)
        raise DiffpoError(
            f"{path} was sampled from {there}, but training starts from {here}: set lora.start to what sampled "
            f"(null for the base model), or collect again with --lora. LoRAs are named by the sha256 of their file"
        )
    for key in KEPT:
        if about.get(key) != getattr(settings, key):
            raise DiffpoError(
                f"{path} was sampled with rollout.{key}={about.get(key)}, but objective.rollout.{key} is "
                f"{getattr(settings, key)}: set it to {about.get(key)}, or collect again"
            )
    return states
