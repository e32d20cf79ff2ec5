"""The settings of LoRA files, in the header or beside the weights, and files that are refused."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from exports import fresh, output
from lora_files import ATTENTION, LAYERS, does, merged, rand, same_weights, written

from diffpo.common.errors import DiffpoError
from diffpo.weights import lora_apply, lora_file


@pytest.fixture(scope="module")
def unet(tiny_sdxl):
    return fresh(tiny_sdxl).unet


def peft_tensors(unet, ranks, prefix="unet."):
    tensors = {}
    for i, (layer, rank) in enumerate(ranks.items()):
        weight = unet.get_submodule(layer).weight
        tensors[f"{prefix}{layer}.lora_A.weight"] = rand(rank, weight.shape[1], seed=i)
        tensors[f"{prefix}{layer}.lora_B.weight"] = rand(len(weight), rank, seed=50 + i)
    return tensors


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({"r": 2, "lora_alpha": 6}, {"to_q": 3.0, "to_v": 3.0}),
        ({"r": 2, "lora_alpha": 6, "rank_pattern": {"to_v": 4}}, {"to_q": 3.0, "to_v": 1.5}),
        ({"r": 2, "lora_alpha": 6, "use_rslora": True}, {"to_q": 6 / 2**0.5, "to_v": 6 / 2**0.5}),
        (
            {"r": 4, "lora_alpha": 6, "rank_pattern": {f"^{LAYERS[0]}": 2}, "alpha_pattern": {r"attn1\.to_q": 1.0}},
            {"to_q": 0.5, "to_v": 1.5},
        ),
    ],
)
@pytest.mark.parametrize("place", ["header", "adapter_config.json"])
def test_settings_scale_each_layer(unet, tmp_path, settings, scales, place):
    layers = {name: f"{ATTENTION}.{name}" for name in scales}
    ranks = {}
    for layer in layers.values():
        patterns = settings.get("rank_pattern", {})
        ranks[layer] = next((n for key, n in patterns.items() if layer.endswith(key.strip("^"))), settings["r"])
    tensors = peft_tensors(unet, ranks, "unet." if place == "header" else "base_model.model.")
    if place == "header":
        told = {f"unet.{key}": value for key, value in settings.items()}
        path = written(tmp_path / lora_file.FILE_NAME, tensors, {"lora_adapter_metadata": json.dumps(told)})
    else:
        path = written(tmp_path / "adapter_model.safetensors", tensors).parent
        told = {**settings, "peft_type": "LORA", "target_modules": ["attn1.to_q", "attn1.to_v"], "bias": "none"}
        told["exclude_modules"] = ["mid_block"]  # so that not all layers of these names are promised
        before = lora_file.file_hash(path)
        (tmp_path / "adapter_config.json").write_text("\ufeff" + json.dumps(told))
        assert lora_file.file_hash(path) != before  # it says what the pictures will be
    products = list(zip(*[iter(tensors.values())] * 2, strict=True))
    deltas = {layer: scales[name] * b @ a for (name, layer), (a, b) in zip(layers.items(), products, strict=True)}
    does(unet, lora_file.lora_file(path), deltas)


def test_pefts_own_files_are_read(unet, tmp_path):
    """All settings that peft's configs have by default are understood, whatever its version."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model

    for config in (
        LoraConfig(r=2, lora_alpha=3, target_modules=["to_q"], init_lora_weights=False, use_dora=True),
        LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "conv1"], init_lora_weights=False, use_rslora=True),
        LoHaConfig(r=2, alpha=3, target_modules=["to_q", "conv1"], init_weights=False),
        LoKrConfig(r=2, alpha=3, target_modules=["to_q", "conv1"], init_weights=False, decompose_both=True),
    ):
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(unet), config)
        folder = tmp_path / f"{config.peft_type}-{config.target_modules}"
        model.save_pretrained(folder)
        expected = model.merge_and_unload()
        same_weights(merged(unet, lora_file.lora_file(folder)), expected)
        pipe = SimpleNamespace(unet=copy.deepcopy(unet))
        lora_apply.load_lora(pipe, folder)
        torch.testing.assert_close(output(pipe.unet), output(expected), rtol=1e-3, atol=1e-3)


# ---- refused


def low(layer=LAYERS[1], a=None, b=None):
    a, b = rand(2, 16) if a is None else a, rand(16, 2, seed=1) if b is None else b
    return {f"unet.{layer}.lora_A.weight": a, f"unet.{layer}.lora_B.weight": b}


KOHYA = f"lora_unet_{LAYERS[1].replace('.', '_')}"
REFUSED = {
    "oft": ({f"{KOHYA}.oft_blocks": rand(4, 4, 4)}, "oft_blocks"),
    "boft": ({**low(), f"{KOHYA}.boft_R": rand(4, 4, 4)}, "boft_R"),
    "ia3": ({f"{KOHYA}.weight": rand(16), f"{KOHYA}.on_input": torch.tensor(True)}, "on_input"),
    "peft's ia3": ({f"base_model.model.{LAYERS[1]}.ia3_l": rand(16, 1)}, "ia3_l"),
    "glora": ({f"{KOHYA}.a1.weight": rand(2, 2)}, r"a1\.weight"),
    "an embedding": ({**low(), "bundle_emb.x.string_to_param.*": rand(2, 16)}, "bundle_emb"),
    "a new weight": ({**low(), f"{KOHYA}.set_weight": rand(16, 16)}, "set_weight"),
    "A's bias": ({**low(), f"unet.{LAYERS[1]}.lora_A.bias": rand(2)}, r"lora_A\.bias"),
    "another model's layer": (low("down_blocks.9.attn1.to_q"), r"no weight of .* unet .*down_blocks\.9"),
    "some of another's": ({**low(), **low("down_blocks.9.attn1.to_q")}, r"2 of the 4 .*down_blocks\.9"),
    "a part that is not there": ({**low(), "text_encoder_3.x.lora_A.weight": rand(2, 2)}, "text_encoder_3"),
    "half": ({f"unet.{LAYERS[1]}.lora_A.weight": rand(2, 16)}, "without up"),
    "magnitudes alone": ({f"{KOHYA}.dora_scale": rand(16, 1)}, "dora_scale without"),
    "half of a loha": ({f"{KOHYA}.hada_w1_a": rand(16, 2)}, "hada_w1_a without hada_w1_b"),
    "half of a lokr": ({f"{KOHYA}.lokr_w1": rand(4, 4)}, "lokr_w1 without lokr_w2"),
    "twice": ({**low(), f"{KOHYA}.lora_up.weight": rand(16, 2)}, "twice, by lora_unet.*and unet"),
    "two kinds": ({**low(), f"{KOHYA}.lokr_w1": rand(4, 4), f"{KOHYA}.lokr_w2": rand(4, 4)}, "twice, by"),
    "another width": (low(a=rand(2, 8)), r"lora_A\.weight \(2, 8\).*\(16, 16\)"),
    "another height": (low(b=rand(8, 2)), r"\(8, 2\)"),
    "other ranks": (low(b=rand(16, 3)), r"\(16, 3\)"),
    "another kronecker": ({f"{KOHYA}.lokr_w1": rand(4, 4), f"{KOHYA}.lokr_w2": rand(4, 2)}, r"lokr_w2 \(4, 2\)"),
    "other norms": ({**low(), f"{KOHYA}.dora_scale": rand(8, 1)}, r"dora_scale \(8, 1\)"),
    "not finite": (low(a=rand(2, 16) / 0), r"lora_A\.weight is not finite"),
    "integers": (low(a=torch.ones(2, 16, dtype=torch.int8)), "int8"),
    "nothing": (low(a=torch.zeros(0, 16), b=torch.zeros(16, 0)), "is empty"),
    "no alpha": ({**low(), f"{KOHYA}.alpha": torch.tensor(0.0)}, "alpha is 0"),
    "alphas": ({**low(), f"{KOHYA}.alpha": torch.ones(2)}, "alpha is"),
    "no bias to change": ({**low(), f"{KOHYA}.diff_b": rand(16)}, f"bias of {LAYERS[1]}"),
    "a file of zeros elsewhere": (low("down_blocks.9.attn1.to_q", b=torch.zeros(16, 2)), "changes nothing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_applied_is_named_and_changes_nothing(unet, tmp_path, name):
    tensors, said = REFUSED[name]
    pipe = SimpleNamespace(unet=copy.deepcopy(unet))
    with pytest.raises(DiffpoError, match=said) as error:
        lora_apply.load_lora(pipe, written(tmp_path / "a.safetensors", tensors))
    assert str(tmp_path / "a.safetensors") in str(error.value)
    same_weights(pipe.unet, unet)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 4, "lora_alpha": 4}, "rank 4 .*to_v.* 2"),
        ({"r": 2, "lora_alpha": 0}, "lora_alpha=0"),
        ({"r": 2, "lora_alpha": "2"}, "lora_alpha=2"),
        ({"r": 10**400}, "r=1000"),
        ({"r": 2, "use_dora": True}, "use_dora"),
        ({"r": 2, "alpha_pattern": {"(a+)+$": 2}}, r"alpha_pattern is not the name of a layer"),
        ({"r": 2, "alpha_pattern": [2]}, "alpha_pattern"),
        ({"r": 2, "init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa"),
        ({"r": 2, "use_bdlora": {"x": 1}}, "use_bdlora"),
        ({"r": 2, "peft_type": "OFT"}, "OFT"),
        ({"r": 2, "target_modules": ["to_v"]}, "has no weights of .*to_v"),
    ],
)
def test_settings_that_are_not_understood_are_named(unet, tmp_path, settings, said):
    header = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in settings.items()})}
    path = written(tmp_path / "a.safetensors", low(), header)
    with pytest.raises(DiffpoError, match=rf"a\.safetensors.*{said}"):
        lora_apply.check_lora(SimpleNamespace(unet=unet), path)


def test_an_alpha_that_contradicts_the_settings_is_refused(unet, tmp_path):
    header = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 2})}
    tensors = {**low(), f"{KOHYA}.alpha": torch.tensor(4.0)}
    with pytest.raises(DiffpoError, match=r"alpha .* scale of 2, .* 1$"):
        lora_apply.check_lora(SimpleNamespace(unet=unet), written(tmp_path / "a.safetensors", tensors, header))


def test_zeros_for_layers_that_the_model_lacks_change_nothing(unet, tmp_path):
    """ComfyUI's FLUX files have them for text encoders."""
    tensors = {**low(), "text_encoders.t5xxl.transformer.x.lora_A.weight": rand(2, 4)}
    tensors["text_encoders.t5xxl.transformer.x.lora_B.weight"] = torch.zeros(4, 2)
    does(unet, written(tmp_path / "a.safetensors", tensors), {LAYERS[1]: rand(16, 2, seed=1) @ rand(2, 16)})


def test_a_config_beside_the_weights_that_cannot_be_read(unet, tmp_path):
    written(tmp_path / "adapter_model.safetensors", low())
    for text in ("{", "[]", "[" * 9000, '{"r": ' + "9" * 5000 + "}"):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(DiffpoError, match=r"cannot read .*adapter_config\.json"):
            lora_apply.check_lora(SimpleNamespace(unet=unet), tmp_path)


def test_pickled_files_are_refused_with_the_way_out(unet, tmp_path):
    torch.save(low(), tmp_path / "a.pt")
    with pytest.raises(DiffpoError, match=r"a\.pt is not read: .* convert it to safetensors"):
        lora_apply.load_lora(SimpleNamespace(unet=unet), tmp_path / "a.pt")
