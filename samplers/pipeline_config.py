"""What a diffusers config means here: which solver with which options, and FlowMatch configs."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable

from ._names import unknown
from .plan import Plan
from .schedule import Schedule
from .solvers import SOLVERS

SIGMA_FLAGS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "logsnr",  # uniform in log sigma is uniform in lambda
    "use_lu_lambdas": "logsnr",
    "use_beta_sigmas": "beta",
}
# The options that the diffusers scheduler of a family has too: our name -> the config's. Others are in solver_options.
_SHARED = {"order": "solver_order", "lower_order_final": "lower_order_final"}
SHARED = {
    "dpmpp": _SHARED | {"solver_type": "solver_type"},
    "singlestep": _SHARED | {"solver_type": "solver_type"},
    "unipc": _SHARED | {"variant": "solver_type"},
    "deis": _SHARED | {"variant": "solver_type"},
    "sa_solver": {"lower_order_final": "lower_order_final"},
}
_SOLVER_TYPES = ("midpoint", "heun", "bh1", "bh2", "logrho")  # of all families in diffusers

Choice = tuple[Callable[..., Plan], dict, str | None]  # a solver, its options, the grid that goes with them


def chosen_by_rule(config, calls: int, schedule: Schedule) -> Choice:
    """What `samplers.default_solver` says for a config that names no solver."""
    from .default import default_solver

    rule = default_solver(calls, config.guidance, schedule)
    return SOLVERS[rule.solver], dict(rule.options), rule.grid


def chosen_by_name(config, fixed: dict) -> Choice:
    """The solver that a config names and its options: the common ones, over them `fixed`, then `solver_options`.

    Raises:
        ValueError: an option that the solver does not have, with the nearest one that it has.
    """
    build = SOLVERS[config.solver]
    known = list(inspect.signature(build).parameters)[2:]
    options = {}
    for name, theirs in SHARED.get(config.solver, {}).items():
        allowed = typing.get_args(typing.get_type_hints(build).get(name)) or (config[theirs],)
        if name in known and (config[theirs] in allowed or config[theirs] not in _SOLVER_TYPES):
            options[name] = config[theirs]
    wished = {"eta": config.eta, "as_published": config.as_published or None}
    for name, value in wished.items():
        if value is not None:
            if name not in known:
                raise ValueError(f"solver {config.solver!r} has no option {name!r}")
            options[name] = value
    for name, value in {**fixed, **(config.solver_options or {})}.items():
        if name not in known:
            raise unknown(f"option of solver {config.solver!r}", name, known)
        options[name] = value
    return build, options, None


def from_flow_match(config: dict, ours) -> tuple[dict, dict, dict]:
    """A config that may be of a FlowMatch scheduler, known by its keys because a live config holds no class name.

    Returns: the config without what only FlowMatch schedulers know, what it implies here, and what was left out.

    Raises:
        ValueError: an EDM-preconditioned scheduler's config, or a FlowMatch option that is not supported.
    """
    if "sigma_data" in config and "beta_start" not in config:
        raise ValueError("this config is of an EDM-preconditioned scheduler: use samplers.sample with samplers.EDM")
    if "shift" not in config or "beta_start" in config:
        return dict(config), {}, {}
    for name in ("shift_terminal", "invert_sigmas", "stochastic_sampling"):
        if config.get(name):
            raise ValueError(f"a FlowMatch config with {name} is not supported: pass sigmas= to the pipeline")
    left = {name: value for name, value in config.items() if name not in ours and not name.startswith("_")}
    config = {name: value for name, value in config.items() if name not in left}
    implied = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": left["shift"]}
    return config, implied, left
