"""The diffusers plug-in: one scheduler that steps a plan (its options: pipeline_config.py; subclasses: named.py).

    pipe.scheduler = samplers.SolverScheduler.from_config(pipe.scheduler.config, solver="unipc")

One entry of `timesteps` is one model call, whatever the solver: `num_inference_steps` counts calls, `order` is 1, and
the labels of a solver with several calls per step may repeat. Options that diffusers' DPMSolverMultistepScheduler also
has keep its meaning and default; `solver`, `solver_options`, `guidance`, `grid`, `eta` and `as_published` are ours.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput  # noqa: F401 (see __init__)

from .grid import Grid, Nodes, falling
from .pipeline_config import SIGMA_FLAGS, PipelineConfig, chosen_by_name, chosen_by_rule, signature_of
from .plan import ANCHOR, Plan, State, randn
from .prediction import convert, dynamic_threshold
from .sample import build_on_given
from .schedule import EDM, RectifiedFlow, Schedule
from .tail import tail


class SolverScheduler(PipelineConfig):
    """Any solver of this package in any diffusers pipeline for VP (SD, SDXL, DiT, ...) or rectified-flow (SD3, Flux,
    ...) models.

    Args:
        solver: a name in `samplers.solvers.SOLVERS`. None: `samplers.default_solver` chooses solver, options and grid
            from the number of calls and `guidance`.
        solver_options: the solver's own options by name, e.g. {"order": 3, "variant": "bh1"}; over all others here.
        guidance: the guidance scale that the pipeline will use, which a scheduler cannot see. Read only by the rule.
        grid: where the calls are placed, a name in `samplers.grid.GRIDS`. None: what the use_*_sigmas flags say,
            else the rule's or the schedule's default ('logsnr'; 'time' for flow). 'config': what `timestep_spacing`
            says. The default does not follow `timestep_spacing`, because the 'leading' of the Stable Diffusion
            configs starts at label 901 although the latent is pure noise.
        eta: noise of solvers that have it (None: the solver's default); a pipeline's own `eta=` argument overrides it
            when not 0.
        as_published: reproduce the official code where it departs from its own mathematics.
        solver_order, solver_type, lower_order_final: for a named `solver` of a family that has them in diffusers. A
            solver_type of another family means the solver's default. lower_order_final acts at any number of steps
            (diffusers stops at 15, where its error jumps).
        timestep_spacing, steps_offset: used by grid='config', which for flow models is grid='time'.
        sigma_min, sigma_max: the range that the use_*_sigmas flags fill, in sigma / alpha, for flow models too.
        shift_terminal: of flow models, the sigma of the last call.
        clip_sample, clip_sample_range: clamp x_0, as `thresholding` does by its quantile.
        others: as in diffusers' DPMSolverMultistepScheduler.

    A subclass fixes a solver and its options: `class Mine(SolverScheduler, solver="unipc", order=3)`.
    """

    order = 1  # model calls per entry of `timesteps`

    def _setup(self) -> None:
        super()._setup()
        self.init_noise_sigma = self.schedule.init_scale
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(len(self) - 1, -1, -1, dtype=torch.float32)
        self.plan: Plan | None = None
        self._reset()

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
        low, high = self.schedule.t_limits
        if not ((t >= low - 1e-6) & (t <= high + 1e-6)).all():
            raise ValueError(f"timesteps {timesteps} lie outside the schedule")
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
        """Compile the plan. `timesteps` then has one entry per model call.

        Args:
            num_inference_steps: number of model calls; an error that names possible numbers if the solver cannot make
                exactly as many.
            timesteps: instead, the labels of the nodes, from noise to data: the calls themselves for a solver with one
                call per step, the beginnings of the steps for the others.
            sigmas: instead, the noise levels of the nodes, from noise to data: sigma / alpha for VP models, sigma
                before the shift for flow models, where the use_*_sigmas flags place as many anew between the first
                and the last, as in diffusers. A last 0 is the end.
            mu: resolution-dependent shift of flow models, used if `use_dynamic_shifting`.
        """
        self.plan = None  # until there is a new one
        given = {name: v for name, v in {"timesteps": timesteps, "sigmas": sigmas}.items() if v is not None}
        if len(given) > 1 or (not given and num_inference_steps is None):
            raise ValueError("pass exactly one of num_inference_steps, timesteps and sigmas")
        if num_inference_steps is not None and not (
            isinstance(num_inference_steps, (int, np.integer)) and num_inference_steps > 0
        ):
            raise ValueError(f"num_inference_steps is a whole number of calls, at least 1; got {num_inference_steps!r}")
        given = {name: falling(name, values) for name, values in given.items()}
        if self.config.use_dynamic_shifting:
            self.schedule = self._shifted_by(mu)
        calls = num_inference_steps or len(*given.values())
        if self.config.solver is None:
            self._choice = chosen_by_rule(self.config, calls, self.schedule)
        else:
            self._choice = chosen_by_name(self.config, self.fixed_options)
        self._grid = self._place(**given)
        plan = self._compile(self._grid, None if given else num_inference_steps)
        if num_inference_steps not in (None, len(plan)):
            raise ValueError(
                f"pass exactly one of num_inference_steps, timesteps and sigmas: {plan.name} makes "
                f"{len(plan)} calls where num_inference_steps is {num_inference_steps}"
            )
        if not self.config.use_flow_sigmas:
            self._require_x0(plan.alpha[0])
        self.plan = plan
        x, noise = self.plan.start[0]
        self.init_noise_sigma = float(np.hypot(x * self.schedule.init_scale, noise))
        self.timesteps = torch.tensor(self.plan.label, dtype=torch.float32, device=device)
        levels = self.plan.sigma if self.config.use_flow_sigmas else self.plan.sigma / self.plan.alpha
        self.sigmas = torch.tensor(levels, dtype=torch.float32)
        self.num_inference_steps = len(self.plan)
        self._reset()

    def _shifted_by(self, mu) -> RectifiedFlow:
        """The schedule of a flow that is shifted by the image's size; its smallest time is shifted once."""
        if mu is None:
            raise ValueError("this config has use_dynamic_shifting: pass mu= to set_timesteps")
        steps = self.config.num_train_timesteps
        try:
            shift = math.exp(mu) if self.config.time_shift_type == "exponential" else float(mu)
            return RectifiedFlow(shift, steps, t_min=1.0 / steps)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"mu must be a number that makes a finite shift above 0, got {mu!r}") from None

    def _place(self, timesteps=None, sigmas=None) -> Grid:
        schedule, config = self.schedule, self.config
        end = "zero" if config.final_sigmas_type == "zero" else "t_end"
        flagged = next((kind for flag, kind in SIGMA_FLAGS.items() if config[flag]), None)
        if config.use_flow_sigmas:
            return self._place_flow(config.grid or flagged, end, timesteps, sigmas, flagged)
        t_start, t_end = schedule.t_max, schedule.t_min
        if np.isfinite(config.lambda_min_clipped):
            t_start = min(t_start, float(schedule.t_of_lambda(config.lambda_min_clipped)))
        if flagged and not config.grid:
            t_start = self._time_at("sigma_max", t_start)
            t_end = self._time_at("sigma_min", t_end)
        kind = config.timestep_spacing if config.grid == "config" else config.grid or flagged
        placed = kind or timesteps is not None or sigmas is not None or t_start != schedule.t_max
        if self._choice.grid is not None and not placed:
            return self._choice.grid
        range_ = {"end": end, "t_start": t_start, "t_end": t_end}
        return Grid(schedule, kind, **range_, steps_offset=config.steps_offset, sigmas=sigmas, timesteps=timesteps)

    def _place_flow(self, kind: str | None, end: str, timesteps, sigmas, flagged: str | None) -> Grid:
        """As diffusers' FlowMatchEulerDiscreteScheduler: shift, stretch to `shift_terminal`, then the flags."""
        schedule, config, terminal = self.schedule, self.config, self.config.shift_terminal
        kind = "time" if kind == "config" else kind
        if timesteps is not None:
            return Grid(schedule, end=end, timesteps=timesteps)
        if sigmas is not None:
            if sigmas[0] > 1.0 + 1e-6 or sigmas[-1] < 0.0:
                raise ValueError(f"sigmas of a flow model lie between 0 and 1, got {sigmas.tolist()}")
            calls = schedule.sigma(np.minimum(sigmas, 1.0)[: len(sigmas) - (sigmas[-1] == 0.0)])
            calls = _stretched(calls, terminal) if terminal else calls
            if flagged and len(calls) > 1:
                t_start, t_end = schedule.t_of_noise_level(calls[[0, -1]])
                calls = schedule.sigma(Grid(schedule, kind, t_start=t_start, t_end=t_end).nodes(len(calls)).t[:-1])
            end = "zero" if sigmas[-1] == 0.0 else end
            return Grid(schedule, end=end, sigmas=calls)
        if flagged and not config.grid and (config.sigma_min, config.sigma_max) != (None, None):
            if config.sigma_min is None or config.sigma_max is None:
                raise ValueError("a flow model needs both of sigma_min and sigma_max")
            levels = Grid(EDM(config.sigma_min, config.sigma_max), kind, end=end)  # UniPC's: sigma / alpha
            return _Relevelled(schedule, levels, lambda level: level / (1.0 + level))
        if terminal and kind in (None, "time"):
            return _Relevelled(schedule, Grid(schedule, "time", end=end), lambda level: _stretched(level, terminal))
        if self._choice.grid is not None and not kind:
            return self._choice.grid
        t_end = float(schedule.t_of_noise_level(terminal)) if terminal else None
        return Grid(schedule, kind, end=end, t_end=t_end)

    def _time_at(self, option: str, default: float) -> float:
        """The time at the noise level that an option names."""
        level = self.config[option]
        if level is None:
            return default
        least, most = self.schedule.noise_level(np.array(self.schedule.t_limits))
        if not 0.999 * least <= level <= 1.001 * most:
            raise ValueError(f"{option} = {level:g} lies outside the schedule, {least:g} to {most:g}")
        t = float(self.schedule.t_of_noise_level(np.clip(level, least, most)))
        return min(default, t) if option == "sigma_max" else max(default, t)

    def _compile(self, grid: Grid, calls: int | None, eta: float | None = None) -> Plan:
        """The plan on a grid, of as many calls or (None) of as many steps as the grid's given nodes make."""
        build, options = self._choice.solver, self._choice.options
        if eta:
            if "eta" not in inspect.signature(build).parameters:
                raise ValueError(f"solver {build.__name__!r} has no option 'eta'")
            options = {**options, "eta": eta}
        try:
            plan = build_on_given(build, grid, **options) if calls is None else build(grid, calls, **options)
        except (TypeError, OverflowError) as error:  # an option of another kind, which only the solver knows
            raise ValueError(f"solver {build.__name__!r} with {options}: {error}") from None
        limited = self.config.thresholding or self.config.clip_sample
        return plan.for_prediction("sample" if limited else self._network)

    def _begin(self, first: int, eta: float) -> None:
        """The plan of this run: from call `first` on, perhaps with the pipeline's own eta."""
        plan = self._compile(self._grid, len(self.plan), eta) if eta else self.plan
        again = None
        t, to_zero = plan.t[first:], plan.sigma[-1] == 0.0
        if (
            0 < first < len(plan) and (np.diff(t) < 0).all()
        ):  # a solver with one call per step starts again on the remaining nodes
            grid = Grid(self.schedule, times=t[:-1] if to_zero else t, end="zero" if to_zero else "t_end")
            with contextlib.suppress(ValueError):
                again = self._compile(grid, len(plan) - first, eta)
        same = again is not None and np.array_equal(again.t, t) and np.array_equal(again.label, plan.label[first:])
        self._run, self._offset = again if same else tail(plan, first), first

    def _reset(self) -> None:
        self._step_index = self._begin_index = None
        self._run: Plan | None = None
        self._state: State | None = None
        self._returned: torch.Tensor | None = None

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
            model_output: what the network returned at `sample`. timestep: finds the position at the first step only,
                and only without a begin index.
            sample: the state; whatever the pipeline made of the last one returned is taken over.
            eta: as in diffusers' DDIM; 0 leaves the config's value.
            generator: source of the noise, one or one per sample. variance_noise: the noise itself.
        """
        if self.plan is None:
            raise ValueError("run set_timesteps before step")
        if model_output.device != sample.device or not model_output.is_floating_point():
            raise ValueError(
                f"model_output ({model_output.dtype} on {model_output.device}) does not go with the sample "
                f"({sample.dtype} on {sample.device})"
            )
        if self._step_index == len(self.plan) and self._offset and self._begin_index is None:
            self._step_index = self._state = None  # the label was looked up and its run is over: look this one up
        if self._step_index is None:
            self._step_index = self._begin_index if self._begin_index is not None else self._position(timestep)
            self._begin(self._step_index, eta)
        k, plan = self._step_index - self._offset, self._run
        if k >= len(plan):
            raise ValueError(f"all {len(plan)} steps are done: call set_timesteps before another run")
        if self.config.variance_type in ("learned", "learned_range"):
            model_output = model_output[:, : sample.shape[1]]
        state = self._take_over(sample)
        if self.config.thresholding or self.config.clip_sample:
            output = model_output.to(state.input.dtype)
            x0 = convert(state.input, output, self._network, "sample", plan.alpha[k], plan.sigma[k])
            if self.config.thresholding:
                top = max(1.0, self.config.sample_max_value)
                model_output = dynamic_threshold(x0, self.config.dynamic_thresholding_ratio, ceiling=top)
            else:
                model_output = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        noise = None
        if plan.needs_noise(k):
            noise = variance_noise
            if noise is None:
                noise = randn(sample.shape, generator, sample.device, state.input.dtype)
            noise = noise.to(state.input.dtype)
        self._state = plan.step(k, state, model_output, noise)
        self._step_index += 1
        self._returned = self._state.input.to(sample.dtype)
        if self._returned is self._state.input is not self._state.anchor:
            self._returned = self._returned.clone()  # so that an edit in place can be told from our own state
        self._version = _version(self._returned)
        return SchedulerOutput(prev_sample=self._returned) if return_dict else (self._returned,)

    def _position(self, timestep) -> int:
        """The entry of `timesteps` nearest to a label (a pipeline that sets no begin index)."""
        return int(np.abs(self.plan.label - float(timestep)).argmin())

    def _take_over(self, sample: torch.Tensor) -> State:
        """The state to step from: ours in full precision if the pipeline left it alone, else the pipeline's."""
        if self._state is None:
            # Noise that the plan adds before its first call is already in the pipeline's latents (init_noise_sigma,
            # add_noise): they are at the level of the first label.
            x = sample.to(torch.promote_types(sample.dtype, torch.float32))
            return State(x, x, ()) if self._run.start[:, 1].any() else self._run.begin(sample)
        if sample is self._returned and _version(sample) == self._version:
            return self._state
        state = self._state
        given = sample.to(state.input.dtype)
        if state.anchor is state.input:
            return state._replace(input=given, anchor=given)
        # Move the anchor so that it would have led to this input: both came from the last anchor with these slopes.
        of_input, of_anchor = self._run.rows[self._step_index - self._offset - 1, :, ANCHOR]
        slope = float(of_anchor / of_input) if of_input and of_anchor else 1.0
        return state._replace(input=given, anchor=state.anchor + (given - state.input) * slope)


class _Relevelled(Grid):
    """Another grid's nodes, moved to the noise levels `level(theirs)`."""

    def __init__(self, schedule: Schedule, nodes_of: Grid, level: Callable[[np.ndarray], np.ndarray]):
        super().__init__(schedule, end=nodes_of.end)
        self._nodes_of, self._level = nodes_of, level

    def _placed(self, n: int) -> Nodes:
        t = self._nodes_of.nodes(n).t
        to_zero = self.end == "zero"
        levels = self._level(self._nodes_of.schedule.noise_level(t[:-1] if to_zero else t))
        nodes = Nodes.at(self.schedule, self.schedule.t_of_noise_level(levels))
        return nodes.then_zero() if to_zero else nodes


def _stretched(sigma: np.ndarray, terminal: float) -> np.ndarray:
    """1 - sigma scaled so that the last sigma is `terminal` (FlowMatchEulerDiscreteScheduler's shift_terminal)."""
    if sigma[-1] == 1.0:  # one call
        return sigma
    return 1.0 - (1.0 - sigma) * ((1.0 - terminal) / (1.0 - sigma[-1]))


# Saved pipelines name the class by its module, which must already be imported when they are loaded: with this,
# `import samplers` is enough although the class itself is imported lazily.
SolverScheduler.__module__ = "samplers"
SolverScheduler.__signature__ = signature_of(SolverScheduler)


def _version(x: torch.Tensor) -> int:
    """Changes when a tensor is written in place (not tracked in inference mode)."""
    return -1 if x.is_inference() else x._version
