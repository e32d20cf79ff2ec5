"""LuChengTHU/dpm-solver: DPM-Solver and DPM-Solver++."""

from functools import partial

from samplers import build_plan, dynamic_threshold

from .folder import Unsupported

OUTPUTS = {"noise": "epsilon", "x_start": "sample", "v": "v_prediction", "score": "score"}


def run(setting, options):
    steps, algorithm = setting.steps, options.pop("algorithm_type", "dpmsolver++")
    if options.pop("method", "multistep") != "multistep":
        raise Unsupported("method")
    options.pop("guidance_type", None)  # classifier guidance of an exact model is the same function
    settings = {}
    if options.pop("thresholding", False):
        ratio, floor = options.pop("dynamic_thresholding_ratio", 0.995), options.pop("thresholding_max_val", 1.0)
        settings["threshold"] = partial(dynamic_threshold, ratio=ratio, floor=floor)
    plan = build_plan(
        setting.schedule,
        "dpmpp",
        steps,
        grid=setting.grid(options.pop("skip_type", "time_uniform")),
        prediction=OUTPUTS[options.pop("model_output", "noise")],
        order=options.pop("order", 2),
        solver_type={"dpmsolver": "midpoint", "taylor": "heun"}[options.pop("solver_type", "dpmsolver")],
        # the official code stops lowering at 10 steps
        lower_order_final=options.pop("lower_order_final", True) and steps < 10,
        target="sample" if algorithm == "dpmsolver++" else "epsilon",
        as_published=True,
    )
    return setting.run(plan, **settings)
