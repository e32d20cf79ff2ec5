"""A negative LoRA for the unconditional half of guidance (Diffusion-NPO)."""

import copy

import pytest
import torch
from lora_files import written

from diffpo.common.errors import DiffpoError
from diffpo.evaluation import generate
from diffpo.evaluation.generation import Generation
from diffpo.weights import trained, unconditional

LAYERS = ("to_q", "to_v")


def random_lora(path, unet, seed):
    """A LoRA file of rank 2, alpha 2, of every ``LAYERS``, and what it adds to each weight."""
    draw, tensors, deltas = torch.Generator().manual_seed(seed), {}, {}
    for name, module in unet.named_modules():
        if name.endswith(LAYERS):
            down = 0.3 * torch.randn(2, module.weight.shape[1], generator=draw)
            up = 0.3 * torch.randn(module.weight.shape[0], 2, generator=draw)
            tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
            deltas[f"{name}.weight"] = up @ down
    return written(path, tensors), deltas


@pytest.fixture
def pipe(tiny_sdxl):
    return generate.load(Generation(str(tiny_sdxl), steps=2, guidance=3.0))


def inputs(unet, rows=4):
    draw = torch.Generator().manual_seed(3)
    width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    return (torch.randn(rows, 4, 8, 8, generator=draw), torch.tensor(500)), {
        "encoder_hidden_states": torch.randn(rows, 77, unet.config.cross_attention_dim, generator=draw),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(rows, width, generator=draw),
            "time_ids": torch.rand(rows, 6, generator=draw),
        },
        "return_dict": False,
    }


@torch.no_grad()
def test_the_first_half_has_both_changes_and_the_second_the_positive_one(pipe, tmp_path):
    plain = copy.deepcopy(pipe.unet)
    good, of_good = random_lora(tmp_path / "good.safetensors", plain, 0)
    bad, of_bad = random_lora(tmp_path / "bad.safetensors", plain, 1)

    def with_changes(positive, negative):
        network = copy.deepcopy(plain)
        for name, weight in network.named_parameters():
            if name in of_good:
                weight += positive * of_good[name] + negative * of_bad[name]
        return network

    args, kwargs = inputs(plain)
    other = unconditional.prepared(pipe, bad, 0.5, good, 1.0)
    trained.load_into(pipe, good)
    detach = unconditional.attach(pipe.unet, other)
    (found,) = pipe.unet(*args, **kwargs)
    first, second = with_changes(1, 0.5)(*args, **kwargs)[0], with_changes(1, 0)(*args, **kwargs)[0]
    torch.testing.assert_close(found, torch.cat([first[:2], second[2:]]), rtol=1e-4, atol=1e-4)
    assert (first - second).abs().max() > 1e-2, "the negative change is seen"
    found = pipe.unet(*args, **{**kwargs, "return_dict": True}).sample
    torch.testing.assert_close(found[2:], second[2:], rtol=1e-4, atol=1e-4)
    detach()
    torch.testing.assert_close(pipe.unet(*args, **kwargs)[0], second, rtol=1e-4, atol=1e-4)


def test_pictures_with_a_negative_lora_of_strength_0_are_the_base_models(pipe, tiny_sdxl, tmp_path):
    bad, _ = random_lora(tmp_path / "bad.safetensors", pipe.unet, 1)
    out, options = tmp_path / "out", {"model": str(tiny_sdxl), "steps": 2, "guidance": 3.0}
    arms = {
        "base": Generation(**options),
        "zero": Generation(**options, negative_lora=str(bad), negative_lora_weight=0.0),
        "bad": Generation(**options, negative_lora=str(bad)),
    }
    rows = {row["arm"]: row for row in generate.run(arms, ["a cat"], out)}
    assert rows["zero"]["sha256"] == rows["base"]["sha256"] != rows["bad"]["sha256"]
    assert rows["bad"]["negative_lora_hash"] and rows["base"]["negative_lora_hash"] is None


def test_a_lora_of_text_encoders_is_refused_as_the_negative_one(pipe, tmp_path):
    layer = next(name for name, _ in pipe.text_encoder.named_modules() if name.endswith("q_proj"))
    weight = pipe.text_encoder.get_submodule(layer).weight
    tensors = {f"text_encoder.{layer}.lora_A.weight": torch.ones(1, weight.shape[1])}
    tensors[f"text_encoder.{layer}.lora_B.weight"] = torch.ones(weight.shape[0], 1)
    file = written(tmp_path / "text.safetensors", tensors)
    with pytest.raises(DiffpoError, match="text_encoder"):
        unconditional.prepared(pipe, file, 1.0, None, 1.0)


def test_a_single_row_is_no_two_halves():
    network = torch.nn.Linear(2, 2)
    unconditional.attach(network, copy.deepcopy(network))
    with pytest.raises(ValueError, match="3 rows"):
        network(torch.zeros(3, 2))


def test_halves_are_of_nested_tensors_with_as_many_rows():
    x, sizes = torch.arange(4), torch.arange(3)
    first = unconditional._half({"x": x, "more": ({"y": x}, sizes, None)}, 4, 0)
    assert first["x"].tolist() == [0, 1] == first["more"][0]["y"].tolist() and first["more"][1] is sizes
    assert unconditional._half(x, 4, 1).tolist() == [2, 3]
