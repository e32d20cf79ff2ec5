"""The dynamic programme of zju-pi/diff-sampler's GITS."""

import torch

from samplers.calibrate.gits import shortest_path


def run(setting, options):
    costs = setting.golden[options.pop("cost")].numpy()
    assert len(costs) == options.pop("num_steps_tea")
    return torch.tensor(shortest_path(costs, options.pop("num_steps"), options.pop("coeff")))
