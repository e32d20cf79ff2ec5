"""The diffusers plug-in: a scheduler that steps a plan. Its options are in pipeline_config.py, subclasses in named.py.

    pipe.scheduler = samplers.SolverScheduler.from_config(pipe.scheduler.config, solver="unipc")
    pipe.scheduler = samplers.SolverScheduler.from_plan("plan.safetensors", pipe.scheduler.config)

One entry of `timesteps` is one model call, whatever the solver: `num_inference_steps` counts calls, `order` is 1, and
the labels of a solver with several calls per step may repeat. Options that diffusers' DPMSolverMultistepScheduler also
has keep their meaning and default there; `solver`, `solver_options`, `guidance`, `grid`, `eta`, `as_published` and
`plan` are ours.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput  # noqa: F401 (see __init__)

from .forward import add_noise
from .grid import Grid, falling
from .pipeline_config import PipelineConfig, chosen_by_name, chosen_by_rule, signature_of
from .pipeline_plan import calls_differ, config_with, described_by
from .pipeline_run import Run
from .placing import place, shifted
from .plan import Plan, State
from .prediction import convert, dynamic_threshold
from .sample import compiled, name_of
from .tail import tail


class SolverScheduler(PipelineConfig):
    """Any solver of this package in any diffusers pipeline for VP models (SD, SDXL, DiT and others) or rectified-flow
    models (SD3, Flux and others).

    Args:
        solver: a name in `samplers.SOLVERS` or a path `package.module:attribute`. None: `samplers.default_solver`
            chooses solver, options and grid for images from the number of calls and `guidance`.
        solver_options: the solver's own options by name, e.g. {"order": 3, "variant": "bh1"}. They override all others.
        guidance: the guidance scale of the pipeline, which a scheduler cannot see. Only `default_solver` uses it. 1 for
            models that take the scale as an input and are called once (FLUX.1 dev).
        grid: where the calls are placed, a name in `samplers.grid.GRIDS`. None: by the use_*_sigmas flags, else by
            `default_solver` or the schedule's default ('logsnr'; for flow 'sgm_uniform', or 'time' for the solvers of
            `placing.CALLED_LAST`). 'config': by `timestep_spacing`, which is not the default, because the 'leading' of
            the Stable Diffusion configs starts at label 901 although the latent is pure noise.
        eta: noise of solvers that have this option (None: the solver's default). A pipeline's own `eta=` argument
            overrides it if it is not 0.
        as_published: reproduce the official code where it departs from its own mathematics.
        solver_order, solver_type, lower_order_final: for a `solver` whose family has them in diffusers. A solver_type
            of another family means the solver's default. lower_order_final acts at any number of steps; in diffusers
            only below 15.
        timestep_spacing, steps_offset: used by grid='config', which for flow models is grid='time'.
        sigma_min, sigma_max: the range of the use_*_sigmas flags, in sigma / alpha, for flow models too.
        shift_terminal: of flow models, the sigma of the last call.
        clip_sample, clip_sample_range: clamp x_0, as `thresholding` does by its quantile.
        plan: a plan as text, which `from_plan` puts here, so that it is saved with the scheduler. It takes the place of
            solver, grid and everything that places calls.
        All others are as in diffusers' DPMSolverMultistepScheduler.

    A subclass fixes a solver and its options: `class Mine(SolverScheduler, solver="unipc", order=3)`.
    """

    order = 1  # model calls per entry of `timesteps`

    @classmethod
    def from_plan(cls, plan, config=None, guidance: float | None = None) -> SolverScheduler:
        """A scheduler that runs a saved plan, e.g. one of `diffpo calibrate`.

        It is saved with its plan by `save_pretrained`. A run that begins in the middle (image-to-image) goes through
        the plan's last calls: DDIM steps first, then the plan's own rows once the history that they need is there.

        Args:
            plan: the file, or a `samplers.Plan`.
            config: of the pipeline's scheduler. None: noise levels and prediction type are those of the plan.
            guidance: the guidance scale that the pipeline will be called with, if it is known.

        Raises:
            ValueError: the file is no plan, or the config is of a process that is not supported.

        Warns: the plan was made for another noise schedule, prediction type or guidance scale.
        """
        found = plan if isinstance(plan, Plan) else Plan.load(plan)
        own = config_with(found, guidance)
        if config is None:
            return cls(**described_by(found), **own)
        return cls.from_config(config, solver=None, grid=None, **own)

    def _setup(self) -> None:
        super()._setup()
        self.init_noise_sigma = self.schedule.init_scale
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(len(self) - 1, -1, -1, dtype=torch.float32)
        self.plan: Plan | None = None
        self._run: Run | None = None
        self._begin_index: int | None = None

    # -- what pipelines read ------------------------------------------------------------------------------------------

    @property
    def step_index(self) -> int | None:
        """The next call, once the first has been made."""
        return None if self._run is None else self._run.index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this entry of `timesteps` (image-to-image)."""
        self._begin_index = begin_index

    def scale_model_input(self, sample: torch.Tensor, timestep=None) -> torch.Tensor:
        """The model gets the state as it is."""
        return sample

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """alpha_t x_0 + sigma_t noise at the labels `timesteps`, shape (batch,) or (1,)."""
        t = self.schedule.t_of_model_time(torch.as_tensor(timesteps).detach().cpu().double().numpy().reshape(-1))
        low, high = self.schedule.t_limits
        if not ((t >= low - 1e-6) & (t <= high + 1e-6)).all():
            first, last = (float(self.schedule.model_time(limit)) for limit in (low, high))
            raise ValueError(f"timesteps {timesteps} lie outside the schedule, whose labels are {first:g} to {last:g}")
        shape = (-1, *[1] * (original_samples.ndim - 1))
        alpha, sigma = (
            torch.from_numpy(f(t)).to(original_samples).reshape(shape)
            for f in (self.schedule.alpha, self.schedule.sigma)
        )
        return add_noise(original_samples, noise, alpha, sigma)

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
            num_inference_steps: number of model calls.
            timesteps: instead, the labels of the nodes, from noise to data: the calls themselves for a solver with one
                call per step, the beginnings of the steps for the others.
            sigmas: instead, the noise levels of the nodes, from noise to data: sigma / alpha for VP models, sigma
                before the shift for flow models. There the use_*_sigmas flags place as many new ones between the first
                and the last, as in diffusers. A last 0 is the end.
            mu: resolution-dependent shift of flow models, used if `use_dynamic_shifting`.

        Raises:
            ValueError: the solver cannot make exactly as many calls (the message names numbers that it can), or a wrong
                argument.
        """
        self.plan = None  # until there is a new one
        given = {name: v for name, v in {"timesteps": timesteps, "sigmas": sigmas}.items() if v is not None}
        if len(given) > 1 or (not given and num_inference_steps is None):
            raise ValueError("pass exactly one of num_inference_steps, timesteps and sigmas")
        if num_inference_steps is not None and not (
            isinstance(num_inference_steps, (int, np.integer)) and num_inference_steps > 0
        ):
            raise ValueError(f"num_inference_steps must be a whole number, at least 1, got {num_inference_steps!r}")
        nodes = {name: falling(name, values) for name, values in given.items()}
        if self.config.use_dynamic_shifting:
            self.schedule = shifted(self.config, mu)
        calls = num_inference_steps or len(*nodes.values())
        if self.fitted is not None:
            self._use(self._own_plan(self.fitted, calls, bool(nodes)), device)
            return
        if self.config.solver is None:
            self._choice = chosen_by_rule(self.config, calls, self.schedule)
        else:
            self._choice = chosen_by_name(self.config, self.fixed_options)
        self._grid = place(self.config, self.schedule, self._choice.grid, nodes)
        plan = self._compile(self._grid, None if nodes else num_inference_steps)
        if num_inference_steps not in (None, len(plan)):
            raise ValueError(
                f"{plan.name} makes {len(plan)} calls here, but num_inference_steps is {num_inference_steps}: pass "
                "exactly one of num_inference_steps, timesteps and sigmas"
            )
        self._use(plan, device)

    def _own_plan(self, plan: Plan, calls: int, placed: bool) -> Plan:
        """The config's plan for this network, which can make only as many calls as it has."""
        if calls != len(plan):
            raise calls_differ(plan, calls)
        if placed:  # some pipelines always pass sigmas of their own
            warnings.warn("the plan has its own times: the given timesteps or sigmas are not used", stacklevel=3)
        return self._as_network(plan)

    def _use(self, plan: Plan, device: str | torch.device | None) -> None:
        if not self.config.use_flow_sigmas:
            self._require_x0(plan.alpha[0])
        self.plan = plan
        x, noise = self.plan.start[0]
        self.init_noise_sigma = float(np.hypot(x * self.schedule.init_scale, noise))
        self.timesteps = torch.tensor(self.plan.label, dtype=torch.float32, device=device)
        levels = self.plan.sigma if self.config.use_flow_sigmas else self.plan.sigma / self.plan.alpha
        self.sigmas = torch.tensor(levels, dtype=torch.float32)
        self.num_inference_steps = len(self.plan)
        self._run = self._begin_index = None

    def _compile(self, grid: Grid, calls: int | None, eta: float | None = None) -> Plan:
        """The plan on a grid, of as many calls or (None) of as many steps as the grid's given nodes make."""
        build, options = self._choice.solver, self._choice.options
        if eta:
            if "eta" not in inspect.signature(build).parameters:
                raise ValueError(f"solver {name_of(build)!r} has no option 'eta'")
            options = {**options, "eta": eta}
        try:
            plan = compiled(build, grid, calls, options)
        except (TypeError, OverflowError) as error:  # an option of a kind that only the solver checks
            raise ValueError(f"solver {name_of(build)!r} with {options}: {error}") from None
        return self._as_network(plan)

    def _as_network(self, plan: Plan) -> Plan:
        """The plan for what `step` passes to it: the network's output, or a limited x_0."""
        limited = self.config.thresholding or self.config.clip_sample
        return plan.for_prediction("sample" if limited else self._network)

    def _plan_from(self, plan: Plan, first: int, eta: float) -> Plan:
        """The plan of a run from call `first` of `plan` on, with the pipeline's own eta if that is not 0."""
        if self.fitted is not None:
            if eta:
                raise ValueError(f"plan {plan.name!r} is fixed: it has no option 'eta', so leave eta out")
            return tail(plan, first)
        plan = self._compile(self._grid, len(plan), eta) if eta else plan
        t, to_zero = plan.t[first:], plan.sigma[-1] == 0.0
        if 0 < first < len(plan) and (np.diff(t) < 0).all():
            # a solver with one call per step starts again on the remaining nodes
            grid = Grid(self.schedule, times=t[:-1] if to_zero else t, end="zero" if to_zero else "t_end")
            with contextlib.suppress(ValueError):
                again = self._compile(grid, len(plan) - first, eta)
                if np.array_equal(again.t, t) and np.array_equal(again.label, plan.label[first:]):
                    return again
        return tail(plan, first)

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
        """The next sample, after one model call.

        Args:
            model_output: what the network returned at `sample`. timestep: finds the position at the first step only,
                and only without a begin index.
            sample: the state. If it is not what the last step returned, the run goes on from this one.
            eta: as in diffusers' DDIM; 0 leaves the config's value.
            generator: source of the noise, one or one per sample. variance_noise: the noise itself.
        """
        plan = self.plan
        if plan is None:
            raise ValueError("call set_timesteps before step")
        if model_output.device != sample.device or not model_output.is_floating_point():
            raise ValueError(
                f"model_output is {model_output.dtype} on {model_output.device}, but the sample is {sample.dtype} on "
                f"{sample.device}: pass floating-point tensors on one device"
            )
        run = self._run_at(plan, timestep, eta, sample)
        if run.k >= len(run.plan):
            raise ValueError(f"all {len(run.plan)} steps are done: call set_timesteps before another run")
        state = run.state_at(sample)
        output = self._limited(run, state, model_output)
        noise = run.noise(state, generator, variance_noise)
        self._run = run.then(run.plan.step(run.k, state, output, noise), sample.dtype)
        return SchedulerOutput(prev_sample=self._run.returned) if return_dict else (self._run.returned,)

    def _run_at(self, plan: Plan, timestep, eta: float, sample: torch.Tensor) -> Run:
        """The run that this step belongs to: the present one, or a new one of `plan` that begins here."""
        run, first = self._run, self._begin_index
        # A run that was found by its label is over after its last call: the next label begins another.
        if run is not None and not (first is None and run.first and run.k == len(run.plan)):
            return run
        if first is None:
            first = int(np.abs(plan.label - float(timestep)).argmin())
        return Run(self._plan_from(plan, first, eta), first).beside(sample)

    def _limited(self, run: Run, state: State, output: torch.Tensor) -> torch.Tensor:
        """The network's output without a learned variance; a limited x_0 in its place if the config limits it."""
        config = self.config
        if config.variance_type in ("learned", "learned_range"):
            output = output[:, : state.input.shape[1]]
        if not (config.thresholding or config.clip_sample):
            return output
        alpha, sigma = run.plan.alpha[run.k], run.plan.sigma[run.k]
        x0 = convert(state.input, output.to(state.input.dtype), self._network, "sample", alpha, sigma)
        if config.thresholding:
            return dynamic_threshold(x0, config.dynamic_thresholding_ratio, ceiling=max(1.0, config.sample_max_value))
        return x0.clamp(-config.clip_sample_range, config.clip_sample_range)


# A saved pipeline has the class's module, which must be imported before it is loaded. With this, `import samplers` is
# enough, although the class itself is imported later.
SolverScheduler.__module__ = "samplers"
SolverScheduler.__signature__ = signature_of(SolverScheduler)
