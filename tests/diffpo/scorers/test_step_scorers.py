"""The scorers themselves: what they compute, from what, and what they refuse."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from step_scorers import family_of, inputs

from diffpo import models
from diffpo.common.errors import DiffpoError
from diffpo.config import Lora, Model
from diffpo.scorers.step import base as steps
from diffpo.scorers.step import latent, load
from diffpo.scorers.step.pixel import StepAware, StepAwareScorer
from diffpo.train.step_scorer import train_scorer
from diffpo.weights import trained

ASSETS = Path(__file__).parents[3] / "assets"

# ---- the pixel scorer


def test_a_fresh_step_aware_clip_is_the_clip_itself_at_every_time(tiny_clip, tiny_sd):
    from transformers import CLIPModel

    plain = CLIPModel.from_pretrained(tiny_clip)
    family, _ = family_of(tiny_sd)
    scorer = StepAwareScorer.fresh(family, str(tiny_clip), None, True, seed=0)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    text = scorer.tokenizer(["cat", "a dog"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = plain(**text, pixel_values=pixels).logits_per_image.diagonal()
        for t in (0, 1, 500, 999):
            found = scorer.module(pixels, torch.full((2,), t), text.input_ids, text.attention_mask)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_modulation_is_adaptive_layer_norm(tiny_clip):
    """The hooks against the layer written out: x += g1 attn(n1(x)(1+s1)+b1); x += g2 mlp(n2(x)(1+s2)+b2)."""
    from transformers import CLIPModel

    module = StepAware(CLIPModel.from_pretrained(tiny_clip)).double().eval()
    for linear in [*module.time["layers"], module.time["last"]]:
        torch.nn.init.normal_(linear.weight, std=0.3, generator=torch.Generator().manual_seed(2))
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([7, 600])
    with torch.no_grad():
        found = module.image_features(pixels, t)

        plain = CLIPModel.from_pretrained(tiny_clip).double()
        tower = plain.vision_model  # without hooks
        time = torch.nn.functional.silu(module.time["mlp"](module.time["sinusoidal"](t).double()))
        x = tower.pre_layrnorm(tower.embeddings(pixels))
        for layer, linear in zip(tower.encoder.layers, module.time["layers"], strict=True):
            b1, s1, g1, b2, s2, g2 = linear(time)[:, None].chunk(6, -1)
            x = x + g1 * layer.self_attn(layer.layer_norm1(x) * (1 + s1) + b1, attention_mask=None)[0]
            x = x + g2 * layer.mlp(layer.layer_norm2(x) * (1 + s2) + b2)
        shift, scale = module.time["last"](time).chunk(2, -1)
        expected = plain.visual_projection(tower.post_layernorm(x[:, 0]) * (1 + scale) + shift)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_time_counts_unless_the_scorer_is_blind(tiny_clip, tiny_sd):
    family, _ = family_of(tiny_sd)
    for aware in (True, False):
        scorer = StepAwareScorer.fresh(family, str(tiny_clip), None, aware, seed=0)
        for linear in [*scorer.module.time["layers"], scorer.module.time["last"]]:
            torch.nn.init.normal_(linear.weight, std=0.3, generator=torch.Generator().manual_seed(2))
        x_t, x_0, _, captions, cond = inputs(family)
        early, late = (scorer.score(x_t, x_0, torch.full((3,), t), captions, cond) for t in (900, 100))
        assert torch.equal(early, late) != aware


def test_pictures_are_prepared_as_the_image_processor_does(tiny_clip, tiny_sd):
    """8-bit pictures of another shape through the processor (PIL) and through the tensors' way."""
    family, _ = family_of(tiny_sd)
    scorer = StepAwareScorer.fresh(family, str(tiny_clip), None, True, seed=0)
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 5), (32, 40), mode="bicubic").clamp(0, 1)
    picture = (smooth * 255).round() / 255
    image = steps.pictures(picture * 2 - 1)[0]
    assert np.asarray(image).shape == (32, 40, 3)
    expected = scorer.processor(images=[image], return_tensors="pt").pixel_values
    torch.testing.assert_close(scorer.prepare(picture * 2 - 1), expected, rtol=0, atol=0.03)  # PIL rounds to 8 bits


# ---- the latent scorer


def test_latent_features_are_the_base_models_and_the_forward_pass_ends_at_the_mid_block(tiny_sdxl):
    from diffpo.weights import lora

    family, unet = family_of(tiny_sdxl)
    x_t, _, t, _, cond = inputs(family)
    before = latent.features(family, unet, x_t, t, cond)
    seen = []
    handles = [block.register_forward_hook(lambda *_: seen.append(1)) for block in unet.up_blocks]
    kept = []
    handles.append(unet.mid_block.register_forward_hook(lambda _m, _a, output: kept.append(output)))
    with torch.no_grad():
        family.predict(unet, x_t, t, cond)
    assert len(seen) == len(unet.up_blocks)
    width = kept[0].shape[1]
    torch.testing.assert_close(before[:, -2 * width : -width], kept[0].mean((2, 3)))
    torch.testing.assert_close(before[:, -width:], kept[0].flatten(2).std(2))
    seen.clear()

    lora.add_lora(unet, Lora(rank=4), family.lora_targets)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    torch.testing.assert_close(latent.features(family, unet, x_t, t, cond), before)
    assert not seen  # the up blocks were not run
    with trained.of(unet).switched(None):
        base = family.predict(unet, x_t, t, cond)
    assert not torch.allclose(family.predict(unet, x_t, t, cond), base)  # and the policy's adapter is on again


# ---- the estimate


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd_v"])
def test_a_perfect_prediction_gives_back_x_0(model, request):
    family = models.load(Model(path=str(request.getfixturevalue(model))))
    x_0, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([999, 500, 0])
    x_t = family.add_noise(x_0, noise, t)
    found = family.to_x_0(family.target(x_0, noise, t), x_t, t)
    torch.testing.assert_close(found, x_0, rtol=1e-4, atol=1e-4)


def test_the_shipped_clip_tells_colours_and_backgrounds_apart():
    """assets/tiny-clip through the scorer that loads PickScore; its README has the numbers."""
    import dataclasses

    from diffpo import scorers
    from diffpo.shapes import heldout_captions, parse, render

    rng, scenes = np.random.default_rng(0), [parse(caption) for caption in heldout_captions(32, seed=1)]
    images = [Image.fromarray(render(scene, rng)) for scene in scenes]
    scorer = scorers.load(f"pickscore={ASSETS / 'tiny-clip'}")
    right = scorer.score(images, [scene.caption for scene in scenes])["pickscore"]
    for kind in ("colour", "background"):
        changed = []
        for scene in scenes:
            if kind == "background":
                other = dataclasses.replace(scene, background="white" if scene.background != "white" else "black")
            else:
                free = next(c for c in ("red", "green", "purple") if c not in {colour for colour, _ in scene.objects})
                objects = tuple((free, shape) for _, shape in scene.objects[:1]) + scene.objects[1:]
                other = dataclasses.replace(scene, objects=objects)
            changed.append(other.caption)
        assert (right > scorer.score(images, changed)["pickscore"]).mean() > 0.9


# ---- bad input


def test_what_cannot_be_loaded_is_one_message(tiny_sd, tiny_sdxl, make_scorer_config, tmp_path):
    family, unet = family_of(tiny_sd)
    with pytest.raises(DiffpoError, match=r"no step scorer in .*nowhere.*train-scorer"):
        load.load(str(tmp_path / "nowhere"), family, unet)
    with pytest.raises(DiffpoError, match=r"did you mean shapes\.total"):
        load.load("shapes.totl", family, unet)
    folder = train_scorer(make_scorer_config(tiny_sd, "train.steps=1"))
    other, its_unet = family_of(tiny_sdxl)
    with pytest.raises(DiffpoError, match="another base model"):
        load.load(str(folder), other, its_unet)
    content = (folder / "head.safetensors").read_bytes()
    (folder / "head.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(DiffpoError, match=r"head\.safetensors"):
        load.load(str(folder), family, unet)


def test_an_ordinary_scorer_looks_at_the_decoded_estimate(tiny_sd, monkeypatch):
    from diffpo import scorers

    class Brightness:
        names, optional = ("shapes.total",), frozenset()

        def score(self, images, prompts):
            return {"shapes.total": np.array([np.asarray(image).mean() / 255 for image in images])}

    monkeypatch.setattr(scorers, "load", lambda *_: Brightness())
    family, unet = family_of(tiny_sd)
    x_t, x_0, t, captions, cond = inputs(family)
    found = load.load("shapes.total", family, unet).score(x_t, x_0, t, captions, cond)
    pixels = family.decode(x_0).div(2).add(0.5).clamp(0, 1).mean((1, 2, 3))
    torch.testing.assert_close(found, pixels, atol=2e-3, rtol=0)
    Brightness.score = lambda self, images, prompts: {"shapes.total": np.array([0.1, np.nan, 0.2])}
    with pytest.raises(DiffpoError, match=r"shapes\.total.*'cat 1'"):
        load.load("shapes.total", family, unet).score(x_t, x_0, t, captions, cond)
