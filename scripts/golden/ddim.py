"""CompVis DDIMSampler."""

from samplers import Grid, build_plan


def run(setting, options):
    options.pop("discretize", None)  # the labels are listed in the case
    grid = Grid(setting.schedule, timesteps=setting.case["timesteps"], end="t_end", t_end=setting.t_end)
    return setting.run(build_plan(setting.schedule, "ddim", grid=grid, eta=options.pop("eta")))
