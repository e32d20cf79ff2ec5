"""Linear combinations of LoRAs (COFS-DPO, rewarded soups)."""

from types import SimpleNamespace

import pytest
import torch
from exports import output
from lora_files import LAYERS, factors, with_weights, written

from diffpo.commands.combine import run
from diffpo.common.errors import DiffpoError
from diffpo.weights import lora_apply
from diffpo.weights.combine import Share, combine


@pytest.fixture
def network(tiny_sdxl):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(tiny_sdxl, subfolder="unet")


def lora(path, network, layers, rank, alpha):
    """A kohya-free peft file of the layers, and what it adds to each."""
    found, tensors = factors(network, layers, rank), {}
    for layer, (down, up) in found.items():
        tensors |= {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}
        tensors[f"unet.{layer}.alpha"] = torch.tensor(float(alpha))
    deltas = {
        layer: alpha / rank * (up.flatten(1) @ down.flatten(1)).reshape(network.get_submodule(layer).weight.shape)
        for layer, (down, up) in found.items()
    }
    return str(written(path, tensors)), deltas


def test_a_combination_is_the_weighted_sum_of_the_changes(network, tmp_path):
    """Of other ranks, scales and layers, with a negative weight."""
    one, d_one = lora(tmp_path / "one.safetensors", network, LAYERS, 2, 4)
    two, d_two = lora(tmp_path / "two.safetensors", network, LAYERS[1:], 3, 3)
    file = combine(SimpleNamespace(unet=network), [Share(one, 0.7), Share(two, -0.4)], tmp_path / "both")
    expected = {layer: 0.7 * d_one[layer] - 0.4 * d_two.get(layer, torch.zeros(())) for layer in LAYERS}
    wanted = output(with_weights(network, expected))
    pipe = SimpleNamespace(unet=network)
    lora_apply.load_lora(pipe, file)
    torch.testing.assert_close(output(pipe.unet), wanted, rtol=1e-4, atol=1e-4)


def test_diffusers_reads_a_combination(network, tiny_sdxl, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    one, _ = lora(tmp_path / "one.safetensors", network, LAYERS, 2, 4)
    two, _ = lora(tmp_path / "two.safetensors", network, LAYERS[1:], 3, 3)
    file = run([f"{one}@0.5", two], tmp_path / "both", str(tiny_sdxl), None, None)
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    pipe.load_lora_weights(str(file.parent))
    lora_apply.load_lora(SimpleNamespace(unet=network), file)
    torch.testing.assert_close(output(pipe.unet), output(network), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_combined_is_named(network, tmp_path):
    one, _ = lora(tmp_path / "one.safetensors", network, LAYERS, 2, 4)
    pipe = SimpleNamespace(unet=network)
    with pytest.raises(DiffpoError, match="two LoRAs"):
        combine(pipe, [Share(one, 1.0)], tmp_path / "x")
    with pytest.raises(DiffpoError, match="finite"):
        combine(pipe, [Share(one, 1.0), Share(one, float("inf"))], tmp_path / "x")
    weight = network.get_submodule(LAYERS[0]).weight
    full = str(written(tmp_path / "full.safetensors", {f"unet.{LAYERS[0]}.diff": torch.ones_like(weight)}))
    with pytest.raises(DiffpoError, match=r"full\.safetensors"):
        combine(pipe, [Share(one, 1.0), Share(full, 1.0)], tmp_path / "x")
    with pytest.raises(DiffpoError, match="no number"):
        run([f"{one}@half", one], tmp_path / "x", "none", None, None)
