"""wl-zhao/DC-Solver."""

import torch

from samplers import Grid
from samplers.calibrate import Batch
from samplers.calibrate.compensation import Base, search_ratios
from samplers.calibrate.ratios import published_ratios
from samplers.solvers.dc import dc_solver, with_predictor

VARIANTS = {"order": 3, "variant": "bh2", "lower_order_final": True}


def run(setting, options):
    grid = setting.grid(options.pop("skip_type", "time_uniform"))
    settings = {name: options.pop(name, default) for name, default in VARIANTS.items()}
    settings["target"] = "sample" if options.pop("predict_x0", True) else "epsilon"
    ratios, dc_order = options.pop("dc_ratios"), options.pop("dc_order", 2)
    return setting.run(dc_solver(grid, setting.steps, ratios=ratios, dc_order=dc_order, **settings))


def run_diffusers(setting, options):
    settings = {
        "order": options.pop("solver_order", 2),
        "variant": options.pop("solver_type", "bh2"),
        "disable_corrector": options.pop("disable_corrector", [0]),
        "lower_order_final": options.pop("lower_order_final", True),
    }
    kind = options.pop("prediction_type", "epsilon")
    grid = Grid(setting.schedule, timesteps=setting.case["timesteps"], end="t_end")
    plan = dc_solver(grid, setting.steps, ratios=options.pop("dc_ratios"), **settings)
    return setting.run(plan.for_prediction(kind))


def search(setting, options):
    settings = {name: options.pop(name, default) for name, default in VARIANTS.items()}
    plan, predictor = with_predictor(setting.grid("time_uniform"), setting.steps, "unipc", settings)
    dc = Base(plan.for_prediction("epsilon"), predictor.for_prediction("epsilon"))
    reference = options.pop("reference")
    states, times = (setting.golden[f"{reference}.{name}"] for name in ("xs", "ts"))
    # the authors' state at a time is the one of the nearest label above
    target = [states[int((times > t).nonzero()[-1])].view(setting.x.shape) for t in plan.t[1:]]
    model = setting.data.model(setting.schedule, "epsilon", setting.classes, setting.scale)
    ratios = search_ratios(dc, [Batch(model, setting.x, target[-1])], [[setting.x, *target]], _adamw)
    return setting.run(dc.with_ratios(ratios))


def _adamw(loss):
    """The published settings."""
    ratio = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.AdamW([ratio], lr=0.1, weight_decay=0.01)
    for _ in range(40):
        optimiser.zero_grad()
        loss(ratio).backward()
        optimiser.step()
    return ratio.item()


def regression(setting, options):
    coefficients = setting.golden[options.pop("coeffs")].numpy()
    return torch.from_numpy(published_ratios(coefficients, options.pop("nfe"), options.pop("cfg")))
