"""yang-song/score_sde_pytorch: the predictor-corrector sampler, sampling.py."""

import math

from samplers import EDM, Grid, VPLinear, build_plan
from samplers.stochastic import predictor_corrector

from .folder import Unsupported


def run(setting, options):
    sde, eps = options.pop("sde", "vp"), options.pop("eps", None)
    end = "zero" if options.pop("denoise", True) else "t_end"
    if sde == "vp":
        schedule = VPLinear(options.pop("beta_min", 0.1), options.pop("beta_max", 20.0))
        grid = Grid(schedule, "time", end=end, t_end=1e-3 if eps is None else eps)
    elif sde == "ve":
        low, high = options.pop("sigma_min", 0.01), options.pop("sigma_max", 50.0)
        schedule = EDM(low, high)
        t_end = low * math.exp((1e-5 if eps is None else eps) * math.log(high / low))
        grid = Grid(schedule, "logsnr", end=end, t_end=t_end)
    else:
        raise Unsupported(f"sde={sde}")
    setting.schedule = schedule  # the case's own range, and the labels of its model
    corrector, inner = options.pop("corrector", "none"), options.pop("n_steps", 1)
    predictor = options.pop("predictor", "reverse_diffusion")
    each = (predictor != "none") + (inner if corrector != "none" else 0)
    plan = build_plan(
        schedule,
        predictor_corrector,
        setting.steps * each,
        grid,
        predictor=predictor,
        corrector=corrector,
        corrector_steps=inner,
        snr=options.pop("snr", 0.16),
        probability_flow=options.pop("probability_flow", False),
        as_published=True,
    )
    return setting.run(plan, x=setting.z * schedule.init_scale)  # one draw per call, used or not
