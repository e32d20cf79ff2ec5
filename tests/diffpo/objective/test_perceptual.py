from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler

from diffpo import models
from diffpo.config import Lora, Model, ReferenceSettings
from diffpo.data.judgement import Judgement
from diffpo.objective import reference, reward
from diffpo.objective.perceptual import Perceptual
from diffpo.problems.policy import Policy
from diffpo.problems.regression import Conditioning, Regression
from diffpo.weights.lora import add_lora

PIPELINES = ("tiny_sd", "tiny_sd_v", "tiny_sdxl")


def conditions(unet, rows, seed=0):
    draw = torch.Generator().manual_seed(seed)
    cond = {"prompt_embeds": torch.randn(rows, 6, unet.config.cross_attention_dim, generator=draw)}
    if unet.config.addition_embed_type:
        cond["pooled_prompt_embeds"] = torch.randn(rows, 16, generator=draw)
        cond["time_ids"] = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).repeat(rows, 1)
    return cond


def problem(family, unet, t=(700, 40, 700, 40)):
    draw = torch.Generator().manual_seed(1)
    x_0, eps = torch.randn(2, len(t), 4, 8, 8, generator=draw)
    t = torch.tensor(t)
    regression = Regression(
        x_t=family.add_noise(x_0, eps, t),
        t=t,
        target=family.target(x_0, eps, t),
        conditioning=Conditioning(conditions(unet, len(t))),
        judgement=Judgement(torch.ones(len(t) // 2)),
    )
    prediction = regression.target + 0.3 * torch.randn(x_0.shape, generator=draw)
    return regression, prediction, x_0, eps


@pytest.fixture(params=PIPELINES)
def family(request):
    return models.load(Model(path=str(request.getfixturevalue(request.param))))


def in_float64(perceptual):
    perceptual.encoder.double()
    perceptual.family.dtype = torch.float64
    return perceptual


def widened(regression):
    return Regression(
        x_t=regression.x_t.double(),
        t=regression.t,
        target=regression.target.double(),
        conditioning=Conditioning({name: value.double() for name, value in regression.conditioning.cond.items()}),
        judgement=regression.judgement,
    )


def features_of_the_whole_network(family, unet, x, t, cond, middle=False):
    """What the last down block (or the middle block) gives in diffusers' own, complete forward pass."""
    seen = []
    block = unet.mid_block if middle else unet.down_blocks[-1]
    handle = block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    family.predict(unet, x, t, cond)
    handle.remove()
    return seen[0] if middle else seen[0][0]


@torch.no_grad()
@pytest.mark.parametrize("middle", [False, True])
def test_distance_of_features_between_two_steps_of_diffusers_ddpm(family, middle):
    unet = family.load_network()
    regression, prediction, x_0, eps = problem(family, unet)
    perceptual = Perceptual(family, unet, middle)
    errors = perceptual(prediction, regression)

    ddpm = DDPMScheduler.from_pretrained(family.settings.path, subfolder="scheduler", clip_sample=False)
    for row, t in enumerate(regression.t.tolist()):
        # with the same noise in both, their difference is that of the means
        predicted, true = (
            ddpm.step(
                output[row : row + 1], t, regression.x_t[row : row + 1], generator=torch.Generator().manual_seed(5)
            ).prev_sample
            for output in (prediction, regression.target)
        )
        before = torch.tensor([t - 1])
        x = family.add_noise(x_0[row : row + 1], eps[row : row + 1], before)
        cond = {name: value[row : row + 1] for name, value in regression.conditioning.cond.items()}
        one = features_of_the_whole_network(family, unet, x + predicted - true, before, cond, middle)
        other = features_of_the_whole_network(family, unet, x, before, cond, middle)
        torch.testing.assert_close(errors[row], (one - other).square().mean(), rtol=2e-2, atol=0)


@torch.no_grad()
def test_zero_for_a_perfect_prediction_and_at_t_0(family):
    unet = family.load_network()
    regression, prediction, *_ = problem(family, unet, t=(0, 1, 999, 500))
    perceptual = Perceptual(family, unet)
    assert perceptual(regression.target, regression).tolist() == [0] * 4
    errors = perceptual(prediction, regression)
    assert errors.shape == (4,) and errors.dtype == torch.float32
    assert errors[0] == 0 and (errors[1:] > 0).all()


def test_gradient_by_the_prediction_is_the_slope_of_the_error(family):
    unet = family.load_network()
    regression, prediction, *_ = problem(family, unet)
    perceptual = in_float64(Perceptual(family, unet))
    regression, prediction = widened(regression), prediction.double().requires_grad_()
    perceptual(prediction, regression).sum().backward()
    assert not any(weight.requires_grad for weight in perceptual.encoder.parameters())

    direction = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        h = 1e-4
        up, down = (perceptual(prediction + sign * h * direction, regression).sum() for sign in (1, -1))
        slope = (up - down) / (2 * h)
    torch.testing.assert_close((prediction.grad * direction).sum(), slope, rtol=1e-6, atol=0)


def test_half_precision_training_does_not_reach_the_features(tiny_sd):
    full, half = (models.load(Model(path=str(tiny_sd)), precision) for precision in ("no", "bf16"))
    unet = half.load_network()
    regression, prediction, *_ = problem(full, unet)
    with torch.autocast("cpu", torch.bfloat16):
        errors = Perceptual(half, unet)(prediction, regression)
    torch.testing.assert_close(errors, Perceptual(full, full.load_network())(prediction, regression), rtol=0, atol=0)
    assert half.dtype == torch.bfloat16  # the run's own family is left alone


def test_gradient_checkpointing_changes_nothing(tiny_sdxl):
    family, gradients = models.load(Model(path=str(tiny_sdxl))), []
    for checkpointing in (False, True):
        unet = family.load_network()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        perceptual = Perceptual(family, unet)
        assert perceptual.encoder.is_gradient_checkpointing == checkpointing
        regression, prediction, *_ = problem(family, unet)
        prediction.requires_grad_()
        perceptual(prediction, regression).sum().backward()
        gradients.append(prediction.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_as_the_error_of_an_objective(tiny_sdxl):
    """Rewards begin at exactly 0; the LoRA gets a gradient; the true state's features are computed once."""
    family = models.load(Model(path=str(tiny_sdxl)))
    unet = family.load_network()
    parameters = add_lora(unet, Lora(rank=4), family.lora_targets)
    perceptual = Perceptual(family, unet)
    calls = []
    perceptual.encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    settings = SimpleNamespace(
        strength=5000, winner_safeguard=None, clip=None, divergence="reverse_kl", divergence_alpha=0.5, kl=0.0
    )
    objective = reward.Objective(
        settings=settings,
        reference=reference.make(ReferenceSettings(), Policy(family, unet)),
        omega=lambda t: torch.ones(len(t)),
        perceptual=perceptual,
    )
    regression, *_ = problem(family, unet)
    outcome = reward.score(Policy(family, unet), objective, regression)
    assert outcome.reward.tolist() == [0] * 4 and (outcome.error > 0).all()
    assert len(calls) == 3
    outcome.reward.chunk(2)[0].sum().backward()
    assert sum(parameter.grad.abs().sum() for parameter in parameters) > 0
