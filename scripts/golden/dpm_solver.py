"""LuChengTHU/dpm-solver: DPM-Solver and DPM-Solver++."""

from functools import partial

from samplers import Grid, build_plan, dynamic_threshold
from samplers.adaptive import sample_adaptive
from samplers.solvers.singlestep import singlestep

OUTPUTS = {"noise": "epsilon", "x_start": "sample", "v": "v_prediction", "score": "score"}
TYPES = {"dpmsolver": "midpoint", "taylor": "heun"}


def run(setting, options):
    method, order, steps = options.pop("method", "multistep"), options.pop("order", 2), setting.steps
    algorithm, solver_type = options.pop("algorithm_type", "dpmsolver++"), options.pop("solver_type", "dpmsolver")
    skip_type, lower = options.pop("skip_type", "time_uniform"), options.pop("lower_order_final", True)
    prediction, denoise = OUTPUTS[options.pop("model_output", "noise")], options.pop("denoise_to_zero", False)
    options.pop("guidance_type", None)  # classifier guidance of an exact model is the same function
    ratio, floor = options.pop("dynamic_thresholding_ratio", 0.995), options.pop("thresholding_max_val", 1.0)
    threshold = None
    if options.pop("thresholding", False):
        threshold = partial(dynamic_threshold, ratio=ratio, floor=floor)
    plus = algorithm == "dpmsolver++"
    common = {
        "order": order,
        "target": "sample" if plus else "epsilon",
        "solver_type": TYPES[solver_type],
        "prediction": prediction,
    }
    settings = {"threshold": threshold if plus else None}  # noise prediction is thresholded in the last call only
    if method == "adaptive":
        common |= {name: options.pop(name) for name in ("rtol", "atol") if name in options}
        common |= {"schedule": setting.schedule, "t_start": setting.t_start, "t_end": setting.t_end}
        out, effort = sample_adaptive(setting.model(prediction), setting.x, **common, **settings)
        assert effort.calls == setting.calls
    else:
        common |= {"grid": setting.grid(skip_type), "as_published": True}
        if method == "multistep":  # the official code stops lowering at 10 steps
            plan = build_plan(setting.schedule, "dpmpp", steps, lower_order_final=lower and steps < 10, **common)
        else:
            fixed = method == "singlestep_fixed"
            calls = steps // order * order if fixed else steps
            plan = build_plan(setting.schedule, singlestep, calls, fixed=fixed, **common)
        out = setting.run(plan, **settings)
    if denoise:  # one DDIM step to sigma = 0
        last = Grid(setting.schedule, times=[setting.t_end])
        out = setting.run(build_plan(setting.schedule, "ddim", 1, last, prediction), out, threshold=threshold)
    return out
