"""LoRA files of all forms and kinds: what they do to the weights, against closed forms, and what is refused."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from exports import fresh, output
from safetensors.torch import save_file

from diffpo import models
from diffpo.common.errors import DiffpoError
from diffpo.export import kohya
from diffpo.models.sdxl import StableDiffusionXL
from diffpo.weights import lora, lora_apply, lora_change, lora_file, lora_forms, lora_names

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
LAYERS = [f"{ATTENTION}.{part}" for part in ("to_q", "to_v", "to_out.0")] + ["mid_block.attentions.0.proj_in"]
CLIP = "text_model.encoder.layers.1"


@pytest.fixture(scope="module")
def unet(tiny_sdxl):
    return fresh(tiny_sdxl).unet


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
    block, rows = "transformer_blocks.2", network.config.num_attention_heads * network.config.attention_head_dim
    down, up = rand(2, 24), rand(2 * rows, 2, seed=1)
    key = "diffusion_model.blocks.2.cross_attn.kv_linear"
    file = written(tmp_path / "a.safetensors", {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up})
    deltas = {f"{block}.attn2.to_k": up[:rows] @ down, f"{block}.attn2.to_v": up[rows:] @ down}
    same_weights(merged(network, file, transformer=copy.deepcopy(network)), with_weights(network, deltas))


# ---- kinds of weights


def kron(one, other):
    """The Kronecker product of matrices, block by block."""
    return torch.cat([torch.cat([value * other for value in row], 1) for row in one])


def tucker(core, a, b):
    """A convolution's kernel from its core (i, j, k, l) and the factors of its rows (i, out) and columns (j, in)."""
    return sum(
        a[i][:, None, None, None] * b[j][None, :, None, None] * core[i, j] for i in range(len(a)) for j in range(len(b))
    )


def dora(weight, delta, magnitude, axis):
    """m (W + D) / |W + D|, row by row or column by column; less W."""
    new = (weight + delta).transpose(0, axis)
    lines = [m * line / line.flatten().square().sum().sqrt() for m, line in zip(magnitude, new, strict=True)]
    return torch.stack(lines).transpose(0, axis) - weight


def kinds(unet):
    """By name: a file's weights and what they do to which layer."""
    v, conv = f"{ATTENTION}.to_v", "mid_block.resnets.0.conv1"
    flat = {layer: f"lora_unet_{layer.replace('.', '_')}" for layer in (v, conv, "conv_norm_out")}
    W, K = (unet.get_submodule(layer).weight.detach() for layer in (v, conv))  # (16, 16), (16, 16, 3, 3)
    a, b = rand(2, 16), rand(16, 2, seed=1)
    low = {"lora_down.weight": a, "lora_up.weight": b, "alpha": torch.tensor(4.0)}
    m = W.norm(dim=1) * (1 + rand(16, seed=2))
    columns = W.norm(dim=0) * (1 + rand(16, seed=3))
    kernel = K.flatten(1).norm(dim=1) * (1 + rand(16, seed=4))
    ka, kb = rand(2, 16, 3, 3), rand(16, 2, 1, 1, seed=1)
    K_ab = torch.einsum("or,rikl->oikl", kb[:, :, 0, 0], ka)
    mid = rand(2, 2, 3, 3, seed=5)
    h = [rand(16, 3, seed=6), rand(3, 16, seed=7), rand(16, 3, seed=8), rand(3, 16, seed=9)]
    hk = [rand(2, 16, seed=6), rand(2, 16, seed=7), rand(2, 16, seed=8), rand(2, 16, seed=9)]
    t = [rand(2, 2, 3, 3, seed=10, std=1), rand(2, 2, 3, 3, seed=11, std=1)]
    w1, w2 = rand(4, 2, seed=12), rand(4, 8, seed=13)
    w1_a, w1_b, w2_a, w2_b = rand(4, 3, seed=14), rand(3, 2, seed=15), rand(4, 3, seed=16), rand(3, 8, seed=17)
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    hadamard = sum(h[0][:, [i]] * h[1][i] for i in range(3)) * sum(h[2][:, [i]] * h[3][i] for i in range(3))
    w2k = rand(4, 8, 3, 3, seed=18)
    return {
        "dora": (v, {**low, "dora_scale": m[:, None]}, dora(W, 2 * b @ a, m, 0)),
        "dora by columns": (v, {**low, "dora_scale": columns[None]}, dora(W, 2 * b @ a, columns, 1)),
        "dora, peft": (v, {"lora_A.weight": a, "lora_B.weight": b, "lora_magnitude_vector": m}, dora(W, b @ a, m, 0)),
        "dora of a kernel": (
            conv,
            {"lora_A.weight": ka, "lora_B.weight": kb, "lora_magnitude_vector.weight": kernel[None, :, None, None]},
            dora(K, K_ab, kernel, 0),
        ),
        "locon": (conv, {"lora_down.weight": ka, "lora_up.weight": kb}, K_ab),
        "locon, cp": (
            conv,
            {"lora_down.weight": a[:, :, None, None], "lora_mid.weight": mid, "lora_up.weight": kb},
            tucker(mid, kb[:, :, 0, 0].T, a),
        ),
        "loha": (v, dict(zip(names, h, strict=True)) | {"alpha": torch.tensor(1.5)}, 0.5 * hadamard),
        "loha, cp": (
            conv,
            dict(zip((*names, "hada_t1", "hada_t2"), hk + t, strict=True)),
            tucker(t[0], hk[0], hk[1]) * tucker(t[1], hk[2], hk[3]),
        ),
        "lokr": (v, {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(1e9)}, kron(w1, w2)),
        "lokr of low rank": (
            v,
            {"lokr_w1_a": w1_a, "lokr_w1_b": w1_b, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b, "alpha": torch.tensor(6.0)},
            2 * kron(w1_a @ w1_b, w2_a @ w2_b),
        ),
        "lokr of a kernel": (
            conv,
            {"lokr_w1": w1, "lokr_w2": w2k},
            torch.stack([torch.stack([kron(w1, w2k[:, :, i, j]) for j in range(3)], -1) for i in range(3)], -2),
        ),
        "lokr, cp": (
            conv,
            {"lokr_w1": w1, "lokr_t2": mid, "lokr_w2_a": rand(2, 4, seed=19), "lokr_w2_b": rand(2, 8, seed=20)},
            torch.stack(
                [
                    torch.stack(
                        [kron(w1, tucker(mid, rand(2, 4, seed=19), rand(2, 8, seed=20))[:, :, i, j]) for j in range(3)],
                        -1,
                    )
                    for i in range(3)
                ],
                -2,
            ),
        ),
        "lokr and dora": (v, {"lokr_w1": w1, "lokr_w2": w2, "dora_scale": m[:, None]}, dora(W, kron(w1, w2), m, 0)),
        "a difference": (v, {"diff": 0.1 * b @ a}, 0.1 * b @ a),
        "a norm's": ("conv_norm_out", {"w_norm": rand(8), "b_norm": rand(8, seed=1)}, rand(8)),
        "flat": flat,
    }


KINDS = ["dora", "dora by columns", "dora, peft", "dora of a kernel", "locon", "locon, cp", "loha", "loha, cp", "lokr"]
KINDS += ["lokr of low rank", "lokr of a kernel", "lokr, cp", "lokr and dora", "a difference", "a norm's"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_applied_as_its_closed_form_says(unet, tmp_path, kind):
    made = kinds(unet)
    layer, tensors, delta = made[kind]
    stem = f"unet.{layer}" if any("lora_A" in name for name in tensors) else made["flat"][layer]
    file = written(tmp_path / "a.safetensors", {f"{stem}.{name}": value for name, value in tensors.items()})
    deltas = {layer: delta} | ({f"{layer}.bias": tensors["b_norm"]} if "b_norm" in tensors else {})
    does(unet, file, deltas)
    # half of it lies half way
    same_weights(merged(unet, file, 0.5), with_weights(unet, {name: value / 2 for name, value in deltas.items()}))


def test_locons_middle_factor_is_a_convolution_between_two(unet, tmp_path):
    """The change's kernel does to a picture what its three convolutions do one after another."""
    layer, tensors, _ = kinds(unet)["locon, cp"]
    names = {f"lora_unet_{layer.replace('.', '_')}.{name}": value for name, value in tensors.items()}
    found = merged(unet, written(tmp_path / "a.safetensors", names)).get_submodule(layer).weight
    x, conv = rand(1, 16, 5, 5), torch.nn.functional.conv2d
    chain = conv(conv(x, tensors["lora_down.weight"]), tensors["lora_mid.weight"], padding=1)
    expected = conv(chain, tensors["lora_up.weight"])
    base = unet.get_submodule(layer).weight
    torch.testing.assert_close(conv(x, found - base, padding=1), expected, rtol=1e-4, atol=1e-5)


def test_kinds_in_one_file_and_a_bias(unet, tmp_path):
    made, tensors, deltas = kinds(unet), {}, {}
    for kind in ("lokr", "locon", "a norm's"):
        layer, weights, delta = made[kind]
        tensors |= {f"{made['flat'][layer]}.{name}": value for name, value in weights.items()}
        deltas[layer] = delta
    out = f"{ATTENTION}.to_out.0"
    tensors |= {f"{out}.lora_A.weight": rand(2, 16), f"{out}.lora_B.weight": rand(16, 2, seed=1)}
    tensors |= {f"{out}.lora_B.bias": rand(16, seed=2), f"{out}.diff_b": rand(16, seed=3)}
    deltas |= {out: rand(16, 2, seed=1) @ rand(2, 16), f"{out}.bias": rand(16, seed=2) + rand(16, seed=3)}
    deltas["conv_norm_out.bias"] = rand(8, seed=1)
    does(unet, written(tmp_path / "a.safetensors", tensors), deltas)


def test_in_half_precision_a_merge_rounds_once_and_a_dora_keeps_its_norms(unet, tmp_path):
    layer, tensors, _ = kinds(unet)["dora, peft"]
    file = written(tmp_path / "a.safetensors", {f"unet.{layer}.{name}": value for name, value in tensors.items()})
    half = copy.deepcopy(unet).to(torch.bfloat16)
    base = half.get_submodule(layer).weight.detach().float()
    expected = dora(base, tensors["lora_B.weight"] @ tensors["lora_A.weight"], tensors["lora_magnitude_vector"], 0)
    found = merged(half, file).get_submodule(layer).weight
    assert torch.equal(found, (base + expected).to(torch.bfloat16)) or (found - base - expected).abs().max() < 2e-3
    pipe = SimpleNamespace(unet=half)
    lora_apply.load_lora(pipe, file)
    assert {p.dtype for p in lora.adapter_parameters(pipe.unet).values()} == {torch.float32}
    assert {p.dtype for n, p in pipe.unet.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    assert output(copy.deepcopy(unet)).shape == output(pipe.unet.float()).shape


# ---- text encoders


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


# ---- settings


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
