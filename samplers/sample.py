"""The functions of the package: `build_plan` and `sample`."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
import torch

from ._names import unknown
from .cfgpp import CFGPlusPlus
from .default import are_images, default_solver
from .grid import Grid, IntervalsError
from .plan import Plan
from .prediction import PREDICTIONS, Guidance
from .schedule import Schedule
from .solvers import SOLVERS, find_solver

_PLACING = ("end", "t_start", "t_end", "sigmas", "timesteps")  # of Grid's options, those that build_plan takes


def build_plan(
    schedule: Schedule,
    solver: str | Callable[..., Plan] | None = None,
    steps: int | None = None,
    grid: str | Grid | None = None,
    prediction: str = "epsilon",
    **options,
) -> Plan:
    """Compile (schedule, grid, solver) into a plan.

    Args:
        schedule: the network's noise schedule.
        solver: a name in `samplers.SOLVERS` or `samplers.solvers.ALIASES`, a path `package.module:attribute`, or any
            function `(grid, steps, **options) -> Plan`. None: what `default_solver` chooses, on its own grid unless one
            is named here.
        steps: number of model calls, whatever the solver. May be left out with `sigmas` or `timesteps`.
        grid: a name in `samplers.grid.GRIDS` or a `Grid`. None: the schedule's default.
        prediction: what the network returns: 'epsilon', 'sample', 'v_prediction', 'flow' or 'score'.
        options: the solver's own options, e.g. `order=3` for dpmpp or `eta=1.0` for ddim. Besides, for every solver:
            end, t_start, t_end, sigmas, timesteps: see `Grid`. A `Grid` object already has them.
            guidance: the guidance scale that the model will be used with (default 1), for `default_solver` only.
            images: whether states are images or latents of images (default False), for `default_solver` only.

    Raises:
        ValueError: an unknown name (with the nearest one), steps < 1, sigmas that are not monotone, or whatever else
            makes no plan.
    """
    guidance, images = options.pop("guidance", 1.0), options.pop("images", False)
    placed = {name: options.pop(name) for name in _PLACING if name in options}
    placed = {name: value for name, value in placed.items() if value is not None}
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a samplers.Schedule such as VPDiscrete(betas), got {schedule!r}")
    if prediction not in PREDICTIONS:
        raise unknown("prediction", prediction, PREDICTIONS)
    anywhere = grid is None and not placed.keys() - {"end"}
    if not isinstance(grid, Grid):
        grid = Grid(schedule, grid, **placed)
    elif placed:
        raise ValueError(f"a Grid object has its own {', '.join(_PLACING)}; leave out {', '.join(placed)}")
    elif not _same(schedule, grid.schedule, np.array([grid.t_start, grid.t_end])):
        raise ValueError(f"the grid is of another schedule ({type(grid.schedule).__name__}): pass grid.schedule")
    if steps is not None:
        calls = steps
    elif grid.given is not None:
        calls = len(grid.given) - 1
    else:
        raise ValueError("pass steps=, the number of model calls")
    if solver is None:
        if options:
            raise ValueError(f"{', '.join(options)}: options belong to a solver; name it with solver=")
        choice = default_solver(calls, guidance, schedule, grid.end, images)
        build, options = choice.solver, choice.options
        grid = choice.grid if anywhere and choice.grid is not None else grid
    else:
        build = solver if callable(solver) else find_solver(solver)
        check_options(build, options)
        _check_order(build, options, calls)
    plan = compiled(build, grid, steps, options)
    if steps not in (None, len(plan)):
        raise ValueError(
            f"solver {plan.name!r} cannot make exactly {steps} model calls here; it would make {len(plan)}"
        )
    return plan.for_prediction(prediction)


def check_options(build: Callable[..., Plan], options: dict) -> None:
    """That a solver has these options and that they are of the kind of their defaults: a switch, a name or a number.

    Raises:
        ValueError: an unknown option (with the nearest one), or a value of another kind or above a million.
    """
    name, parameters = name_of(build), inspect.signature(build).parameters
    known = list(parameters)[2:]
    for option in options:
        if option not in known and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise unknown(f"option of solver {name!r}", option, known)
    ours = getattr(build, "func", build) in SOLVERS.values()  # func: of an alias
    for option in options.keys() & parameters.keys() if ours else ():
        value, default = options[option], parameters[option].default
        if isinstance(value, tuple | list) and "tuple" in str(parameters[option].annotation):
            continue
        if isinstance(default, bool):
            good, what = isinstance(value, bool | np.bool_) or option == "as_published", "true or false"
        elif isinstance(default, str):
            good, what = isinstance(value, str), "a name"
        elif isinstance(default, int | float):
            number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
            good, what = number and (not abs(value) > 1e6 or value == default), "a number of at most a million"
        else:
            continue
        if not good:
            raise ValueError(f"option {option!r} of solver {name!r} must be {what}, got {value!r}")


def _check_order(build: Callable[..., Plan], options: dict, calls: int) -> None:
    """That there are as many calls as the solver's order."""
    name, parameters = name_of(build), inspect.signature(build).parameters
    for option in {"order", "predictor_order"} & parameters.keys():
        order = options.get(option, parameters[option].default)
        if isinstance(order, int) and isinstance(calls, int) and 0 < calls < order:
            raise ValueError(
                f"{name} of {option} {order} needs at least {order} model calls, got {calls}: "
                f"pass {option}={calls}, or more steps"
            )


def name_of(build: Callable[..., Plan]) -> str:
    """A solver's name in messages."""
    return getattr(build, "__name__", repr(build))


def _same(one: Schedule, other: Schedule, t: np.ndarray) -> bool:
    """Whether two schedules agree at the times t, in noise level and label."""
    return one is other or all(
        np.allclose(getattr(one, f)(t), getattr(other, f)(t), rtol=1e-9, atol=1e-9) for f in ("lam", "model_time")
    )


def compiled(build: Callable[..., Plan], grid: Grid, calls: int | None, options: dict) -> Plan:
    """The solver's plan of so many calls; None: of as many steps as the grid's given nodes make.

    Raises:
        ValueError: the solver makes no such plan, or no plan at all.
    """
    plan = _on_given(build, grid, options) if calls is None else build(grid, calls, **options)
    if not isinstance(plan, Plan):
        raise ValueError(f"solver {name_of(build)!r} returned {type(plan).__name__}, not a samplers.Plan")
    return plan


_MOST_CALLS_PER_STEP = 4


def _on_given(build: Callable[..., Plan], grid: Grid, options: dict) -> Plan:
    """The plan whose steps are the grid's given intervals, whatever number of calls a step costs.

    If several numbers of calls fit (single-step solvers that end with a lower order), the largest.
    """
    if grid.given is None:
        raise ValueError("the grid has no given nodes: pass the number of model calls")
    intervals = len(grid.given) - 1
    plan: Plan | None = None
    why: ValueError | None = None
    for calls in range(intervals, _MOST_CALLS_PER_STEP * intervals + 12):
        try:
            plan = build(grid, calls, **options)
        except IntervalsError as error:
            why = why or error
        except ValueError as error:  # a number of calls that the solver cannot make
            why = error if calls == intervals else why
    if plan is None:
        raise why or ValueError(f"solver {name_of(build)!r} makes no plan of {intervals} steps")
    return plan


def sample(
    model: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    *,
    schedule: Schedule,
    solver: str | Callable[..., Plan] | None = None,
    steps: int | None = None,
    **options,
) -> torch.Tensor:
    """Draw a sample: `build_plan` and `Plan.run` in one call.

    Args:
        model: any callable `model(x, t)`; t is the network's own label, e.g. 0 to 999 for Stable Diffusion, sigma for
            EDM.
        x: (batch, ...) initial state, noise of standard deviation `schedule.init_scale`.
        solver: None is `default_solver`'s choice for these steps, this guidance and schedule. States of (batch,
            channels, height, width) are images to it unless `images=False` is passed.
        steps: number of model calls; default 10, or as many as the given sigmas or timesteps make.
        options: of `Plan.run`: guidance (a `Guidance` or `CFGPlusPlus`), threshold, generator, noise, callback,
            check_finite. Of `build_plan`: grid, prediction, end, t_start, t_end, sigmas, timesteps and the solver's own
            options.

    Returns: the result, with x's shape, dtype and device.
    """
    running = {name: options.pop(name) for name in _RUNNING if name in options}
    grid, guidance = options.get("grid"), running.get("guidance")
    placed = isinstance(grid, Grid) and grid.given is not None
    if steps is None and not placed and options.get("sigmas") is None and options.get("timesteps") is None:
        steps = 10
    if solver is None and isinstance(guidance, CFGPlusPlus):
        raise ValueError("CFG++ has no default solver: name one that makes one call per step, such as solver='dpmpp'")
    scale = guidance.scale if isinstance(guidance, Guidance) else 1.0
    options.setdefault("images", are_images(x))
    return build_plan(schedule, solver, steps, guidance=scale, **options).run(model, x, **running)


_RUNNING = ("guidance", "threshold", "generator", "noise", "callback", "check_finite")  # of Plan.run's options
