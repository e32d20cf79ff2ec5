"""The continuous adjoint of the probability-flow ODE: gradients that need no state of the forward run at all.

AdjointDPM (Pan et al. 2023, arXiv 2307.10711) solves the ODE of the gradient backwards in time, together with the state
itself. In coordinates `y = x / c` in which the flow is dy/du = m (solvers/line.py), a = dL/dy and g = dL/dtheta follow

    da/du = -(dm/dy)^T a        dg/du = -(dm/dtheta)^T a        (their eq. 5 and 6)

With p = c a and q = c g these have the form of the flow itself, for a network that returns -(dm/dx)^T p and
-(dm/dtheta)^T p / c. So (x, p, q) is one larger state that any plan solves, with the exponential integrators' exact
treatment of the linear part, and the gradient has the solver's order. p = c^2 dL/dx.

Use `gradients.sample` unless memory forbids it: that gradient is exact, and this one has the error of both solves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ._names import unknown
from .grid import Nodes
from .plan import Plan, State, row
from .prediction import conversion, fitting
from .schedule import VPDiscrete
from .solvers.rungekutta import Tableau

Model = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def sample(
    plan: Plan,
    back: Plan,
    model: Model,
    x: torch.Tensor,
    parameters: Sequence[torch.Tensor] = (),
    as_published: bool = False,
) -> torch.Tensor:
    """`plan.run(model, x)`, whose gradient is computed by `back` from the result alone.

    Args:
        plan: a deterministic plan that ends at sigma > 0, for the model's own prediction.
        back: a plan from the end of `plan` to its start, of any solver, e.g. `build_plan(schedule, solver, steps,
            t_start=schedule.t_min, t_end=schedule.t_max, end="t_end")`. It calls the model len(back) times.
        model: `model(x, t)`, guidance inside, differentiable.
        x: (batch, ...) initial state.
        parameters: all tensors besides x whose gradient is wanted: conditioning, weights. The model may depend on more.
        as_published: the released code's backward solve in sigma / alpha, in which the state is put back to the one of
            the forward run after each step; both plans are `published_plan`'s. It keeps all states.

    Returns: the result, in x's dtype. Gradients of gradients are not available.

    Raises:
        ValueError: a stochastic plan, one that ends at sigma = 0, or a `back` that does not lead from its end to its
            start.
    """
    for each in (plan, back):
        if each.stochastic:
            raise ValueError(f"plan {each.name!r} adds noise, and the adjoint is that of the probability-flow ODE")
    if plan.sigma[-1] == 0:
        raise ValueError(
            "the network has no slope at sigma = 0: take a plan with end='t_end', then `ddim` for the rest"
        )
    if not np.allclose(back.t[[0, -1]], plan.t[[-1, 0]], rtol=1e-9, atol=1e-12):
        raise ValueError(
            f"back must lead from t = {plan.t[-1]:g} to {plan.t[0]:g}, not from {back.t[0]:g} to {back.t[-1]:g}"
        )
    return _Adjoint.apply((plan, back, model, as_published), x, *parameters)


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: tuple, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        plan, back, model, as_published = given
        states = [x]  # at the ends of the steps
        ends = plan._loop.same

        def keep(k: int, state: State) -> None:
            if ends[k]:
                states.append(state.input)

        result = plan.run(model, x, callback=keep if as_published else None)
        ctx.given, ctx.states = (plan, back, model), states[-2::-1] if as_published else None
        ctx.save_for_backward(result, *parameters)
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):
        plan, back, model = ctx.given
        x, *parameters = ctx.saved_tensors
        wanted = [p for p, needed in zip(parameters, ctx.needs_input_grad[2:], strict=True) if needed]
        found = _solve(plan.prediction, back, model, (x, grad, wanted), ctx.states)
        each = iter(found[1:])
        return None, found[0], *(next(each) if needed else None for needed in ctx.needs_input_grad[2:])


def _solve(prediction: str, back: Plan, model: Model, start: tuple, states: list | None) -> list[torch.Tensor]:
    """dL/dx and dL/dparameters at the end of `back`. states: what x is after each step, or None: what is solved."""
    x, grad, parameters = start
    kind = "flow" if states is None else "epsilon"  # the slope m, which decides c
    scale = back.alpha + back.sigma if states is None else back.alpha
    plan = back.for_prediction(kind)
    wide = torch.promote_types(x.dtype, torch.float32)
    sizes = [x.numel(), x.numel(), *(p.numel() for p in parameters)]
    packed = torch.cat([x.to(wide).flatten(), scale[0] ** 2 * grad.to(wide).flatten()])
    packed = torch.cat([packed, packed.new_zeros(sum(sizes[2:]))])
    state = plan.begin(packed[None])
    steps = iter(states or ())
    for k in range(len(plan)):
        at_x, p, *_ = state.input[0].split(sizes)
        at_x, p = at_x.view(x.shape).detach(), p.view(x.shape)
        label = torch.tensor(back.label[k], dtype=wide, device=x.device)
        of_x, of_output = conversion(prediction, kind, back.alpha[k], back.sigma[k])
        with torch.enable_grad():
            seen = at_x.to(x.dtype).requires_grad_()
            output = fitting(seen, model(seen, label), f"call {k}: the model returned")
        slope = of_x * at_x + of_output * output.detach().to(wide)
        wanted = (seen, *parameters)
        of_seen, *of_parameters = torch.autograd.grad(output, wanted, p.to(output.dtype), materialize_grads=True)
        changes = [slope.flatten(), -(of_x * p + of_output * of_seen.to(wide)).flatten()]
        changes += [-(of_output / scale[k]) * g.to(wide).flatten() for g in of_parameters]
        state = plan.step(k, state, torch.cat(changes)[None])
        if states is not None and plan._loop.same[k]:
            known = torch.cat([next(steps).to(wide).flatten(), state.input[0, x.numel() :]])[None]
            state = State(known, known, state.history)
    _, p, *rest = state.input[0].split(sizes)
    rest = [(g / scale[-1]).view(to.shape).to(to.dtype) for g, to in zip(rest, parameters, strict=True)]
    return [(p / scale[-1] ** 2).view(x.shape).to(x.dtype), *rest]


# -- the released code -------------------------------------------------------------------------------------------------

TABLEAUX = {
    "euler": Tableau((), (1.0,)),
    "rk4": Tableau(((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),  # the 3/8 rule
}


def published_plan(schedule: VPDiscrete, steps: int, method: str = "rk4", back: bool = False) -> Plan:
    """The plan of AdjointDPM's released code: `steps` - 1 intervals between labels that are equidistant.

    sigma / alpha is linear between the labels of the network. Inside a step it is rounded to the nearest end of the
    step, and the label with it, which costs 'rk4' its order.

    Args:
        method: 'euler' or 'rk4'.
        back: from data to noise.
    """
    if method not in TABLEAUX:
        raise unknown("method", method, TABLEAUX)
    top = len(schedule.betas) - 1
    label = np.linspace(0.0, top, steps)[:: 1 if back else -1]
    level = np.interp(label, np.arange(top + 1), schedule.noise_level(schedule.t_of_model_time(np.arange(top + 1))))
    alpha = 1.0 / np.sqrt(1.0 + level**2)
    nodes = Nodes(schedule.t_of_model_time(label), alpha, alpha * level, -np.log(level), label)
    tableau, calls, rows = TABLEAUX[method], [], []
    for i in range(steps - 1):
        at = [i, *(i + round(sum(a)) for a in tableau.a), i + 1]  # where each stage is, and the end
        for j, weights in enumerate((*tableau.a, tableau.b), start=1):
            increments = alpha[at[j]] * (level[i + 1] - level[i]) * np.array(weights[::-1])
            following = row(alpha[at[j]] / alpha[i], *increments)
            rows.append(following if j == len(at) - 1 else (following, row(1.0)))
        calls += at[:-1]
    return Plan.build(f"adjoint_dpm({method})", "epsilon", nodes.take([*calls, steps - 1]), rows)
