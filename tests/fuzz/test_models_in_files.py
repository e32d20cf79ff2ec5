"""Models in one file, damaged or with other names and shapes of weights: they are read, or refused by name."""

import json

import original_format
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from junk import AWKWARD, damaged
from safetensors.torch import load, save

from diffpo import models
from diffpo.common.errors import DiffpoError
from diffpo.config import Model

PLACES = [
    "model.diffusion_model.input_blocks.0.0.weight",
    "model.diffusion_model.label_emb.0.0.weight",
    "model.diffusion_model.input_blocks.x.0.weight",
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
    "double_blocks.0.img_attn.qkv.weight",
    "first_stage_model.up.9.weight",
    "cond_stage_model.model.positional_embedding",
    "conditioner.embedders.1.model.transformer.resblocks.0.ln_1.weight",
    "state_dict",
    "v_pred",
    "\x1b[31m\u202e",
    *(each for each in AWKWARD if isinstance(each, str) and each.isascii()),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory, tiny_sd):
    """A tiny model as one file, its bytes and its weights."""
    path = original_format.sd1(tiny_sd, tmp_path_factory.mktemp("file") / "model.safetensors")
    return path, path.read_bytes(), load(path.read_bytes())


def try_model(path, config):
    """Read the pipeline, the shapes and the weights."""
    try:
        models.load_pipeline(Model(path=str(path), config=config), device="cpu")
        models.load(Model(path=str(path), config=config), resolution=16).meta_network()
    except DiffpoError as error:
        assert str(path) in str(error), error
        assert not any(character in str(error) for character in "\x1b\u202e")
        return
    assert not any(
        value.is_meta for value in models.load(Model(path=str(path), config=config)).load_network().parameters()
    )


@settings(max_examples=25)
@given(data=st.data())
def test_headers_with_changed_bytes(written, tiny_sd, data):
    path, content, _ = written
    end = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(data.draw(damaged(content[:end])) + content[end:])
    try_model(path, str(tiny_sd))


@settings(max_examples=25)
@given(data=st.data())
def test_weights_that_are_missing_renamed_or_of_another_shape(written, tiny_sd, data):
    path, _, weights = written
    weights = dict(weights)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(weights)))
        match data.draw(st.sampled_from(["drop", "move", "shape", "kind", "add"])):
            case "drop":
                del weights[name]
            case "move":
                weights[data.draw(st.sampled_from([*PLACES, name[: len(name) // 2]]))] = weights.pop(name)
            case "shape":
                weights[name] = torch.zeros(data.draw(st.sampled_from([(), (0,), (2,), (4, 2), (2, 9, 1, 1)])))
            case "kind":
                kinds = [torch.int64, torch.bool, torch.float16, torch.float8_e4m3fn]
                weights[name] = weights[name].to(data.draw(st.sampled_from(kinds)))
            case "add":
                weights[data.draw(st.sampled_from(PLACES))] = torch.zeros(2, 2)
    path.write_bytes(save(weights))
    try_model(path, data.draw(st.sampled_from([str(tiny_sd), None])))


@pytest.mark.parametrize("path", [each for each in AWKWARD if isinstance(each, str) and each])
def test_paths_that_do_not_exist(path):
    for options in ((path,), (f"{path}.safetensors",), ("model.safetensors", path)):
        with pytest.raises(DiffpoError):
            models.load(models.named(*options))


def test_configs_of_another_form(written, tmp_path):
    path, content, _ = written
    path.write_bytes(content)
    for index in ({}, [], {"_class_name": 3}, {"_class_name": "StableDiffusionPipeline", "unet": ["os", "system"]}):
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(DiffpoError, match=r"model_index\.json|configs of"):
            models.load_pipeline(Model(path=str(path), config=str(tmp_path)), device="cpu")
