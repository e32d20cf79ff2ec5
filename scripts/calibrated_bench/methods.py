"""The methods of the bench. A family is what a reader would call one method; its best setting is chosen, not reported.

Families of uncalibrated methods: the default rule; our classical solvers; each diffusers scheduler; what users of
ComfyUI run; DualFast and EVODiff. Calibrated ones are `samplers.calibrate.METHODS` and GITS's nodes.
"""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import diffusers
import torch
from sampler_bench import theirs
from sampler_bench.tiny import ASSETS

from samplers import Plan, Statistics, VPDiscrete, build_plan, dualfast
from samplers.calibrate import METHODS
from samplers.calibrate.baseline import CLASSICAL, GRIDS

from .nodes import gits
from .store import content_of, digest
from .worlds import World

RULE = "default rule"
COMFYUI = ("euler", "dpmpp_2m", "res_multistep", "res_2s", "res_3m", "uni_pc_bh2", "gradient_estimation")
COMFYUI_GRIDS = ("karras", "beta57", "beta_time", "sgm_uniform", "simple", "kl_optimal", "linear_quadratic", "tangent")
EVODIFF_GRIDS = ("logsnr", "karras", "time", "kl_optimal")
DUALFAST = tuple(product((("ddim", {}), ("dpmpp", {"order": 2})), ("logsnr", "karras"), (0.25, 0.5, 1.0)))


@dataclass(frozen=True, eq=False)
class Candidate:
    """A method at one setting: `plan`, to sigma = 0, or `run(problem, calls) -> (latents, end)`. key: its content."""

    family: str
    name: str
    key: str
    plan: Plan | None = None
    run: Callable | None = None

    @classmethod
    def of(cls, family: str, name: str, plan: Plan) -> Candidate:
        return cls(family, name, content_of(plan), plan)

    def latents(self, part, calls: int) -> tuple[torch.Tensor, str]:
        """ValueError where it cannot make so many calls, FloatingPointError where a number overflows."""
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            if self.plan is None:
                return self.run(part, calls)
            return self.plan.run(part.model, part.z, prediction=part.prediction, check_finite=False), "zero"


def uncalibrated(world: World, calls: int, families: list[str] | None = None) -> list[Candidate]:
    """Every setting that makes so many calls. `families`: those whose name contains one of these words."""
    found = [*_ours(world, calls), *_comfyui(world, calls), *_newer(world, calls)]
    for name, method in theirs.methods(world.prediction).items():
        kind, config = method.args
        options = sorted(str(item) for item in config.items() if not callable(item[1]))
        key = digest("diffusers", diffusers.__version__, kind, options, calls)
        found.append(Candidate(f"diffusers {kind}", name, key, run=method))
    return [c for c in found if families is None or any(word in c.family for word in families)]


def _ours(world: World, calls: int) -> list[Candidate]:
    common = {"prediction": world.prediction}
    own = {"guidance": world.guidance, "images": world.images}
    rule = build_plan(world.schedule, None, calls, end="zero", **own, **common)
    found = [Candidate.of(RULE, rule.name, rule)]
    for (solver, options), grid in product(CLASSICAL, GRIDS):
        family = " ".join(["samplers", solver, *map(str, options.values())])
        found += _built(family, f"{family} {grid}", world, solver, calls, grid, options)
    return found


def _comfyui(world: World, calls: int) -> list[Candidate]:
    tables = ("ays", "ays_sdxl", "gits") if isinstance(world.schedule, VPDiscrete) else ("optimal_steps",)
    grids = [*COMFYUI_GRIDS, *tables]
    found = []
    for solver, grid in product(COMFYUI, grids):
        found += _built(f"ComfyUI {solver}", f"ComfyUI {solver} {grid}", world, solver, calls, grid, {})
    return found


def _newer(world: World, calls: int) -> list[Candidate]:
    found = []
    for grid in EVODIFF_GRIDS:
        found += _built("EVODiff", f"EVODiff {grid}", world, "evodiff", calls, grid, {})
    for (solver, options), grid, c in DUALFAST:
        for each in _built("DualFast", f"DualFast {solver} {grid} c={c:g}", world, solver, calls, grid, options):
            try:
                found.append(Candidate.of(each.family, each.name, dualfast(each.plan, c)))
            except ValueError:  # a call at alpha = 0
                continue
    return found


def _built(family: str, name: str, world: World, solver: str, calls: int, grid: str, options: dict) -> list[Candidate]:
    try:
        plan = build_plan(world.schedule, solver, calls, grid, world.prediction, **options)
    except ValueError:  # more order than calls, or a grid that needs alpha > 0 at the start
        return []
    return [Candidate.of(family, name, plan)]


def calibrated(world: World | None = None, budget: int | None = None) -> dict[str, Callable[..., Plan]]:
    """Every method that fits numbers to a model. `classical` fits none: it chooses among uncalibrated plans.

    Args:
        world: what is fitted to; `v3` takes its statistics of assets/calibrated, if they are there.
        budget: of `searched`; None: its default.
    """
    found = {**{name: method for name, method in METHODS.items() if name != "classical"}, "gits": gits}
    if world is not None and "v3" in found:
        path = ASSETS / "calibrated" / world.model_name / f"statistics-g{world.guidance:g}.safetensors"
        if path.exists():
            found["v3"] = partial(found["v3"], statistics=Statistics.load(path))
    if budget is not None and "searched" in found:
        found["searched"] = partial(found["searched"], budget=budget)
    return found


def source_of(method: Callable) -> str:
    """A digest of the method's options, and of the code of its module and of those that it takes functions from."""
    function, options = (method.func, method.keywords) if isinstance(method, partial) else (method, {})
    given = [(name, content_of(x) if isinstance(x, Statistics) else x) for name, x in sorted(options.items())]
    own = inspect.getmodule(function)
    used = {inspect.getmodule(value) for value in vars(own).values() if inspect.isfunction(value)} | {own}
    fitting = [m for m in used if m is own or m.__name__.startswith("samplers.calibrate.")]
    code = [ast.dump(ast.parse(inspect.getsource(m))) for m in sorted(fitting, key=lambda m: m.__name__)]  # no comments
    return digest(*code, *given)
