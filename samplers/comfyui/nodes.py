"""The nodes. Each makes ComfyUI's SAMPLER, SIGMAS or both, for SamplerCustom and SamplerCustomAdvanced."""

from __future__ import annotations

import json

from samplers import SOLVERS, Plan, build_plan
from samplers.grid import GRIDS
from samplers.solvers import ALIASES

from .run import DEFAULT, by_plan, by_solver, is_flow, levels_of, schedule_of, sigmas_of

CATEGORY = "sampling/custom_sampling/samplers"
CFG_PP = ("euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "res_multistep", "gradient_estimation", "er_sde")
PLAIN = [DEFAULT, *sorted({*SOLVERS, *ALIASES})]
NAMES = [*PLAIN, *(f"{name}_cfg_pp" for name in CFG_PP)]
OPTIONS = ("STRING", {"default": "{}", "multiline": True, "tooltip": 'the solver\'s options as JSON: {"order": 3}'})
STEPS = {"default": 20, "min": 1, "max": 10000}
GUIDANCE = ("FLOAT", {"default": 5.0, "min": 0.0, "max": 100.0, "tooltip": "the CFG scale, for the default rule only"})


def _options(text: str) -> dict:
    try:
        options = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f'options are not JSON ({error}): write them like {{"order": 3}}') from None
    if not isinstance(options, dict):
        raise ValueError(f'options must be a JSON object such as {{"order": 3}}, got {text}')
    return options


def _sampler(function, **options):
    import comfy.samplers

    return comfy.samplers.KSAMPLER(function, options)


class SolverNode:
    """A solver by name. It works with the SIGMAS of any scheduler; the steps are those of the SIGMAS."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("SAMPLER",), "sampler", CATEGORY
    DESCRIPTION = "A solver of the samplers package. '_cfg_pp' is CFG++: set the guider's cfg to 0.5 to 1."

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"solver": (NAMES,), "options": OPTIONS}}

    def sampler(self, solver: str, options: str):
        return (_sampler(by_solver, solver=solver, options=_options(options)),)


class GridNode:
    """Where the steps lie: a grid by name, or that of the default rule."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("SIGMAS",), "sigmas", CATEGORY
    DESCRIPTION = "Noise levels of a grid of the samplers package; 'default' is the rule's, by steps and guidance."

    @classmethod
    def INPUT_TYPES(cls):
        denoise = ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01})
        grid = ([DEFAULT, *GRIDS],)
        steps = ("INT", STEPS)
        return {
            "required": {"model": ("MODEL",), "grid": grid, "steps": steps, "guidance": GUIDANCE, "denoise": denoise}
        }

    def sigmas(self, model, grid: str, steps: int, guidance: float, denoise: float):
        return (sigmas_of(model.get_model_object("model_sampling"), grid, steps, guidance, denoise),)


class PlanNode:
    """A solver on its own nodes: `calls` counts the model calls, also of solvers with several per step."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("SAMPLER", "SIGMAS"), "plan", CATEGORY
    DESCRIPTION = "A solver and a grid as one plan of so many model calls. Connect both outputs."

    @classmethod
    def INPUT_TYPES(cls):
        grid = ([DEFAULT, *GRIDS],)
        calls = ("INT", STEPS)
        return {
            "required": {
                **{"model": ("MODEL",), "solver": (PLAIN,), "options": OPTIONS},
                **{"grid": grid, "calls": calls, "guidance": GUIDANCE},
            }
        }

    def plan(self, model, solver: str, options: str, grid: str, calls: int, guidance: float):
        sampling = model.get_model_object("model_sampling")
        name, kind = (None if given == DEFAULT else given for given in (solver, grid))
        own: dict = {"guidance": guidance, "images": True, **_options(options)}
        plan = build_plan(schedule_of(sampling), name, calls, kind, "sample", **own)
        return _sampler(by_plan, plan=plan), levels_of(plan, is_flow(sampling))


class PlanFileNode:
    """A plan from a file, for example one that was calibrated for the checkpoint."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("SAMPLER", "SIGMAS"), "plan", CATEGORY
    DESCRIPTION = "A plan written by samplers.Plan.save. Connect both outputs."

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "path": ("STRING", {"default": "plan.safetensors"})}}

    def plan(self, model, path: str):
        plan = Plan.load(path)
        return _sampler(by_plan, plan=plan), levels_of(plan, is_flow(model.get_model_object("model_sampling")))


NODE_CLASS_MAPPINGS = {
    "SamplersSolver": SolverNode,
    "SamplersGrid": GridNode,
    "SamplersPlan": PlanNode,
    "SamplersPlanFile": PlanFileNode,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "SamplersSolver": "Solver (samplers)",
    "SamplersGrid": "Grid (samplers)",
    "SamplersPlan": "Solver and grid (samplers)",
    "SamplersPlanFile": "Plan file (samplers)",
}
