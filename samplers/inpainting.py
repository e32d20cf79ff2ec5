"""Inpainting by replacement: the known part of a sample is put back, with noise, at every call of a plan.

Song et al. 2021 (Score-SDE, arXiv 2011.13456, app. I.2), with the repetitions of RePaint (Lugmayr et al. 2022, arXiv
2201.09865, algorithm 1). It needs no training and works with any model, but it does not draw from the posterior: the
unknown part sees the known one only through its noisy copies. Repetitions lessen that. On a Gaussian of two dimensions
with correlation 0.8 (standard deviations 0.5, known number 1.4 standard deviations from its mean, 20 calls of `ddim`
with eta = 1), the mean of the unknown number moves by 57, 74, 89 and 94 % of what it should, and its variance is 1.10,
0.94, 0.83 and 0.79 times the posterior's, for 1, 2, 5 and 10 rounds. With 100 calls and 10 rounds it is 96 % and 0.97.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ._table import HISTORY
from .plan import Plan, State, randn
from .prediction import fitting


def inpaint(
    plan: Plan,
    model: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    known: torch.Tensor,
    *,
    rounds: int = 1,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> torch.Tensor:
    """A sample whose known part is `known` and whose rest is drawn to fit.

    Args:
        plan: from noise to data, one call per step. With more than one round also without history: `ddim` (best with
            eta=1), `euler`, `renoise`.
        model: `model(x, t)` as in `Plan.run`, guidance inside.
        x: (batch, ...) initial noise.
        known: x_0 where it is known and NaN elsewhere, x's shape.
        rounds: how often each step is made; after each but the last, noise is added to come back to the step's
            beginning. A step to sigma = 0 is made once: it draws nothing, so repeating it would shrink the variance.
        generator: of all noise, one, or one per sample.

    Returns: the result, in x's dtype. Of a plan that ends at sigma = 0, the known part is `known` itself.

    Raises:
        ValueError: `known` of another shape, rounds < 1, or a plan that is not as above.
    """
    _check(plan, x, known, rounds)
    wide = torch.promote_types(x.dtype, torch.float32)
    plan = plan.to(x.device, wide)
    alpha, sigma = plan.alpha.tolist(), plan.sigma.tolist()
    labels = torch.tensor(plan.label.tolist(), dtype=wide, device=x.device)
    known = known.to(x.device, wide)
    mask = ~known.isnan()

    def draw() -> torch.Tensor:
        return randn(x.shape, generator, x.device, wide)

    def put_back(value: torch.Tensor, history: tuple[torch.Tensor, ...], k: int) -> State:
        """The state before call k, with the known part at its noise level."""
        there = alpha[k] * known + sigma[k] * draw() if sigma[k] else known
        value = torch.where(mask, there, value)
        return State(value, value, history)

    state = put_back(plan.begin(x).input, (), 0)
    for k in range(len(plan)):
        for left in reversed(range(rounds if sigma[k + 1] else 1)):
            output = model(state.input.to(x.dtype), labels[k])
            output = fitting(state.input, output, f"call {k}: the model returned")
            after = plan.step(k, state, output, draw() if plan.needs_noise(k) else None)
            if left:
                keep = alpha[k] / alpha[k + 1]
                spread = math.sqrt(sigma[k] ** 2 - (keep * sigma[k + 1]) ** 2)
                state = put_back(keep * after.input + spread * draw(), state.history, k)
            else:
                state = put_back(after.input, after.history, k + 1)
    return state.input.to(x.dtype)


def _check(plan: Plan, x: torch.Tensor, known: torch.Tensor, rounds: int) -> None:
    if known.shape != x.shape:
        raise ValueError(f"known has shape {tuple(known.shape)}, and x has {tuple(x.shape)}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    starts = bool((plan.start[0] == plan.start[1]).all()) and len(plan.start) == 2 and not plan.start[0, 1]
    if not (starts and (plan.rows[:, 0] == plan.rows[:, 1]).all() and plan.t[0] > plan.t[-1]):
        raise ValueError(
            f"inpainting needs a plan from noise to data whose steps make one call each, such as ddim or dpmpp, not "
            f"{plan.name!r}"
        )
    if rounds > 1 and plan.rows.shape[2] > HISTORY + 1:
        raise ValueError(
            f"plan {plan.name!r} uses earlier outputs, which rounds make wrong: take rounds=1, or a solver of first "
            "order such as ddim with eta=1"
        )
