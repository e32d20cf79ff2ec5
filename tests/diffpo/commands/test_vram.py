"""`diffpo check --vram`: what is computed from shapes, and what is recommended."""

import re

import pytest
import torch

from diffpo import models
from diffpo.commands import vram
from diffpo.commands.footprint import activations
from diffpo.config import Model


def test_the_encoders_take_what_the_loaded_ones_take(tiny_sdxl):
    """And the VAE's largest output is that of its first level: 8 channels in float32."""
    family = models.load(Model(path=str(tiny_sdxl)), "bf16")
    encoders, vae, picture = vram.encoding(family, 32)
    family.load_encoders()
    loaded = [getattr(family.pipe, name) for name in family.encoders]
    assert encoders == [sum(p.nbytes for p in each.parameters()) for each in loaded]
    assert {p.dtype for each in loaded for p in each.parameters()} == {torch.bfloat16}
    assert vae == sum(p.nbytes for p in family.pipe.vae.parameters())
    assert picture == vram.LIVE * 16 * 8 * 32 * 32 * 4


@pytest.mark.parametrize("name", ["qwen_edit", "qwen_image21"])
def test_the_vae_is_of_the_class_that_the_model_has(editor, name):
    family = models.load(Model(path=str(editor(name))), resolution=32)
    encoders, vae, picture = vram.encoding(family, 32)
    family.load_encoders()
    assert vae == sum(p.nbytes for p in family.pipe.vae.parameters()) and picture > 0
    assert encoders == [sum(p.nbytes for p in family.pipe.text_encoder.parameters())]


def test_what_is_recommended_fits_and_what_costs_less_does_not(tiny_sdxl, make_config, monkeypatch):
    monkeypatch.setattr(vram, "RESERVED", 0)
    config = make_config(tiny_sdxl)
    everything = [vram.needed(vram._with(config, each), 2) for each in vram.ladder(config, tiles=False)]
    assert len(everything) == 8 and everything[1].training < everything[0].training
    tried = 0
    names = ["precision", "checkpointing", "batch_size", "fp8"]
    for rung, name in enumerate(names, 1):
        room = everything[rung].most
        if room >= min(each.most for each in everything[:rung]):
            continue  # of the tiny one the caches are the largest
        said, tried = [], tried + 1
        vram.recommend(config, None, room / 2**30, said.append)
        assert said[-1].startswith("recommended: ") and name in said[-1] and len(said) == rung + 3
    assert tried >= 2
    said = []
    vram.recommend(config, None, 100, said.append)
    assert len(said) == 2 and said[1].endswith("as in the config")
    vram.recommend(config, None, 1e-6, said.append)
    assert "nothing fits" in said[-1]


def test_offload_leaves_the_largest_layer_and_one_encoder(tiny_sdxl, make_config):
    config = make_config(tiny_sdxl, "data.resolution=16")
    family = models.load(config.model)
    network = family.meta_network()
    largest = max(
        sum(p.nbytes for p in layer.parameters())
        for layer in network.modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    )
    whole, offloaded = (vram.needed(make_config(tiny_sdxl, f"model.offload={on}"), 2) for on in ("false", "true"))
    layers = sum(
        sum(p.nbytes for p in layer.parameters())
        for layer in network.modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    )
    assert whole.training - offloaded.training == pytest.approx(1.1 * (layers - largest), rel=0.01)
    assert whole.caches > offloaded.caches


def test_the_command_prints_it(tiny_sdxl, make_config, tmp_path):
    from typer.testing import CliRunner

    from diffpo.cli import app

    make_config(tiny_sdxl)
    said = CliRunner().invoke(app, ["check", str(tmp_path / "recipe.yaml"), "--vram", "12"]).output
    assert re.search(r"settings for a GPU of 12 GiB, .*\n +1\.0 GiB training, +1\.0 GiB caches +as in the config", said)


def test_the_picture_to_edit_takes_as_many_tokens_as_the_result(editor, make_config):
    """FLUX.2: the outputs of its layers for 16 x 16 more tokens, by hand. It also makes pictures from texts alone."""
    made = [
        make_config(editor("flux2_klein"), "data.resolution=64", f"data.columns.source={column}")
        for column in ("null", "before")
    ]
    family = models.load(made[0].model, resolution=64)
    alone, beside = (activations(family, family.meta_network(), 3, each.data, each.train) for each in made)
    width, inner, channels = 32, 96, 16
    double = 10 * width + 3 * inner  # two norms, q, k, v and their norms, output and dropout; 2 x inner, gate, output
    single = 7 * width + 3 * inner  # a norm, q, k, v and 2 x inner at once, their norms, gate, output
    assert beside - alone == 3 * 16 * 16 * 4 * (width + 2 * double + 2 * single + width + channels)
    assert vram.needed(made[1], 2).training > vram.needed(made[0], 2).training
