"""Scores of tensors with gradients: equal to those of PIL pictures, and their slopes are those of finite differences.

Weights cannot be downloaded here, so the networks are tiny random ones of the same kind (see test_scorers.py).
"""

import numpy as np
import pytest
import step_scorers
import tiny_scorers
import torch
from PIL import Image
from torchvision.transforms import Compose, Grayscale, ToTensor
from torchvision.transforms.functional import to_tensor

from diffpo import scorers
from diffpo.common.errors import DiffpoError
from diffpo.scorers import hps, tensors
from diffpo.scorers.judge import Judge
from diffpo.scorers.step.latent import LatentScorer
from diffpo.scorers.step.pixel import StepAwareScorer

PROMPTS = ["a red circle", "two squares"]
NAMES = ("pickscore", "hps", "hps2.0", "imagereward", "mps", "clip", "aesthetic")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(name): a scorer with a tiny random network."""
    return tiny_scorers.make(tmp_path_factory.mktemp("scorers")).__getitem__


def smooth(size, seed=0):
    """A picture such as photographs are, (H, W)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)


def test_every_differentiable_scorer_is_here():
    assert scorers.DIFFERENTIABLE == NAMES


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (81, 50), (32, 32)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_equal_to_the_scores_of_pictures(made, name, size):
    scorer, images = made(name), [smooth(size, seed) for seed in range(2)]
    expected = scorer.score(images, PROMPTS)[name]
    found = scorer.rate(torch.stack([to_tensor(image) for image in images]), PROMPTS)[name]
    scale = 1e-6 if name.startswith("hps") else 1e-2 * max(1.0, abs(expected).max())  # hps resizes tensors in both
    assert found.detach().numpy() == pytest.approx(expected, abs=scale)


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (81, 50)], ids=str)
def test_prepared_pictures_are_pils_within_a_level_or_two(made, size):
    """open_clip's transform and CLIP's processor on 8-bit pictures, in units of 1/255 before they are normalised."""
    image = smooth(size)
    spread = min(hps.STD)
    clip, pick = made("clip"), made("pickscore")
    by_pil = [
        clip.transform(image),
        pick.processor.image_processor(images=[image], return_tensors="pt").pixel_values[0],
    ]
    by_us = [
        tensors.by_transform(to_tensor(image)[None], clip.transform, "clip")[0],
        tensors.by_processor(to_tensor(image)[None], pick.processor.image_processor)[0],
    ]
    for one, other in zip(by_us, by_pil, strict=True):
        assert one.shape == other.shape
        assert 255 * spread * (one - other).abs().max() < 2.0
        assert 255 * spread * (one - other).abs().mean() < 0.4


@pytest.mark.parametrize("name", NAMES)
def test_slopes_are_those_of_finite_differences(made, name):
    scorer = made(name)
    network = [part for part in vars(scorer).values() if isinstance(part, torch.nn.Module)]
    try:
        for each in network:
            each.double()
        pixels = torch.stack([to_tensor(smooth((40, 48), seed)) for seed in range(2)]).double() * 0.8 + 0.1
        pixels.requires_grad_()
        (slope,) = torch.autograd.grad(scorer.rate(pixels, PROMPTS)[name].sum(), pixels)
        direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        up, down = (scorer.rate(pixels.detach() + s * 1e-5 * direction, PROMPTS)[name].sum() for s in (1, -1))
    finally:
        for each in network:
            each.float()
    assert float((slope * direction).sum()) == pytest.approx(float(up - down) / 2e-5, rel=2e-3)
    assert all(parameter.grad is None for each in network for parameter in each.parameters())


def test_a_transform_that_is_not_known_is_refused(made):
    transform = Compose([Grayscale(3), ToTensor()])
    with pytest.raises(DiffpoError, match="clip has no gradient: Grayscale"):
        tensors.by_transform(torch.zeros(1, 3, 8, 8), transform, "clip")


@pytest.mark.parametrize("kind", ["pixel", "latent"])
def test_step_aware_scorers_have_slopes_by_the_latents(tiny_sd, tiny_clip, kind):
    family, network = step_scorers.family_of(tiny_sd)
    x_t, x_0, t, captions, cond = step_scorers.inputs(family)
    scorer = (
        StepAwareScorer.fresh(family, str(tiny_clip), None, True, 0)
        if kind == "pixel"
        else LatentScorer.fresh(family, network, x_t, t, cond, 0)
    )
    scorer.module.eval().requires_grad_(False)
    x = (x_0 if kind == "pixel" else x_t).clone().requires_grad_()

    def rate(x):
        return scorer.rate(*((x_t, x) if kind == "pixel" else (x, x_0)), t, captions, cond).sum()

    (slope,) = torch.autograd.grad(rate(x), x)
    direction = slope / slope.norm()  # a random one has a slope near 0
    with torch.no_grad():
        up, down = (rate(x + s * 1e-2 * direction) for s in (1, -1))
    assert float(slope.norm()) == pytest.approx(float(up - down) / 2e-2, rel=1e-2)
    assert torch.allclose(scorer.score(x_t, x_0, t, captions, cond), scorer.rate(x_t, x_0, t, captions, cond))


def test_the_judge_names_a_scorer_without_gradient():
    judge = Judge(["shapes.total"])
    with pytest.raises(
        DiffpoError, match=r"shapes\.total has no gradient.*pickscore, hps, hps2\.0, imagereward, mps, clip, aesthetic"
    ):
        judge.require_gradients()


def test_the_judge_checks_rates(monkeypatch):
    class Scorer:
        names, optional = ("shapes.total",), frozenset()

        def rate(self, pixels, prompts):
            return {"shapes.total": self.values}

    scorer = Scorer()
    monkeypatch.setattr("diffpo.scorers.judge.scorers.load", lambda spec, device: scorer)
    judge, pixels = Judge(["shapes.total"]), torch.zeros(2, 3, 4, 4)
    judge.require_gradients()
    scorer.values = torch.tensor([0.5, 0.25])
    assert judge.rate(pixels, PROMPTS)[:, 0].tolist() == [0.5, 0.25]
    scorer.values = torch.tensor([0.5, float("nan")])
    with pytest.raises(DiffpoError, match="nan for an image of the prompt 'two squares'"):
        judge.rate(pixels, PROMPTS)
    scorer.values = torch.tensor(0.5)
    with pytest.raises(DiffpoError, match=r"Tensor of shape \(\) for 2 images"):
        judge.rate(pixels, PROMPTS)
