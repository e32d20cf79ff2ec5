"""LoRA files of all kinds of weights (DoRA, LoCon, LoHa, LoKr): what they do, against closed forms."""

import copy
from types import SimpleNamespace

import pytest
import torch
from exports import fresh, output
from lora_files import ATTENTION, does, merged, rand, same_weights, with_weights, written

from diffpo.weights import lora, lora_apply


@pytest.fixture(scope="module")
def unet(tiny_sdxl):
    return fresh(tiny_sdxl).unet


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
