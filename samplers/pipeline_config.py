"""The options of the diffusers plug-in: their meaning, and configs to and from diffusers' schedulers."""

from __future__ import annotations

import inspect
import typing

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin

from ._files import write_whole
from ._names import unknown
from .default import Choice, default_solver
from .foreign import PROCESS, read
from .grid import GRIDS, LABEL_GRIDS
from .pipeline_check import check
from .pipeline_plan import OF_PLAN, OwnLevels, compare, from_text
from .plan import Plan
from .prediction import BLIND, PREDICTIONS, blind
from .sample import check_options
from .schedule import RectifiedFlow, Schedule, VPDiscrete, training_betas
from .solvers import find_solver

# Options that the diffusers scheduler of a family has too: our name -> the config's. Others are in solver_options.
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
    """The choice of `samplers.default_solver` for a config that names no solver."""
    if config.solver_options:
        raise ValueError("solver_options belong to a solver: name it with solver=")
    end = "zero" if config.final_sigmas_type == "zero" else "t_end"
    return default_solver(calls, config.guidance, schedule, end, images=True)


def chosen_by_name(config, fixed: dict) -> Choice:
    """The solver that a config names, and its options: the common ones, then `fixed`, then `solver_options`. Later ones
    override earlier ones.

    Raises:
        ValueError: an unknown solver, or an option that it does not have (with the nearest one that it has).
    """
    build = find_solver(config.solver)
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
    options |= {**fixed, **(config.solver_options or {})}
    check_options(build, options)
    return Choice(build, None, options)


class PipelineConfig(SchedulerMixin, ConfigMixin):
    """The options of `SolverScheduler` (described there) with their checks, and the schedule that follows from them."""

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
        shift_terminal: float | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        solver: str | None = None,
        grid: str | None = None,
        eta: float | None = None,
        as_published: bool = False,
        solver_options: dict | None = None,
        guidance: float = 5.0,
        plan: str | None = None,
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
        __init__.__signature__ = here.replace(parameters=named)  # type: ignore[attr-defined]  # diffusers reads it
        cls.__init__ = register_to_config(__init__)  # type: ignore[method-assign]
        cls.__signature__ = signature_of(cls)

    def _setup(self) -> None:
        config = self.config
        check(config)
        if unset := config.get("_use_default_values"):  # other classes would use their own defaults for these
            self.register_to_config(_use_default_values=[name for name in sorted(unset) if name not in PROCESS])
        if self.fixed_solver not in (None, config.solver):
            raise ValueError(
                f"{type(self).__name__} has the solver {self.fixed_solver!r}, not {config.solver!r}: use "
                "SolverScheduler"
            )
        for name in config.solver_options or ():
            if name in self.fixed_options:
                raise ValueError(f"{type(self).__name__} fixes {name!r}: use SolverScheduler(solver={config.solver!r})")
        self.fitted = self._fitted()
        if config.solver is not None:
            chosen_by_name(config, self.fixed_options)  # so that a wrong option is an error before the first image
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
        n = config.num_train_timesteps
        if config.use_flow_sigmas:
            self.schedule: Schedule = RectifiedFlow(config.flow_shift, n)
        elif config.beta_schedule == OF_PLAN and self.fitted is not None:
            self.schedule = OwnLevels(self.fitted)
        else:
            kind = config.beta_schedule if config.trained_betas is None else config.trained_betas
            betas = training_betas(kind, config.beta_start, config.beta_end, n, config.rescale_betas_zero_snr)
            self.schedule = VPDiscrete(betas)
            self.betas = torch.tensor(betas, dtype=torch.float32)
            self.alphas_cumprod = torch.cumprod(1.0 - torch.tensor(betas), 0).float()
            if config.rescale_betas_zero_snr and config.lambda_min_clipped == -np.inf:
                self._require_x0(float(self.schedule.alpha(1.0)))
        if self.fitted is not None:
            compare(self.fitted, self.schedule, self._network)

    def _fitted(self) -> Plan | None:
        """The plan in the config, which then chooses everything that a solver and a grid would."""
        config = self.config
        if config.plan is None:
            return None
        if config.solver is not None or config.grid is not None:
            raise ValueError("a plan is a solver on its own grid: leave out solver and grid, or the plan")
        return from_text(config.plan)

    def _require_x0(self, alpha: float) -> None:
        """Refuses a first call at this alpha if x_0 cannot be computed from the network's output there."""
        config = self.config
        if blind(self._network, alpha) and not (config.thresholding or config.clip_sample):
            raise ValueError(
                f"{BLIND.format(self._network, alpha)}: set prediction_type='v_prediction' if that is what it "
                "predicts, else begin at less noise, with lambda_min_clipped=-5.1"
            )

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """As diffusers' `from_config`, for the configs of all schedulers in `foreign.DIFFUSION` and `foreign.FLOW`.

        A solver by its path `package.module:attribute` runs that module's code, so it is never taken from the config
        alone: pass `solver=` with the same path.

        Raises:
            ValueError: an unknown option, a config of a process that is not supported, or a solver path that is only
                in the config; the message names it.
        """
        options = {n: p.default for n, p in list(inspect.signature(cls.__init__).parameters.items())[1:]}
        for name in kwargs:
            if not name.startswith("_") and name not in ("dtype", "torch_dtype", *options):
                raise unknown(f"option of {cls.__name__}", name, options)
        if not isinstance(config, dict):
            raise ValueError(
                f"from_config takes a scheduler's config such as pipe.scheduler.config, not {type(config).__name__}; "
                "for a folder use from_pretrained"
            )
        config, implied, flow = read(config, options)
        kwargs = {**implied, **kwargs}
        was = config.get("solver", cls.fixed_solver)
        before = None if "solver" in config.get("_use_default_values", ()) else was
        if ":" in str(before) and "solver" not in kwargs and cls.fixed_solver is None:
            raise ValueError(
                f"this config has the solver {before!r}, which would import that module: if you trust it, pass "
                f"solver={before!r} as well"
            )
        if kwargs.get("solver", cls.fixed_solver or before) != was:  # the options belong to another solver
            for name in ("solver", "solver_options", "eta", "as_published", "plan"):
                config.pop(name, None)
        if isinstance(config.get("solver_options"), dict) and cls.fixed_options:
            left = {name: v for name, v in config["solver_options"].items() if name not in cls.fixed_options}
            config["solver_options"] = left or None
        made = super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
        scheduler = made[0] if return_unused_kwargs else made
        if flow:  # kept for a later `from_config` of a flow scheduler
            scheduler.register_to_config(**{**flow, "shift": scheduler.config.flow_shift})
        return made

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path=None, *args, **kwargs):
        """As diffusers' `from_pretrained`; see `from_config` for a solver by its path."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except RecursionError:
            raise ValueError(f"{str(pretrained_model_name_or_path)!r}: its config is nested too deeply") from None

    def to_json_file(self, json_file_path) -> None:
        """Write the config as JSON; an older file stays as it was if that fails."""
        try:
            text = self.to_json_string()
        except TypeError as error:
            raise ValueError(f"this config cannot be saved: {error}") from None
        write_whole(json_file_path, text.encode())

    @property
    def _network(self) -> str:
        kind = self.config.prediction_type
        return "flow" if kind == "flow_prediction" else kind


def signature_of(cls) -> inspect.Signature:
    """The signature for `help(cls)`: that of `__init__`, not of `__new__`."""
    of_init = inspect.signature(cls.__init__)
    return of_init.replace(parameters=list(of_init.parameters.values())[1:])
