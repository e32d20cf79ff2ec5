"""For tests of on-policy objectives: scorers by brightness, an accelerator, shaken weights."""

import numpy as np
import torch

PROMPTS = ["red cat", "blue dog", "a bird", "two fish", "sky"]


class Brightness:
    """The mean of the red channel: an analytic score."""

    names = ("shapes.total",)
    optional = frozenset()

    def score(self, images, prompts):
        return {"shapes.total": np.array([np.asarray(image)[..., 0].mean() / 255 for image in images])}


class Redness(Brightness):
    """The same with gradients, under a name of its own."""

    names = ("redness",)

    def score(self, images, prompts):
        return {"redness": super().score(images, prompts)["shapes.total"]}

    def rate(self, pixels, prompts):
        return {"redness": pixels[:, 0].mean((1, 2))}


class StepBrightness:
    def __init__(self):
        self.calls = []

    def score(self, x_t, x_0, t, captions, cond):
        self.calls.append((x_t, x_0, t, captions, cond))
        return x_0.mean((1, 2, 3))


@torch.no_grad()
def shake(parameters, seed):
    draw = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
