"""wl-zhao/UniPC."""

from samplers import build_plan
from samplers.solvers.denoise import then_denoise
from samplers.solvers.unipc import unipc

TARGETS = {"data_prediction": "sample", "noise_prediction": "epsilon"}


def run(setting, options):
    denoise = options.pop("denoise_to_zero", False)
    plan = build_plan(
        setting.schedule,
        unipc,
        setting.steps,
        grid=setting.grid(options.pop("skip_type", "time_uniform")),
        order=options.pop("order", 3),
        variant=options.pop("variant", "bh2"),
        target=TARGETS[options.pop("algorithm_type", "data_prediction")],
        lower_order_final=options.pop("lower_order_final", True),
        as_published=True,
    )
    return setting.run(then_denoise(plan, setting.schedule) if denoise else plan)
