"""The first calls of a picture by the base model: against two networks that are called in turn."""

import numpy as np
import pytest
import torch
from lora_files import written

from diffpo.common.errors import DiffpoError
from diffpo.evaluation import generate, paths
from diffpo.evaluation.generate import Picture
from diffpo.evaluation.generation import Generation
from diffpo.weights import trained

PICTURES = [Picture(0, 0, "a cat"), Picture(1, 0, "a dog")]


@pytest.fixture(scope="module")
def pipes(tiny_sdxl, tmp_path_factory):
    """The base pipeline, the tuned one, and how the tuned one's pictures are made."""
    base = generate.load(Generation(str(tiny_sdxl), steps=3, guidance=3.0, device="cpu"))
    draw, tensors = torch.Generator().manual_seed(0), {}
    for name, module in base.unet.named_modules():
        if name.endswith(("to_q", "to_v")):
            tensors[f"unet.{name}.lora_A.weight"] = 0.3 * torch.randn(2, module.weight.shape[1], generator=draw)
            tensors[f"unet.{name}.lora_B.weight"] = 0.3 * torch.randn(module.weight.shape[0], 2, generator=draw)
    file = written(tmp_path_factory.mktemp("lora") / "lora.safetensors", tensors)
    made = Generation(str(tiny_sdxl), lora=str(file), steps=3, guidance=3.0, device="cpu")
    tuned = generate.load(made.base())
    trained.load_into(tuned, made.lora)
    return base, tuned, made


def painted(pipe, made):
    return np.stack([np.asarray(each, float) for each in generate.paint(pipe, made, PICTURES)])


@pytest.mark.parametrize("first", [1, 2])
def test_the_first_calls_are_the_base_models(pipes, monkeypatch, first):
    base, tuned, made = pipes
    alone, own, calls = painted(tuned, made), base.unet.forward, []

    def in_turn(*args, **options):
        calls.append(1)
        return (own if len(calls) <= first else tuned.unet)(*args, **options)

    monkeypatch.setattr(base.unet, "forward", in_turn)
    expected = painted(base, made.base())
    with paths.recorded(tuned) as estimates:
        found = painted(tuned, Generation.of({**made.recorded(), "seed": 0, "base_calls": first}))
    assert np.array_equal(found, expected) and len(calls) == len(estimates) == 3
    assert np.abs(found - alone).max() > 1
    assert np.array_equal(painted(tuned, made), alone) and "step" not in vars(tuned.scheduler)


def test_a_lora_in_the_weights_is_refused(pipes):
    base, _, made = pipes  # as after a strength of 0.5
    with pytest.raises(DiffpoError, match=r"--base-calls.*strength"):
        painted(base, Generation.of({**made.recorded(), "seed": 0, "base_calls": 1}))
