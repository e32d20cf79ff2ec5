"""The diffusers plug-in: one scheduler that steps a plan. The only module here that imports diffusers.

    pipe.scheduler = samplers.SolverScheduler.from_config(pipe.scheduler.config, solver="dpmpp")

Options that diffusers' DPMSolverMultistepScheduler also has keep its meaning and default; `solver`, `grid`, `eta`
and `as_published` are ours.
"""

from __future__ import annotations

import inspect
import math
import typing

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from ._names import unknown
from .grid import GRIDS, LABEL_GRIDS, Grid
from .plan import Plan, State
from .prediction import PREDICTIONS, convert, dynamic_threshold
from .schedule import RectifiedFlow, Schedule, VPDiscrete, training_betas
from .solvers import SOLVERS

_DIFFUSERS_SOLVER_TYPES = ("midpoint", "heun", "bh1", "bh2", "logrho")
_SIGMA_FLAGS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "logsnr",  # uniform in log sigma is uniform in lambda
    "use_lu_lambdas": "logsnr",
    "use_beta_sigmas": "beta",
}


class SolverScheduler(SchedulerMixin, ConfigMixin):
    """Any solver of this package in any diffusers pipeline for VP (SD, SDXL, DiT, ...) or rectified-flow (SD3, Flux,
    ...) models.

    Args:
        solver: a name in `samplers.solvers.SOLVERS`.
        grid: where the calls are placed, a name in `samplers.grid.GRIDS`. None: what the use_*_sigmas flags say,
            else the schedule's default ('logsnr'; 'time' for flow). 'config': what `timestep_spacing` says. The
            default does not follow `timestep_spacing`, because the 'leading' of the Stable Diffusion configs starts
            at label 901 although the latent is pure noise.
        eta: noise of solvers that have it; a pipeline's own `eta=` argument overrides it when not 0.
        as_published: reproduce the official code where it departs from its own mathematics.
        solver_order, solver_type: passed to solvers that have them. A solver_type of another family (bh1, bh2,
            logrho) means the default.
        lower_order_final: end with lower orders, at any number of steps (diffusers stops doing so at 15, where its
            error jumps).
        timestep_spacing, steps_offset: used by grid='config'.
        others: as in diffusers' DPMSolverMultistepScheduler.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]  # noqa: RUF012
    order = 1  # model calls per entry of `timesteps`

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
        solver: str = "dpmpp",
        grid: str | None = None,
        eta: float = 0.0,
        as_published: bool = False,
    ):
        if solver not in SOLVERS:
            raise unknown("solver", solver, SOLVERS)
        if grid is not None and grid not in (*GRIDS, "config"):
            raise unknown("grid", grid, (*GRIDS, "config"))
        if self._network not in PREDICTIONS:
            raise unknown("prediction_type", prediction_type, ("epsilon", "sample", "v_prediction", "flow_prediction"))
        if final_sigmas_type not in ("zero", "sigma_min"):
            raise unknown("final_sigmas_type", final_sigmas_type, ("zero", "sigma_min"))
        if timestep_spacing not in LABEL_GRIDS:
            raise unknown("timestep_spacing", timestep_spacing, LABEL_GRIDS)
        if sum(bool(self.config[flag]) for flag in _SIGMA_FLAGS) > 1:
            raise ValueError(f"set at most one of {', '.join(_SIGMA_FLAGS)}")
        if use_flow_sigmas:
            self.schedule: Schedule = RectifiedFlow(flow_shift, num_train_timesteps)
        else:
            kind = beta_schedule if trained_betas is None else trained_betas
            betas = training_betas(kind, beta_start, beta_end, num_train_timesteps, rescale_betas_zero_snr)
            self.schedule = VPDiscrete(betas)
            self.betas = torch.tensor(betas, dtype=torch.float32)
            self.alphas_cumprod = torch.cumprod(1.0 - torch.tensor(betas), 0).float()
        self.init_noise_sigma = self.schedule.init_scale
        self.num_inference_steps: int | None = None
        labels = np.arange(num_train_timesteps)[::-1].copy()
        self.timesteps = torch.from_numpy(labels.astype(np.float32))
        self.plan: Plan | None = None
        self._reset()

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """As diffusers' `from_config`; understands FlowMatch configs (`shift`) too."""
        flow = {}
        if isinstance(config, dict):
            if "sigma_data" in config and "beta_start" not in config:
                raise ValueError(
                    "this config is of an EDM-preconditioned scheduler: use samplers.sample with samplers.EDM"
                )
            # FlowMatch* is known by its keys: a live config does not hold the class name.
            if "shift" in config and "beta_start" not in config:
                for name in ("shift_terminal", "invert_sigmas", "stochastic_sampling"):
                    if config.get(name):
                        raise ValueError(
                            f"a FlowMatch config with {name} is not supported: pass sigmas= to the pipeline"
                        )
                ours = cls._get_init_keys(cls)
                flow = {name: v for name, v in config.items() if name not in ours and not name.startswith("_")}
                config = {name: value for name, value in config.items() if name not in flow}
                implied = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": flow["shift"]}
                kwargs = {**implied, **kwargs}
        made = super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
        (made[0] if return_unused_kwargs else made).register_to_config(**flow)  # kept for the way back
        return made

    # -- what pipelines read ------------------------------------------------------------------------------------------

    @property
    def step_index(self) -> int | None:
        """The next call, once the first has been made."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this entry of `timesteps` (image-to-image)."""
        self._begin_index = begin_index

    def scale_model_input(self, sample: torch.Tensor, timestep=None) -> torch.Tensor:
        """The model sees the state as it is."""
        return sample

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """alpha_t x_0 + sigma_t noise at the labels `timesteps`, shape (batch,) or (1,)."""
        t = self.schedule.t_of_model_time(torch.as_tensor(timesteps).detach().cpu().double().numpy().reshape(-1))
        shape = (-1, *[1] * (original_samples.ndim - 1))
        like = {"device": original_samples.device, "dtype": original_samples.dtype}
        alpha, sigma = (
            torch.from_numpy(f(t)).to(**like).reshape(shape) for f in (self.schedule.alpha, self.schedule.sigma)
        )
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """`add_noise` by the name and argument order that flow pipelines use."""
        return self.add_noise(sample, noise, timestep)

    # -- the plan -----------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Compile the plan.

        Args:
            num_inference_steps: number of model calls.
            timesteps: instead, the labels of the calls.
            sigmas: instead, the noise levels of the calls: sigma / alpha for VP models, sigma before the shift for
                flow models. A last 0 is the end.
            mu: resolution-dependent shift of flow models, used if `use_dynamic_shifting`.
        """
        if sum(given is not None for given in (num_inference_steps, timesteps, sigmas)) != 1 and not (
            num_inference_steps is not None
            and len(timesteps if timesteps is not None else sigmas) == num_inference_steps
        ):
            raise ValueError("pass exactly one of num_inference_steps, timesteps and sigmas")
        if self.config.use_dynamic_shifting:
            if mu is None:
                raise ValueError("this config has use_dynamic_shifting: pass mu= to set_timesteps")
            shift = math.exp(mu) if self.config.time_shift_type == "exponential" else mu
            self.schedule = RectifiedFlow(shift, self.config.num_train_timesteps)
        schedule, config = self.schedule, self.config
        end = "zero" if config.final_sigmas_type == "zero" else "t_end"
        t_start = schedule.t_max
        if config.use_flow_sigmas:
            sigmas = None if sigmas is None else schedule.sigma([float(s) for s in sigmas])
        elif np.isfinite(config.lambda_min_clipped):
            t_start = min(t_start, float(schedule.t_of_lambda(config.lambda_min_clipped)))
        flagged = [kind for flag, kind in _SIGMA_FLAGS.items() if config[flag]]
        kind = config.timestep_spacing if config.grid == "config" else config.grid
        kind = kind or (flagged[0] if flagged else None)
        grid = Grid(
            schedule,
            kind,
            end=end,
            t_start=t_start,
            steps_offset=config.steps_offset,
            sigmas=sigmas,
            timesteps=timesteps,
        )
        steps = num_inference_steps if grid.given is None else len(grid.given) - 1
        self._device = device
        self._use(self._compile(grid, steps, self.config.eta))
        self.num_inference_steps = len(self.plan)
        self._reset()

    @property
    def _network(self) -> str:
        kind = self.config.prediction_type
        return "flow" if kind == "flow_prediction" else kind

    def _compile(self, grid: Grid, steps: int, eta: float) -> Plan:
        config, build = self.config, SOLVERS[self.config.solver]
        hints = typing.get_type_hints(build)
        known = inspect.signature(build).parameters
        wanted = {"order": config.solver_order, "lower_order_final": config.lower_order_final}
        allowed = typing.get_args(hints.get("solver_type"))
        if config.solver_type in allowed or config.solver_type not in _DIFFUSERS_SOLVER_TYPES:
            wanted["solver_type"] = config.solver_type
        for name, value in {"eta": eta, "as_published": config.as_published}.items():
            if value and name not in known:
                raise ValueError(f"solver {config.solver!r} has no option {name!r}")
            wanted[name] = value
        self._eta = eta
        return build(grid, steps, **{k: v for k, v in wanted.items() if k in known}).for_prediction(
            "sample" if config.thresholding else self._network
        )

    def _use(self, plan: Plan) -> None:
        self.plan = plan
        self.timesteps = torch.tensor(plan.label, dtype=torch.float32, device=self._device)
        flow = self.config.use_flow_sigmas
        self.sigmas = torch.tensor(plan.sigma if flow else plan.sigma / plan.alpha, dtype=torch.float32)
        self._offset = 0  # entries of `timesteps` before the plan's first call

    def _reset(self) -> None:
        self._step_index = self._begin_index = None
        self._state: State | None = None
        self._returned: torch.Tensor | None = None

    def _tail(self, first: int, eta: float) -> None:
        """Recompile for a run that begins at call `first`: it has no history, and perhaps another eta."""
        t, to_zero = self.plan.t, self.plan.sigma[-1] == 0.0
        times = t[first:-1] if to_zero else t[first:]
        grid = Grid(self.schedule, times=times, end="zero" if to_zero else "t_end")
        self.plan, self._offset = self._compile(grid, len(t) - 1 - first, eta), first

    # -- one step -----------------------------------------------------------------------------------------------------

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """One model call's worth of sampling.

        Args:
            model_output: what the network returned at `sample`. timestep: finds the position at the first step only.
            sample: the state; whatever the pipeline made of the last one returned is taken over.
            eta: as in diffusers' DDIM; 0 leaves the config's value.
            generator: source of the noise, one or one per sample. variance_noise: the noise itself.
        """
        if self.plan is None:
            raise ValueError("run set_timesteps before step")
        eta = eta or self.config.eta
        if self._step_index is None:
            self._step_index = self._begin_index if self._begin_index is not None else self._position(timestep)
            if self._step_index or eta != self._eta:
                self._tail(self._step_index, eta)
        k = self._step_index - self._offset
        if k >= len(self.plan):
            raise ValueError(f"all {len(self.plan)} steps are done: call set_timesteps before another run")
        if self.config.variance_type in ("learned", "learned_range"):
            model_output = model_output[:, : sample.shape[1]]
        state = self._take_over(sample)
        plan = self.plan
        if self.config.thresholding:
            output = model_output.to(state.input.dtype)
            x0 = convert(state.input, output, self._network, "sample", plan.alpha[k], plan.sigma[k])
            top = max(1.0, self.config.sample_max_value)
            model_output = dynamic_threshold(x0, self.config.dynamic_thresholding_ratio, ceiling=top)
        noise = None
        if plan.needs_noise(k):
            noise = variance_noise
            if noise is None:
                noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=state.input.dtype)
            noise = noise.to(state.input.dtype)
        self._state = plan.step(k, state, model_output, noise)
        self._last_k = k
        self._step_index += 1
        self._returned = self._state.input.to(sample.dtype)
        if self._returned is self._state.input is not self._state.anchor:
            self._returned = self._returned.clone()  # so that an edit in place can be told from our own state
        self._version = _version(self._returned)
        return SchedulerOutput(prev_sample=self._returned) if return_dict else (self._returned,)

    def _position(self, timestep) -> int:
        """The entry of `timesteps` nearest to a label (a pipeline that sets no begin index)."""
        return int((self.timesteps.cpu() - float(timestep)).abs().argmin())

    def _take_over(self, sample: torch.Tensor) -> State:
        """The state to step from: ours in full precision if the pipeline left it alone, else the pipeline's."""
        if self._state is None:
            return self.plan.begin(sample)
        if sample is self._returned and _version(sample) == self._version:
            return self._state
        state = self._state
        given = sample.to(state.input.dtype)
        if state.anchor is state.input:
            return state._replace(input=given, anchor=given)
        slope = self.plan.rows[self._last_k, 0, 0]  # moves the anchor so that it would have given this input
        return state._replace(input=given, anchor=state.anchor + (given - state.input) / (slope or 1.0))


# Saved pipelines name the class by its module, which must already be imported when they are loaded: with this,
# `import samplers` is enough although the class itself is imported lazily.
SolverScheduler.__module__ = "samplers"


def _version(x: torch.Tensor) -> int:
    """Changes when a tensor is written in place (not tracked in inference mode)."""
    return -1 if x.is_inference() else x._version
