"""Log-likelihoods by the probability-flow ODE, with any deterministic plan that runs from data to noise.

The flow carries a density with it (Chen et al. 2018, arXiv 1806.07366, theorem 1; Song et al. 2021, arXiv 2011.13456,
eq. 39). In coordinates `y = x / c` in which it is dy/du = m (solvers/line.py), the log of the volume that a unit of
volume becomes, l, follows

    dl/du = trace(dm/dy) = c trace(dm/dx)

So c l has the form of the flow itself, for a network that returns c trace(dm/dx). The plan that solves x solves it too,
with the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .plan import Plan, randn
from .prediction import conversion, fitting


class Density(NamedTuple):
    """Of `log_prob`, per sample.

    log_prob: (batch,) float64 on the CPU, in nats, of the whole sample.
    latent: the noise that the flow takes x to, x's shape; the same plan turned round leads back to x.
    """

    log_prob: torch.Tensor
    latent: torch.Tensor


def log_prob(
    plan: Plan,
    model: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    *,
    scale: float = 1.0,
    probes: int | None = 1,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Density:
    """The log density that the model gives to x, as a sample at the first time of the plan.

    At the plan's end the density is taken to be N(0, scale^2), from which sampling starts. The trace is exact, or that
    of Skilling and Hutchinson: the mean over random signs v of v (dm/dx) v, which are drawn once for all calls.

    Args:
        plan: from data to noise, e.g. `build_plan(schedule, "abm", steps, t_start=schedule.t_min,
            t_end=schedule.t_max, end="t_end")`. The model is called len(plan) times, and has `probes` backward passes
            for each call.
        model: `model(x, t)`, guidance inside, differentiable by x. Samples must not depend on each other.
        x: (batch, ...). Data are x_0; their density as x_t at `plan.t[0]` is that of data with the noise of this level.
        scale: standard deviation of the noise, `schedule.init_scale`.
        probes: random signs; the estimate is unbiased for every number. None: exact, one backward pass for each number
            of a sample.
        generator: of the signs, one, or one per sample.

    Raises:
        ValueError: a plan that adds noise, is no fixed table, has coefficients that vary over the sample, or does not
            run from data to noise; probes < 1.
        FloatingPointError: the density is not finite.
    """
    _check(plan, probes)
    flow = plan.for_prediction("flow")
    c = flow.alpha + flow.sigma
    state = flow.begin(x)
    volume = flow.begin(torch.zeros(len(x), dtype=torch.float64))
    labels = torch.tensor(flow.label.tolist(), dtype=state.input.dtype, device=x.device)
    signs = None if probes is None else _signs(x, probes, generator)
    for k in range(len(flow)):
        of_x, of_output = conversion(plan.prediction, "flow", flow.alpha[k], flow.sigma[k])
        with torch.enable_grad():
            seen = state.input.detach().to(x.dtype).requires_grad_()
            output = fitting(seen, model(seen, labels[k]), f"call {k}: the model returned")
        trace = of_x * seen[0].numel() + of_output * _trace(output, seen, signs)
        slope = of_x * state.input + of_output * output.detach().to(state.input.dtype)
        state = flow.step(k, state, slope)
        volume = flow.step(k, volume, c[k] * trace)
    change = volume.input / c[-1] + seen[0].numel() * math.log(c[-1] / c[0])  # of x, not of y
    z = state.input.double().cpu().flatten(1) / scale
    found = -0.5 * z.square().sum(1) - z.shape[1] * (math.log(scale) + 0.5 * math.log(2 * math.pi)) + change
    if not found.isfinite().all():
        raise FloatingPointError(f"the log density by plan {plan.name!r} is not finite")
    return Density(found, state.input.to(x.dtype))


def bits_per_dim(log_prob: torch.Tensor, numbers: int, levels: float = 127.5) -> torch.Tensor:
    """Bits for each number of a sample that was whole numbers divided by `levels`; 127.5: 0 to 255 as -1 to 1.

    Of data to which uniform noise of one level was added, it is an upper bound on average (Theis et al. 2016, arXiv
    1511.01844, sec. 3.1). For latents it is no measure of the pixels.

    Args:
        log_prob: in nats, of the whole sample. numbers: how many a sample has.
    """
    return -log_prob / (numbers * math.log(2.0)) + math.log2(levels)


def _signs(x: torch.Tensor, probes: int, generator) -> list[torch.Tensor]:
    """Random signs of x's shape and dtype."""
    normal = [randn(x.shape, generator, x.device, torch.float32) for _ in range(probes)]
    return [torch.where(each < 0, -1.0, 1.0).to(x.dtype) for each in normal]


def _trace(output: torch.Tensor, x: torch.Tensor, signs: list[torch.Tensor] | None) -> torch.Tensor:
    """The trace of d output / dx per sample, (batch,) float64 on the CPU; `signs` None: exact."""
    if signs is None:
        units = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).view(-1, 1, *x.shape[1:])
        parts = [_product(output, x, unit.expand_as(x)) for unit in units]
        return torch.stack(parts).sum(0)
    return torch.stack([_product(output, x, each) for each in signs]).mean(0)


def _product(output: torch.Tensor, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(output, x, v, retain_graph=True)
    return (gradient * v).double().flatten(1).sum(1).cpu()


def _check(plan: Plan, probes: int | None) -> None:
    if probes is not None and probes < 1:
        raise ValueError(f"probes must be at least 1, or None for the exact trace; got {probes}")
    if plan.stochastic:
        raise ValueError(f"plan {plan.name!r} adds noise, and the density is that of the probability-flow ODE")
    if type(plan) is not Plan or plan.rows.ndim > 3 or plan.reads.ndim > 2:
        raise ValueError(
            f"plan {plan.name!r} does not treat all numbers of a sample alike: take a solver that is one table of "
            "numbers, such as unipc or heun"
        )
    if not plan.t[0] < plan.t[-1]:
        raise ValueError(
            f"plan {plan.name!r} runs from t = {plan.t[0]:g} to {plan.t[-1]:g}, and the density needs one from data to "
            "noise: pass t_start=schedule.t_min, t_end=schedule.t_max and end='t_end' to build_plan"
        )
