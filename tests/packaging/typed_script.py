"""What a user writes, for mypy (`make lint` checks it): right calls have types, and wrong ones are errors.

An ignored error that mypy does not find is an error itself (warn_unused_ignores).
"""

from pathlib import Path
from typing import assert_type

import torch

import samplers
from diffpo.config import Config, load_config
from diffpo.evaluation.generation import Generation
from diffpo.export.export import Export

betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64).tolist()
schedule = samplers.VPDiscrete(betas)
plan = samplers.build_plan(schedule, "dpmpp", 10, prediction="epsilon")
assert_type(plan, samplers.Plan)
noise = torch.randn(2, 4, 8, 8)
x = samplers.sample(lambda x, t: 0.1 * x, noise, schedule=schedule, steps=10, prediction="epsilon")
assert_type(x, torch.Tensor)
samplers.build_plan(schedule, "dpmpp", "ten", prediction="epsilon")  # type: ignore[arg-type]
samplers.sample(lambda x, t: x, noise, schedule=betas, prediction="epsilon")  # type: ignore[arg-type]

config = load_config(Path("configs/quickstart.yaml"), ["train.steps=2"])
assert_type(config, Config)
assert_type(config.train.steps, int)
config.train.stepz  # type: ignore[attr-defined]  # noqa: B018
Generation(model="assets/tiny-sdxl", steps="10")  # type: ignore[arg-type]
assert_type(Export(lora="run", to="kohya", model="base", out="out").scale, float)
