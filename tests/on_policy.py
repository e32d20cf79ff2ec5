"""For tests of on-policy objectives: scorers by brightness, shaken weights, short runs."""

import numpy as np
import pytest
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


ROLLOUT = (
    "data.train=null",
    "data.prompts=shapes:train:6",
    "objective.rollout.prompts=4",
    "objective.rollout.updates=2",
    "objective.rollout.steps=4",
    "objective.rollout.guidance=2.0",
    "objective.rollout.scorers=[shapes.total]",
)
METHODS = {
    "d3po": (),
    "spo": (
        "objective.rollout.step_scorer=shapes.total",
        "objective.rollout.start=1",
        "objective.rollout.pool=3",
        "objective.rollout.threshold=0",
    ),
    "online_dpo": (),
    "diffusion_nft": ("objective.rollout.samples=3",),
    # ratios to a copy in the second update, KL divergence to the base, steps with earlier outputs
    "flow_grpo": (
        "objective.rollout.samples=3",
        "objective.rollout.step=dpmpp",
        "objective.rollout.step_options={eta: 1.0}",
        "objective.link_options={clip: 0.5}",
    ),
}
CLOCK = {"time", "pairs_per_second"}


def options(name: str, *more: str) -> list[str]:
    return [f"objective.name={name}", "objective.beta=500", *ROLLOUT, *METHODS[name], *more]


def same(one, other) -> None:
    """To float tolerance, in all that is logged but the clock, and in the weights."""
    for ours, theirs in zip(one[1], other[1], strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - CLOCK - {"rewards/accuracies"}:  # rewards near 0 change sign by rounding
            assert ours[key] == pytest.approx(theirs[key], rel=5e-3, abs=2e-4), key
    for name, value in one[0].items():
        torch.testing.assert_close(value, other[0][name], rtol=2e-3, atol=2e-6)
    assert sum(value.abs().sum() for name, value in one[0].items() if "lora_B" in name) > 1e-4
