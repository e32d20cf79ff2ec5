"""The options of the diffusers plug-in: what a config means here, and how it goes to and from diffusers' own."""

from __future__ import annotations

import inspect
import typing

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin

from ._names import unknown
from .default import Choice, default_solver
from .grid import GRIDS, LABEL_GRIDS
from .prediction import PREDICTIONS
from .schedule import RectifiedFlow, Schedule, VPDiscrete, training_betas
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


def chosen_by_rule(config, calls: int, schedule: Schedule) -> Choice:
    """What `samplers.default_solver` says for a config that names no solver."""
    if config.solver_options:
        raise ValueError("solver_options belong to a solver: name it with solver=")
    return default_solver(calls, config.guidance, schedule, "zero" if config.final_sigmas_type == "zero" else "t_end")


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
    return Choice(build, None, options)


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


class PipelineConfig(SchedulerMixin, ConfigMixin):
    """The options of `SolverScheduler` (described there), checked, and what follows from them alone."""

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]  # noqa: RUF012
    fixed_solver: str | None = None
    fixed_options: dict = {}  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -float("inf"),
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        solver: str | None = None,
        grid: str | None = None,
        eta: float | None = None,
        as_published: bool = False,
        solver_options: dict | None = None,
        guidance: float = 5.0,
    ):
        self._setup()

    def __new__(cls, *args, **config):
        for name in config:
            if not name.startswith("_") and name not in cls._get_init_keys(cls):
                raise unknown(f"option of {cls.__name__}", name, cls._get_init_keys(cls) - {"self"})
        return super().__new__(cls)

    def __init_subclass__(cls, solver: str | None = None, **options):
        """A named scheduler: this `solver`, these options; everything else stays configurable."""
        super().__init_subclass__()
        if solver is None:
            return
        cls.fixed_solver, cls.fixed_options = solver, options

        def __init__(self, *args, **kwargs):
            self._setup()

        here = inspect.signature(PipelineConfig.__init__)
        named = [p.replace(default=solver) if p.name == "solver" else p for p in here.parameters.values()]
        __init__.__signature__ = here.replace(parameters=named)  # diffusers reads a class's options from it
        cls.__init__ = register_to_config(__init__)
        cls.__signature__ = signature_of(cls)

    def _setup(self) -> None:
        config = self.config
        if config.solver is not None and config.solver not in SOLVERS:
            raise unknown("solver", config.solver, SOLVERS)
        if self.fixed_solver not in (None, config.solver):
            raise ValueError(f"{type(self).__name__} is solver {self.fixed_solver!r}: use SolverScheduler for others")
        for name in config.solver_options or ():
            if name in self.fixed_options:
                raise ValueError(f"{type(self).__name__} fixes {name!r}: use SolverScheduler(solver={config.solver!r})")
        if config.solver is not None:
            chosen_by_name(config, self.fixed_options)  # a wrong option is an error now, not at the first image
        elif config.solver_options or config.eta is not None:
            raise ValueError("solver_options and eta belong to a solver: name it with solver=")
        if config.grid is not None and config.grid not in (*GRIDS, "config"):
            raise unknown("grid", config.grid, (*GRIDS, "config"))
        if self._network not in PREDICTIONS:
            kinds = ("epsilon", "sample", "v_prediction", "flow_prediction")
            raise unknown("prediction_type", config.prediction_type, kinds)
        if config.final_sigmas_type not in ("zero", "sigma_min"):
            raise unknown("final_sigmas_type", config.final_sigmas_type, ("zero", "sigma_min"))
        if config.timestep_spacing not in LABEL_GRIDS:
            raise unknown("timestep_spacing", config.timestep_spacing, LABEL_GRIDS)
        if sum(bool(config[flag]) for flag in SIGMA_FLAGS) > 1:
            raise ValueError(f"set at most one of {', '.join(SIGMA_FLAGS)}")
        n = config.num_train_timesteps
        if config.use_flow_sigmas:
            self.schedule: Schedule = RectifiedFlow(config.flow_shift, n)
        else:
            kind = config.beta_schedule if config.trained_betas is None else config.trained_betas
            betas = training_betas(kind, config.beta_start, config.beta_end, n, config.rescale_betas_zero_snr)
            self.schedule = VPDiscrete(betas)
            self.betas = torch.tensor(betas, dtype=torch.float32)
            self.alphas_cumprod = torch.cumprod(1.0 - torch.tensor(betas), 0).float()

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """As diffusers' `from_config`; understands FlowMatch configs (`shift`) too. An unknown option is an error."""
        for name in kwargs:
            if not name.startswith("_") and name not in ("dtype", "torch_dtype", *cls._get_init_keys(cls)):
                raise unknown(f"option of {cls.__name__}", name, cls._get_init_keys(cls) - {"self"})
        flow = {}
        if isinstance(config, dict):
            config, implied, flow = from_flow_match(config, cls._get_init_keys(cls))
            kwargs = {**implied, **kwargs}
            was = config.get("solver", cls.fixed_solver)
            said = None if "solver" in config.get("_use_default_values", ()) else was
            if kwargs.get("solver", cls.fixed_solver or said) != was:  # the options of another solver stay behind
                for name in ("solver", "solver_options", "eta", "as_published"):
                    config.pop(name, None)
            if config.get("solver_options") and cls.fixed_options:
                left = {name: v for name, v in config["solver_options"].items() if name not in cls.fixed_options}
                config["solver_options"] = left or None
        made = super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
        (made[0] if return_unused_kwargs else made).register_to_config(**flow)  # kept for the way back
        return made

    @property
    def _network(self) -> str:
        kind = self.config.prediction_type
        return "flow" if kind == "flow_prediction" else kind


def signature_of(cls) -> inspect.Signature:
    """What `help(cls)` shows, in place of __new__'s."""
    of_init = inspect.signature(cls.__init__)
    return of_init.replace(parameters=list(of_init.parameters.values())[1:])
