"""Pictures while training: the same prompts and noise at every look, saved, scored and described (`log.samples`).

OUTPUT/samples/000100_00003.png     <step>_<number of the prompt>.png; the first look is before the first update
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from samplers import build_plan

from .. import scorers
from ..common.errors import DiffpoError
from ..common.files import write_atomic
from ..common.run_folder import SAMPLES
from ..common.text import plain
from ..common.worker import Worker
from ..config import SampleSettings
from ..data.batches import PIXELS
from ..data.cache import content_key
from ..evaluation import signals
from ..evaluation.generate import initial_noise
from ..evaluation.statistics import win_rate
from ..rollout.prompts import PromptConditions
from ..rollout.round import LATENTS
from ..scorers.step.base import pictures

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..problems.policy import Policy

SIDE = 32  # pixels of the pictures that are kept for distances


@dataclass(frozen=True)
class Look:
    """What one look saw of n pictures.

    ``scores`` and ``signals``: (n,) each, NaN where a score is missing; ``features`` (n, d) of `signals.features`.
    """

    step: int
    scores: dict[str, np.ndarray]
    signals: dict[str, np.ndarray]
    features: np.ndarray

    def state(self) -> dict[str, Any]:
        """For a checkpoint: numbers and tensors."""
        return {
            "step": self.step,
            "scores": {name: torch.from_numpy(values) for name, values in self.scores.items()},
            "signals": {name: torch.from_numpy(values) for name, values in self.signals.items()},
            "features": torch.from_numpy(self.features),
        }

    @classmethod
    def of(cls, state: dict[str, Any]) -> Look:
        """The look that gave this `state`."""
        arrays = {key: {name: value.numpy() for name, value in state[key].items()} for key in ("scores", "signals")}
        return cls(state["step"], features=state["features"].numpy(), **arrays)


class Samples:
    """Samples and scores by the settings. ``policy`` holds the bare network; every process does its share.

    Attributes:
        names: of the scores.
        base: the first look, which later ones are compared with; None before it.
        shown: the pictures of the last look, on the process that writes.
    """

    def __init__(self, settings: SampleSettings, conditions: PromptConditions, policy: Policy, worker: Worker) -> None:
        self.settings, self.conditions, self.policy, self.worker = settings, conditions, policy, worker
        family = policy.family
        self.shape = family.latent_shape(policy.network, conditions.resolution)
        # as the pipelines decide
        self.guidance = settings.guidance if settings.guidance > 1 and not family.guidance_is_input else 1.0
        try:
            rule: dict[str, Any] = {"guidance": self.guidance, "images": True}
            self.plan = build_plan(family.schedule(), None, settings.steps, prediction=family.prediction, **rule)
        except ValueError as error:
            raise DiffpoError(f"log.samples.steps={settings.steps}: {error}") from None
        self.scale = family.schedule().init_scale
        self.scorers = [scorers.load(spec, scorers.default_device(spec)) for spec in settings.scorers]
        self.names = [name for scorer in self.scorers for name in scorer.names]
        self.base: Look | None = None
        self.shown: list[Image] = []

    @torch.no_grad()
    def look(self, step: int, output: Path) -> Look:
        """Sample, save and score; collective."""
        mine = range(len(self.conditions.prompts))[self.worker.index :: self.worker.count]
        rows: list[tuple[int, Any, dict[str, float]]] = []
        _, height, width = self.shape
        side = width * self.policy.family.vae_factor()
        portion = max(1, min(LATENTS // (height * width), PIXELS // side**2))
        for start in range(0, len(mine), portion):
            indices = mine[start : start + portion]
            images = self._paint(indices)
            found = self._score(images, [self.conditions.prompts[index] for index in indices])
            rows += zip(indices, images, found, strict=True)
        rows = sorted(self.worker.gather(rows), key=lambda row: row[0])
        self.shown = [image for _, image, _ in rows]
        if not self.worker.quiet:
            _save(output / SAMPLES, step, self.shown)
        scores = {name: np.array([found[name] for _, _, found in rows]) for name in self.names}
        return Look(step, scores, signals.signals(self.shown), signals.features(self.shown, SIDE).astype(np.float32))

    def _paint(self, indices: Sequence[int]) -> list[Image]:
        """Noise is that of `diffpo eval` with seed 0."""
        policy, given = self.policy, self.conditions(indices, self.guidance)
        noise = torch.stack([initial_noise(self.shape, 0, index)[0] for index in indices]).to(policy.device)

        def model(x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            t = torch.as_tensor(label, dtype=torch.float32, device=x.device).expand(len(x))
            return policy.output(x, t, given).float()

        return pictures(policy.family.decode(self.plan.run(model, self.scale * noise)))

    def _score(self, images: list[Image], prompts: list[str]) -> list[dict[str, float]]:
        """NaN where a scorer gives no number; training goes on without it."""
        found: list[dict[str, float]] = [dict.fromkeys(self.names, float("nan")) for _ in images]
        for spec, scorer in zip(self.settings.scorers, self.scorers, strict=True):
            try:
                numbers = scorer.score(images, prompts)
            except DiffpoError as error:
                print(f"log.samples.scorers: no scores by {spec} at this look: {plain(error, 300)}", flush=True)
                continue
            for name in scorer.names:
                for row, value in zip(found, numbers[name], strict=True):
                    row[name] = float(value) if np.isfinite(value) else float("nan")
        return found

    def metrics(self, look: Look) -> dict[str, float]:
        """Of each score the mean, that of the first look, and the win rate over it; of each signal the mean."""
        assert self.base is not None  # noqa: S101 (`begin` comes first)
        found: dict[str, float] = {}
        for name, values in look.scores.items():
            first = self.base.scores[name]
            both = ~(np.isnan(values) | np.isnan(first))
            if both.any():
                now, before = values[both], first[both]
                rate = win_rate(before, now, np.flatnonzero(both)).value
                found |= {f"samples/{name}": float(now.mean()), f"samples/{name}/base": float(before.mean())}
                found[f"samples/{name}/win_rate"] = rate
        return found | {f"samples/{name}": float(values.mean()) for name, values in look.signals.items()}

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"key": self._key(), "base": self.base.state()} if self.base else {}

    def load(self, state: dict[str, Any]) -> bool:
        """Put `state` back, if it is of the same pictures; else the next look is the first one again."""
        same = state.get("key") == self._key()
        if same:
            self.base = Look.of(state["base"])
        return same

    def _key(self) -> str:
        """Of all that decides which pictures are sampled and what is measured."""
        settings = self.settings.model_dump(mode="json", include={"steps", "guidance", "scorers"})
        return content_key(self.conditions.prompts, self.shape, sorted(settings.items()), self.names)


def _save(folder: Path, step: int, images: Sequence[Image]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        buffer = BytesIO()
        image.save(buffer, "PNG")
        write_atomic(folder / f"{step:06d}_{index:05d}.png", buffer.getvalue())
