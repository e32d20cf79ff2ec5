"""For tests of LoRA files: layers of the tiny SDXL, random factors, and what a file does to the weights."""

import copy
from types import SimpleNamespace

import torch
from exports import output
from safetensors.torch import save_file

from diffpo.weights import lora_apply, lora_change, lora_forms

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
LAYERS = [f"{ATTENTION}.{part}" for part in ("to_q", "to_v", "to_out.0")] + ["mid_block.attentions.0.proj_in"]
CLIP = "text_model.encoder.layers.1"


def rand(*shape, seed=0, std=0.3):
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(network, layers, rank=2):
    """Random A (rank, in, ...) and B (out, rank, ...) of layers."""
    found = {}
    for i, layer in enumerate(layers):
        weight = network.get_submodule(layer).weight
        ones = (1,) * (weight.dim() - 2)
        found[layer] = (rand(rank, *weight.shape[1:], seed=i), rand(len(weight), rank, *ones, seed=100 + i))
    return found


def written(path, tensors, header=None):
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, header)
    return path


def with_weights(network, deltas):
    """A copy of the network whose layers' weights (or biases) are changed by ``deltas``."""
    other = copy.deepcopy(network)
    for name, delta in deltas.items():
        name = name if name.endswith((".weight", ".bias")) else f"{name}.weight"
        other.get_parameter(name).data += delta
    return other


def merged(network, file, strength=1.0, **parts):
    parts = parts or {"unet": copy.deepcopy(network)}
    for name, changed in lora_forms.read(file, parts).items():
        lora_change.merge(parts[name], changed, strength)
    return next(iter(parts.values()))


def same_weights(found, expected):
    for (name, ours), theirs in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def does(network, file, deltas):
    """The file does to each weight what ``deltas`` say, by merging; and it does that to the output, loaded."""
    expected = with_weights(network, deltas)
    same_weights(merged(network, file), expected)
    pipe = SimpleNamespace(unet=copy.deepcopy(network))
    lora_apply.load_lora(pipe, file)
    found, wanted, base = (output(each) for each in (pipe.unet, expected, network))
    assert (wanted - base).abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def processor(layer, side):
    """The key of an attention processor's layer."""
    attention, _, name = layer.removesuffix(".0").rpartition(".")
    return f"{attention}.processor.{name}_lora.{side}.weight" if "attn" in layer else f"{layer}.lora.{side}.weight"
