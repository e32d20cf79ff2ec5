"""ShiguiLi/EVODiff: EVODiff_edm."""

from samplers import build_plan
from samplers.solvers.denoise import then_denoise
from samplers.solvers.evodiff import evodiff


def run(setting, options):
    denoise, lower = options.pop("denoise_to_zero", False), options.pop("lower_order_final", True)
    calls = setting.steps + (not lower)
    grid = setting.grid(options.pop("skip_type", "logSNR"))
    plan = build_plan(setting.schedule, evodiff, calls, grid, lower_order_final=lower, as_published=True)
    return setting.run(then_denoise(plan, setting.schedule) if denoise else plan)
