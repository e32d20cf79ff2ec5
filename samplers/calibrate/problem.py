"""What a plan is fitted to: a model at one guidance scale, noises, and what a long solver makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..default import Choice, are_images, default_solver
from ..grid import Grid
from ..plan import Plan
from ..sample import build_plan
from ..schedule import Schedule

REFERENCE_CALLS = 40


@dataclass(frozen=True, eq=False)
class Batch:
    """Noises and the model that they go through.

    Attributes:
        model: `model(x, t)` with the conditioning of these samples and the guidance inside; t is the network's label.
        noise: (batch, *shape), the initial states, of standard deviation `schedule.init_scale`.
        target: (batch, *shape), the images or latents at sigma = 0 that `reference` makes of the noise.
    """

    model: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    noise: torch.Tensor
    target: torch.Tensor


@dataclass(frozen=True, eq=False)
class Problem:
    """What a calibration fits to and measures itself on.

    Attributes:
        schedule: the network's noise schedule.
        prediction: what the network returns (prediction.py).
        fitting: what the numbers are fitted to.
        heldout: noises and prompts that nothing is fitted to; at least one batch.
        guidance: the scale of classifier-free guidance inside the models of the batches; 1 is none.
    """

    schedule: Schedule
    prediction: str
    fitting: tuple[Batch, ...]
    heldout: tuple[Batch, ...]
    guidance: float = 1.0

    @property
    def images(self) -> bool:
        """Whether the states are images to `default_solver`."""
        return are_images(self.fitting[0].noise)

    def rule(self, calls: int) -> Choice:
        """What `default_solver` chooses here, to sigma = 0."""
        return default_solver(calls, self.guidance, self.schedule, "zero", self.images)


def reference(
    model: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noise: torch.Tensor,
    schedule: Schedule,
    prediction: str = "epsilon",
    calls: int = REFERENCE_CALLS,
    guidance: float = 1.0,
) -> torch.Tensor:
    """The state at sigma = 0 that a long solver reaches from the noise, with `calls` calls of the model.

    `guidance` is the scale inside the model, on which the default solver depends: with strong guidance high orders are
    unstable. The solver goes to the schedule's smallest noise level, and one step of DDIM from there to 0. The network
    is not defined in between, so that step is part of the problem.
    """
    rule: dict = {"guidance": guidance, "images": are_images(noise), "end": "t_end"}
    low = build_plan(schedule, None, calls - 1, prediction=prediction, **rule)
    last = Grid(schedule, times=[schedule.t_min], end="zero")
    with torch.no_grad():
        return build_plan(schedule, "ddim", 1, last, prediction).run(model, low.run(model, noise))


def errors(plan: Plan, batches: Sequence[Batch], prediction: str | None = None) -> np.ndarray:
    """Root mean square difference from the target, per sample: (number of samples,)."""
    found = []
    for batch in batches:
        with torch.no_grad():
            result = plan.run(batch.model, batch.noise, prediction=prediction)
        found.append(mean_squares(result - batch.target).sqrt())
    return torch.cat(found).cpu().numpy()


def mean_squares(gap: torch.Tensor) -> torch.Tensor:
    """The mean square of each sample, (batch,) float64."""
    return gap.double().flatten(1).square().mean(1)


def rms(values: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(values))))
