"""Plans behind ComfyUI's call of a sampler, `sampler(model, x, sigmas, extra_args, callback, disable)`.

There `model(x, sigma, **extra_args)` returns the denoised x_0, whatever the network predicts. x is x_0 + sigma eps, and
(1 - sigma) x_0 + sigma eps for flow models. A plan has x = alpha x_0 + sigma eps; so each call is scaled by 1 / alpha,
or by 1 / (alpha + sigma) for flow models.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from samplers import Grid, Plan, RectifiedFlow, Schedule, VPDiscrete, build_plan, default_solver
from samplers.cfgpp import CFGPlusPlus, renoised
from samplers.plan import randn
from samplers.solvers.aliases import without_cfg_pp

DEFAULT = "default"  # the solver and the grid of samplers.default_solver


def model_sampling(model) -> Any:
    """ComfyUI's `model_sampling` of the model that a sampler is called with."""
    inner = model.inner_model
    patcher = getattr(inner, "model_patcher", None)
    return inner.inner_model.model_sampling if patcher is None else patcher.get_model_object("model_sampling")


def is_flow(sampling) -> bool:
    """Whether x is (1 - sigma) x_0 + sigma eps: ComfyUI's class CONST."""
    return any(base.__name__ == "CONST" for base in type(sampling).__mro__)


def schedule_of(sampling) -> Schedule:
    """The schedule that a ComfyUI `model_sampling` describes, by its table of sigmas or its shift."""
    if is_flow(sampling):
        half = float(sampling.percent_to_sigma(0.5))  # shift / (shift + 1)
        return RectifiedFlow(half / (1.0 - half))
    levels = torch.as_tensor(sampling.sigmas).double().cpu().numpy()
    log_alpha = -0.5 * np.log1p(levels**2)
    return VPDiscrete(-np.expm1(2.0 * np.diff(log_alpha, prepend=0.0)))


def scales(plan: Plan, flow: bool) -> np.ndarray:
    """What turns the plan's x into ComfyUI's, at every call and at the end.

    Raises:
        ValueError: the plan starts at pure noise (alpha = 0) and the model is no flow model.
    """
    if not flow and plan.alpha[0] == 0.0:
        raise ValueError(
            f"plan {plan.name!r} starts at pure noise, which only flow models can: make the plan for this model"
        )
    return 1.0 / (plan.alpha + plan.sigma if flow else plan.alpha)


def levels_of(plan: Plan, flow: bool) -> torch.Tensor:
    """The SIGMAS of a plan: ComfyUI's sigma at every call and at the end, (K + 1,) float32."""
    return torch.tensor(plan.sigma * scales(plan, flow), dtype=torch.float32)


def sigmas_of(sampling, kind: str, steps: int, guidance: float = 1.0, denoise: float = 1.0) -> torch.Tensor:
    """SIGMAS of a grid by name, (steps + 1,) float32, ending at 0.

    Args:
        kind: a name in `samplers.grid.GRIDS`, or 'default' for the grid of the default rule at this guidance.
        denoise: below 1, the last `steps` of as many more steps (image to image), as ComfyUI's BasicScheduler.
    """
    if denoise <= 0.0:
        return torch.empty(0)
    total = steps if denoise >= 1.0 else int(steps / denoise)
    schedule = schedule_of(sampling)
    rule = default_solver(total, guidance, schedule, "zero", images=True).grid if kind == DEFAULT else None
    nodes = (rule or Grid(schedule, None if kind == DEFAULT else kind)).nodes(total)
    levels = nodes.sigma if is_flow(sampling) else nodes.sigma / nodes.alpha
    return torch.tensor(levels[-(steps + 1) :], dtype=torch.float32)


def plan_on(schedule: Schedule, sigmas, solver: str, options: dict, guidance: float = 1.0) -> Plan:
    """The plan whose steps are the given sigmas. 'default' chooses the solver by the rule."""
    levels = np.asarray(torch.as_tensor(sigmas).double().cpu())
    if levels[-1] == 0.0:
        grid = Grid(schedule, sigmas=levels)
    else:  # ComfyUI's SplitSigmas: stop above 0
        low, high = schedule.t_limits
        grid = Grid(schedule, times=np.clip(schedule.t_of_noise_level(levels), low, high), end="t_end")
    if solver == DEFAULT:
        if options:
            raise ValueError(f"{', '.join(options)}: options belong to a solver; choose one in place of 'default'")
        return build_plan(schedule, None, grid=grid, prediction="sample", guidance=guidance, images=True)
    return build_plan(schedule, solver, grid=grid, prediction="sample", **options)


# The first six parameters of the next two are those that ComfyUI passes; the others are what KSAMPLER adds.


def by_solver(model, x, sigmas, extra_args=None, callback=None, disable=None, *, solver: str, options: dict):
    """ComfyUI's sampler function for a solver by name. '_cfg_pp' after the name is CFG++."""
    sampling = model_sampling(model)
    guidance = float(getattr(model.inner_model, "cfg", 1.0))
    plan = plan_on(schedule_of(sampling), sigmas, without_cfg_pp(solver), options, guidance)
    run = Run(plan, sigmas, is_flow(sampling), cfg_pp=solver != without_cfg_pp(solver))
    return run(model, x, extra_args or {}, callback)


def by_plan(model, x, sigmas, extra_args=None, callback=None, disable=None, *, plan: Plan):
    """ComfyUI's sampler function for a plan, which has its own sigmas."""
    flow = is_flow(model_sampling(model))
    own, given = levels_of(plan, flow), torch.as_tensor(sigmas).float().cpu()
    if own.shape != given.shape or not torch.allclose(own, given, rtol=1e-4, atol=1e-6):
        raise ValueError(
            f"plan {plan.name!r} has its own {len(plan)} noise levels: connect the SIGMAS output of the same node"
        )
    return Run(plan, own, flow)(model, x, extra_args or {}, callback)


class Run:
    """One run of a plan in ComfyUI's parametrisation."""

    def __init__(self, plan: Plan, sigmas, flow: bool, cfg_pp: bool = False):
        self.plan, self.cfg_pp = plan.for_prediction("sample"), cfg_pp
        self.scale = scales(plan, flow)
        self.levels = plan.sigma * self.scale
        given = np.asarray(torch.as_tensor(sigmas).double().cpu())
        of_call = np.searchsorted(-given, -self.levels[:-1] * (1.0 - 1e-5), "right") - 1  # the last sigma not below
        self.step = np.arange(len(plan)) if len(given) == len(plan) + 1 else of_call.clip(0, len(given) - 2)
        if cfg_pp:
            CFGPlusPlus.check(self.plan)

    def __call__(self, model, x: torch.Tensor, extra_args: dict, callback=None) -> torch.Tensor:
        """x: ComfyUI's initial state. Noise is drawn on the CPU from `extra_args['seed']` + 1, since ComfyUI draws the
        initial noise from the seed itself."""
        plan, seed = self.plan, extra_args.get("seed")
        generator = None if seed is None else torch.Generator().manual_seed((int(seed) + 1) % 2**64)
        extra_args, unconditional = _keeping_uncond(extra_args) if self.cfg_pp else (extra_args, {})

        def draw(needed: bool):
            return randn(x.shape, generator, x.device, torch.float32) if needed else None

        state = plan.begin(x.float() / self.scale[0], draw(bool(plan.start[:, 1].any())))
        for k in range(len(plan)):
            seen = (state.input * self.scale[k]).to(x.dtype)
            denoised = model(seen, seen.new_full((len(x),), self.levels[k]), **extra_args).to(state.input.dtype)
            output = denoised
            if self.cfg_pp:
                state, output = renoised(plan, k, state, denoised, unconditional["x_0"].to(state.input.dtype))
            state = plan.step(k, state, output, draw(plan.needs_noise(k)))
            if callback is not None:
                sigma = self.levels[k]
                about = {"x": seen, "i": int(self.step[k]), "sigma": sigma, "sigma_hat": sigma, "denoised": denoised}
                callback(about)
        return (state.input * self.scale[-1]).to(x.dtype)


def _keeping_uncond(extra_args: dict) -> tuple[dict, dict]:
    """extra_args with a post-CFG function that keeps the unconditional x_0, and where it keeps it."""
    kept: dict = {}

    def keep(args):
        kept["x_0"] = args["uncond_denoised"]
        return args["denoised"]

    options = dict(extra_args.get("model_options", {}))
    options["sampler_post_cfg_function"] = [*options.get("sampler_post_cfg_function", []), keep]
    options["disable_cfg1_optimization"] = True  # ComfyUI leaves out the unconditional model at cfg 1
    return {**extra_args, "model_options": options}, kept
