"""On-policy training: every so many updates the policy samples a round, which is judged and trained on."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from ..common.errors import DiffpoError
from ..common.rng import generator
from ..config import ObjectiveSettings, RolloutSettings
from ..data.cache import content_key
from ..problems import transitions as trajectory
from ..problems.forward import Forward
from ..problems.regression import Regression
from ..problems.transitions import Transition, sampler_steps
from ..weights import trained
from .groups import Item, against_itself, harvest, noised, transitions
from .labels import read_labels
from .round import Rounds, by_reference


class OnPolicy:
    """A feed (train/feeds.py) of the policy's own samples: a round lasts for ``rollout.updates`` updates.

    Round r belongs to updates r * updates .. and all its groups are visited once before any is visited again. Groups
    are the same on all processes, whoever sampled them. After a resume the round is sampled again by the weights that
    it was sampled by. With ``rollout.labels`` there is one round for ever: the trajectories that people have judged.
    """

    def __init__(
        self,
        settings: ObjectiveSettings,
        conditions: Any,
        batches: Any,
        family: Any,
        network: torch.nn.Module,
        reference: Any,
        seed: int,
        accelerator: Any,
        per_update: int,
    ) -> None:
        self.settings, self.seed, self.accelerator = settings, seed, accelerator
        self.conditions, self.batches, self.network, self.reference = conditions, batches, network, reference
        self.device = next(network.parameters()).device
        self.forward = Forward(family, settings.forward)
        self.groups_per_round = per_update * settings.rollout.updates
        self.items: list[Item] = []
        self.round: int | None = None
        self.labels = ""  # a hash of people's verdicts
        self._step = -1
        self._start: dict[str, Any] = {}  # what sampled the round
        if settings.rollout.labels is not None:
            self.rounds = None
            self.steps = sampler_steps(settings.rollout, family.schedule(), family.prediction)
            self.items = labelled(settings.rollout, self.steps, conditions.prompts)
            self.labels = content_key([astuple(label) for label in read_labels(settings.rollout.labels)])
        else:
            self.rounds = Rounds(settings, conditions, batches, family, network, reference, seed, accelerator.autocast)
            self.steps = self.rounds.walker.steps

    def begin(self, step: int) -> dict[str, float]:
        self._step = step
        number = step // self.settings.rollout.updates
        if self.rounds is None or number == self.round:
            return {}
        self._start = {"policy": _copy(trained.of(self.network).state())}
        if by_reference(self.settings):
            self._start["reference"] = _copy(self.reference.state())
        return self._fill(number)

    def _fill(self, number: int) -> dict[str, float]:
        """Sample round ``number``; collective."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        places = range(process, self.settings.rollout.prompts, processes)
        share = self.rounds.sample(number, places, quiet=not self.accelerator.is_main_process)
        records = sorted(self._gather(share), key=lambda record: record.place)
        names = self.rounds.judge.names or ([self.settings.rollout.step_scorer] if self.rounds.step_scorer else [])
        self.items, metrics = harvest(records, self.settings, self.steps, names)
        self.round = number
        return metrics

    def _gather(self, share: list) -> list:
        if self.accelerator.num_processes == 1:
            return share
        from accelerate.utils import gather_object

        return gather_object(share)

    def regression(self, positions: Sequence[int]) -> Regression | None:
        if not self.items:
            return None
        number = 0 if self.round is None else self.round
        places = [position if self.rounds is None else position % self.groups_per_round for position in positions]
        items = [self.items[_visit(self.seed, number, len(self.items), place)] for place in places]
        if self.settings.source == "self_play":
            return against_itself(items, positions, self.batches, self.forward)
        if self.settings.source == "samples":
            return noised(items, positions, self.conditions, self.forward, self.seed, self.device)
        guidance = self.settings.rollout.guidance
        return trajectory.regression(items, self.steps, self.conditions, guidance, self.device)

    def state(self) -> dict[str, Any]:
        """What it takes to sample the round again, unless it is over."""
        if self.labels:
            return {"labels": self.labels}
        if self.round is None or (self._step + 1) // self.settings.rollout.updates != self.round:
            return {}
        return {"round": self.round, **self._start}

    def load(self, state: dict[str, Any]) -> None:
        """Put `state()` back, after policy and reference; collective. DiffpoError if the labels are other ones."""
        if state.get("labels", "") != self.labels:
            raise DiffpoError(
                f"objective.rollout.labels={self.settings.rollout.labels}: the judged pairs are not those that the run "
                f"started with; choose another output folder"
            )
        if "round" not in state:
            return
        self._start = {name: weights for name, weights in state.items() if name != "round"}
        with self._as_then():
            self._fill(state["round"])

    @contextlib.contextmanager
    def _as_then(self) -> Iterator[None]:
        """Policy (and reference, where it samples) with the weights that sampled the round."""
        now, now_reference = _copy(trained.of(self.network).state()), _copy(self.reference.state())
        try:
            trained.of(self.network).set_state(self._start["policy"])
            if "reference" in self._start:
                self.reference.load(self._start["reference"])
            yield
        finally:
            trained.of(self.network).set_state(now)
            if "reference" in self._start:
                self.reference.load(now_reference)


def labelled(settings: RolloutSettings, steps: Sequence[trajectory.Step], prompts: Sequence[str]) -> list[Transition]:
    """The judged pairs of ``settings.labels`` as transitions of the trajectories beside it.

    ``prompts``: those that conditions are at hand for. Raises DiffpoError: a trajectory file that is missing, damaged,
    or was sampled with other settings (the likelihood of a step would be another one).
    """
    folder = Path(settings.labels).expanduser().parent
    index = {prompt: i for i, prompt in enumerate(prompts)}
    items: list[Transition] = []
    read = functools.lru_cache(maxsize=1)(lambda group: read_trajectories(folder, group, settings))
    for label in read_labels(settings.labels):
        states = read(label.group)
        if max(label.chosen, label.rejected) >= len(states):
            raise DiffpoError(
                f"{settings.labels} names image {max(label.chosen, label.rejected)} of {label.group}, "
                f"and its trajectory file holds {len(states)}"
            )
        pair = states[label.chosen], states[label.rejected]
        items += transitions(index[label.prompt], *pair, steps[: settings.transitions], label.preference)
    return items


KEPT = ("steps", "eta", "guidance", "step")  # settings of objective.rollout that decide a step's likelihood


def trajectory_file(folder: Path, group: str) -> Path:
    return folder / "trajectories" / f"{group}.safetensors"


def read_trajectories(folder: Path, group: str, settings: RolloutSettings) -> torch.Tensor:
    """(samples, steps + 1, C, h, w) as `diffpo collect` wrote them."""
    from safetensors import SafetensorError, safe_open

    path = trajectory_file(folder, group)
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("rollout", "{}"))
            states = file.get_tensor("states")
            if not isinstance(about, dict):
                raise ValueError("its header does not say how it was sampled")
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise DiffpoError(f"cannot read the trajectories {path} that the labels speak of: {error}") from None
    for key in KEPT:
        if about.get(key) != getattr(settings, key):
            raise DiffpoError(
                f"{path} was sampled with rollout.{key}={about.get(key)}, and objective.rollout.{key} is "
                f"{getattr(settings, key)}: set it to {about.get(key)}, or collect again"
            )
    return states


def _copy(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone() for name, value in state.items()}


def _visit(seed: int, number: int, size: int, place: int) -> int:
    """Which of ``size`` groups is visited at ``place`` of round ``number``: all once in a random order, then again."""
    turn, place = divmod(place, size)
    return _permutation(seed, number, size, turn)[place]


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, number: int, size: int, turn: int) -> list[int]:
    return torch.randperm(size, generator=generator(seed, f"rollout {number} order", turn)).tolist()
