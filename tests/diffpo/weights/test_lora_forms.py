"""Names of layers in LoRA files of all programs, for the network and for the text encoders."""

import copy
from types import SimpleNamespace

import pytest
import torch
from exports import fresh, output
from lora_files import CLIP, LAYERS, does, factors, merged, processor, rand, same_weights, with_weights, written

from diffpo import models
from diffpo.common.errors import DiffpoError
from diffpo.export import kohya
from diffpo.models.sdxl import StableDiffusionXL
from diffpo.weights import lora_apply, lora_change, lora_forms, lora_names


@pytest.fixture(scope="module")
def unet(tiny_sdxl):
    return fresh(tiny_sdxl).unet


AB = {"down": "lora_A", "up": "lora_B"}
NAMES = {
    "peft": lambda layer, side: f"base_model.model.{layer}.{AB[side]}.weight",
    "peft with the adapter's name": lambda layer, side: f"base_model.model.{layer}.{AB[side]}.default.weight",
    "bare": lambda layer, side: f"{layer}.{AB[side]}.weight",
    "bare and bare": lambda layer, side: f"{layer}.{AB[side]}",
    "diffusers": lambda layer, side: f"unet.{layer}.{AB[side]}.weight",
    "peft in diffusers": lambda layer, side: f"unet.base_model.model.{layer}.{AB[side]}.weight",
    "compiled": lambda layer, side: f"unet._orig_mod.{layer}.{AB[side]}.weight",
    "diffusers before peft": lambda layer, side: f"unet.{layer}.lora.{side}.weight",
    "attention processors": lambda layer, side: f"unet.{processor(layer, side)}",
    "attention processors alone": processor,
    "kohya": lambda layer, side: f"lora_unet_{layer.replace('.', '_')}.lora_{side}.weight",
    "onetrainer": lambda layer, side: f"unet.{layer}.lora_{side}.weight",
    "lycoris": lambda layer, side: f"lycoris_{layer.replace('.', '_')}.lora_{side}.weight",
}


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_every_name_of_a_layer_is_understood(unet, tmp_path, form, alpha):
    name, tensors, deltas = NAMES[form], {}, {}
    for layer, (down, up) in factors(unet, LAYERS).items():
        tensors |= {name(layer, "down"): down, name(layer, "up"): up}
        if alpha:
            stem = name(layer, "down").replace("_lora.down", ".lora_A").split(".lora")[0]
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        deltas[layer] = (1.0 if alpha is None else alpha / 2) * up @ down
    does(unet, written(tmp_path / "a.safetensors", tensors), deltas)


def test_kohyas_names_of_sdxls_original_network(unet, tmp_path):
    layers = [*LAYERS, "conv_in", "mid_block.resnets.1.conv2", "up_blocks.0.upsamplers.0.conv"]
    layers += ["time_embedding.linear_2", "add_embedding.linear_1", "down_blocks.0.downsamplers.0.conv"]
    made = factors(unet, layers)
    changes = {layer: lora_change.Change("lora", {"down": a, "up": b}, 1.5) for layer, (a, b) in made.items()}
    state = kohya.convert(StableDiffusionXL, unet, changes)
    assert "lora_unet_input_blocks_0_0.alpha" in state and "lora_unet_middle_block_1_proj_in.alpha" in state
    deltas = {layer: 1.5 * torch.einsum("or,ri...->oi...", b.flatten(1), a) for layer, (a, b) in made.items()}
    does(unet, written(tmp_path / "a.safetensors", state), deltas)
    dotted = {key.replace("lora_unet_", "model.diffusion_model."): value for key, value in state.items()}
    does(unet, written(tmp_path / "b.safetensors", dotted), deltas)


def test_layers_are_called_as_in_stable_diffusions_original_network(tiny_sd):
    """Where v1-5-pruned.safetensors has them: its first up block has no attention, so it samples up by the second."""
    network = fresh(tiny_sd).unet
    places = lora_names.places_of(network, lora_names.layer_shapes(network))
    for name, layer in {
        "input_blocks_1_1_proj_in": "down_blocks.0.attentions.0.proj_in",
        "output_blocks_1_1_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_3_1_transformer_blocks_0_attn2_to_k": "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k",
        "out_2": "conv_out",
    }.items():
        assert [part.layer for part in places[name]] == [layer]


class Checkpoint(dict):
    """The original network's weights as rows with numbers of their own: laid out as the table of names has it."""

    def __init__(self, table, numbers, first):
        super().__init__({name: torch.zeros(2, 1) for name in first})
        self.table, self.numbers, self.asked = table, numbers, set()

    def pop(self, key, *default):
        name, _, leaf = key.rpartition(".")
        place = self.table.get(name.replace(".", "_"))
        if place is None:
            return torch.zeros(2)
        self.asked.add(name.replace(".", "_"))
        rows = torch.cat([self.numbers[part.layer][part.start : part.stop] for part in place])
        return rows if leaf == "bias" else rows[:, None]

    def __getitem__(self, key):
        return self.pop(key)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_original_names_hold_the_rows_that_diffusers_takes_from_them(family):
    """Its converters of whole checkpoints, on rows that say where they belong."""
    import diffusers
    from diffusers.loaders import single_file_utils

    with torch.device("meta"):
        if family == "flux":
            network = diffusers.FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)
            convert, first = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers, ["guidance_in."]
            first += [f"{kind}_blocks.{i}.x" for kind in ("double", "single") for i in (0, 1)]
        else:
            network = diffusers.SD3Transformer2DModel(num_layers=2, dual_attention_layers=(0,))
            convert, first = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers, []
            first += [f"joint_blocks.{i}.x_block.x" for i in (0, 1)] + ["joint_blocks.0.x_block.attn2.qkv.weight"]
            first += ["context_embedder.weight"]
    shapes, start, numbers = lora_names.layer_shapes(network), 0, {}
    for layer, shape in shapes.items():
        numbers[layer], start = torch.arange(start, start + shape[0]), start + shape[0]
    table = dict(lora_names.places_of(network, shapes))
    checkpoint = Checkpoint(table, numbers, first)
    found = {key: value for key, value in convert(checkpoint).items() if key.removesuffix(".weight") in shapes}
    for key, value in found.items():
        layer = key.removesuffix(".weight")
        if layer in numbers and "norm_" not in layer.split(".")[-1]:
            assert torch.equal(value[:, 0], numbers[layer]), layer
    adapted = {part.layer for name in checkpoint.asked for part in table[name]}
    linear = {name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)}
    assert linear <= adapted and linear <= {key.removesuffix(".weight") for key in found}


def test_one_lora_of_several_layers_changes_each_of_them(tiny_folder, tmp_path):
    """FLUX: query, key and value as one; in BFL's, kohya's and XLabs' names."""
    network = fresh(tiny_folder("flux")).transformer
    parts = [f"transformer_blocks.1.attn.{name}" for name in ("to_q", "to_k", "to_v")]
    single = [f"single_transformer_blocks.0.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    shift = "norm_out.linear"  # of the original, shift comes before scale
    rows = {layer: network.get_submodule(layer).weight.shape[0] for layer in [*parts, *single, "proj_out", shift]}
    down, up = rand(3, 32), rand(sum(rows[layer] for layer in parts), 3, seed=1)
    wide = rand(sum(rows[layer] for layer in single), 3, seed=2)
    last = rand(rows[shift], 3, seed=3)
    deltas = dict(zip(parts, (up @ down).split([rows[layer] for layer in parts]), strict=True))
    more = dict(zip(single, (wide @ down).split([rows[layer] for layer in single]), strict=True))
    swapped = {shift: torch.cat([(last @ down).chunk(2)[1], (last @ down).chunk(2)[0]])}

    def check(tensors, deltas):
        found = merged(network, written(tmp_path / "a.safetensors", tensors), transformer=copy.deepcopy(network))
        expected = with_weights(network, deltas)
        same_weights(found, expected)
        pipe = SimpleNamespace(transformer=copy.deepcopy(network))
        lora_apply.load_lora(pipe, tmp_path / "a.safetensors")
        torch.testing.assert_close(output(pipe.transformer), output(expected), rtol=1e-4, atol=1e-4)

    bfl = "diffusion_model.double_blocks.1.img_attn.qkv"
    check({f"{bfl}.lora_A.weight": down, f"{bfl}.lora_B.weight": up}, deltas)
    flat = "lora_unet_single_blocks_0_linear1"
    check({f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": wide}, more)
    xlabs = "double_blocks.1.processor.qkv_lora1"
    check({f"{xlabs}.down.weight": down, f"{xlabs}.up.weight": up}, deltas)
    final = "final_layer.adaLN_modulation.1"
    check({f"{final}.lora_A.weight": down, f"{final}.lora_B.weight": last}, swapped)
    # of a LoRA that lies on the diagonal, each layer gets its own rank back
    state = {f"{flat}.lora_down.weight": torch.cat([down] * 4), f"{flat}.alpha": torch.tensor(12.0)}
    pieces = wide.split([rows[layer] for layer in single])
    state[f"{flat}.lora_up.weight"] = torch.block_diag(pieces[0], 0 * pieces[1], *pieces[2:])
    check(state, {layer: delta for layer, delta in more.items() if layer != single[1]})
    changed = lora_forms.read(tmp_path / "a.safetensors", {"transformer": network})["transformer"]
    layers = lora_change.by_layer(changed)
    assert layers.keys() == set(single) - {single[1]} and {len(c.factors["down"]) for c in layers.values()} == {3}


def test_pixarts_original_names(tiny_folder, tmp_path):
    network = fresh(tiny_folder("pixart")).transformer
    block, rows = "transformer_blocks.1", network.config.num_attention_heads * network.config.attention_head_dim
    down, up = rand(2, 24), rand(2 * rows, 2, seed=1)
    key = "diffusion_model.blocks.1.cross_attn.kv_linear"
    file = written(tmp_path / "a.safetensors", {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up})
    deltas = {f"{block}.attn2.to_k": up[:rows] @ down, f"{block}.attn2.to_v": up[rows:] @ down}
    same_weights(merged(network, file, transformer=copy.deepcopy(network)), with_weights(network, deltas))


@pytest.mark.parametrize(
    "names",
    [
        ("text_encoder.{}.lora_linear_layer.{}.weight", "text_encoder_2.{}.lora_linear_layer.{}.weight"),
        ("text_encoder.{}.lora_{}.weight", "text_encoder_2.{}.lora_{}.weight"),
        ("lora_te1_{}.lora_{}.weight", "lora_te2_{}.lora_{}.weight"),
        ("text_encoders.clip_l.transformer.{}.lora_{}.weight", "text_encoders.clip_g.transformer.{}.lora_{}.weight"),
    ],
)
def test_text_encoders_are_changed_too(tiny_sdxl, tmp_path, names):
    """Whichever of transformers' versions calls CLIP's layers."""
    pipe = models.load_pipeline(str(tiny_sdxl), device="cpu")
    before = {name: copy.deepcopy(getattr(pipe, name)) for name in ("text_encoder", "text_encoder_2", "unet")}
    tensors, deltas = {}, {}
    for i, (part, name) in enumerate(zip(("text_encoder", "text_encoder_2"), names, strict=True)):
        for layer in (f"{CLIP}.self_attn.q_proj", f"{CLIP}.mlp.fc1"):
            spelt = layer.replace(".", "_") if "_te" in name else layer
            shape = (32, 16) if "fc1" in layer else (16, 16)
            down, up = rand(2, shape[1], seed=i), rand(shape[0], 2, seed=10 + i)
            sides = ("A", "B") if "lora_{}" in name and "text_encoder" in name[:12] else ("down", "up")
            tensors |= {name.format(spelt, side): value for side, value in zip(sides, (down, up), strict=True)}
            deltas.setdefault(part, {})[layer] = up @ down
    lora_apply.load_lora(pipe, written(tmp_path / "a.safetensors", tensors))
    for part, changed in deltas.items():
        own = dict(before[part].named_modules())
        own = {layer if layer in own else layer.removeprefix("text_model."): delta for layer, delta in changed.items()}
        same_weights(getattr(pipe, part), with_weights(before[part], own))
    same_weights(pipe.unet, before["unet"])


def test_processors_of_a_text_encoder_and_a_name_that_two_encoders_have(tiny_sd, tiny_sdxl, tmp_path):
    down, up = rand(2, 16), rand(16, 2, seed=1)
    stem = f"text_encoder.{CLIP}.self_attn.to_out_lora"
    file = written(tmp_path / "a.safetensors", {f"{stem}.down.weight": down, f"{stem}.up.weight": up})
    pipe = models.load_pipeline(str(tiny_sd), device="cpu")
    before = copy.deepcopy(pipe.text_encoder)
    lora_apply.load_lora(pipe, file)
    layer = next(name for name, _ in before.named_modules() if name.endswith("layers.1.self_attn.out_proj"))
    same_weights(pipe.text_encoder, with_weights(before, {layer: up @ down}))
    bare = {
        f"base_model.model.{CLIP}.mlp.fc1.lora_A.weight": down,
        f"base_model.model.{CLIP}.mlp.fc1.lora_B.weight": up,
    }
    written(tmp_path / "b.safetensors", bare)
    pipe = models.load_pipeline(str(tiny_sdxl), device="cpu")
    with pytest.raises(DiffpoError, match=r"b\.safetensors: .*fc1.*text_encoder or of text_encoder_2"):
        lora_apply.load_lora(pipe, tmp_path / "b.safetensors")


def test_t5_is_the_third_of_kohyas_encoders(tiny_folder, tmp_path):
    layer = "encoder.block.0.layer.0.SelfAttention.q"
    for family, part in (("flux", "text_encoder_2"), ("sd3", "text_encoder_3")):
        pipe = models.load_pipeline(str(tiny_folder(family)), device="cpu")
        encoder = getattr(pipe, part)
        weight = encoder.get_submodule(layer).weight.detach().clone()
        down, up = rand(2, weight.shape[1]), rand(len(weight), 2, seed=1)
        stem = f"lora_te3_{layer.replace('.', '_')}"
        file = written(tmp_path / "a.safetensors", {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up})
        lora_apply.load_lora(pipe, file)
        torch.testing.assert_close(encoder.get_submodule(layer).weight, weight + up @ down)
