"""For tests of `lora: null`: networks all of whose weights are trained, without a run."""

import torch

from diffpo import models
from diffpo.objective import reference
from diffpo.problems.policy import Policy
from diffpo.weights import trained


def ready(config):
    """Family, network and its reference as `train` makes them."""
    family = models.load(config.model, config.train.precision, config.data.resolution)
    weights = trained.load(config, family, "cpu")
    network, parameters = weights.network, weights.begin(config, family)
    return family, network, parameters, reference.make(config.objective.reference, Policy(family, network))


@torch.no_grad()
def move(parameters, seed=0):
    draw = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter += 0.02 * torch.randn(parameter.shape, generator=draw)


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def file_of(folder):
    (found,) = folder.glob("*/diffusion_pytorch_model.safetensors")
    return found
