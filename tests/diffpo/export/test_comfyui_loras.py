"""ComfyUI's format, applied by its formula written down here once more."""

import re

import pytest
import torch
from exports import MAKE, fresh, output
from safetensors.torch import load_file

from diffpo.common.errors import DiffpoError
from diffpo.export import export
from diffpo.weights import lora, lora_apply

UNET = ["to_q", "to_out.0", "conv1", "time_emb_proj", "conv_shortcut", "upsamplers.0.conv"]
FIELDS = {"lora_up.weight", "lora_down.weight", "alpha", "dora_scale", "lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}


def rows(weight):
    return torch.stack([row.norm() for row in weight]).reshape(-1, *[1] * (weight.dim() - 1))


def applied(network, tensors):
    """ComfyUI's load_lora and calculate_weight at strength 1: by key, every weight that a layer's names stand for."""
    weights, used = {name: value.clone() for name, value in network.state_dict().items()}, set()
    for name, module in network.named_modules():
        unet = network.__class__.__name__.startswith("UNet")
        key = f"lora_unet_{name.replace('.', '_')}" if unet else f"transformer.{name}"
        own = {k[len(key) + 1 :]: v for k, v in tensors.items() if k.rsplit(".", 2 if "weight" in k else 1)[0] == key}
        if not own:
            continue
        assert own.keys() <= FIELDS
        used |= {f"{key}.{field}" for field in own}
        weight, alpha = module.weight.detach(), own["alpha"].item()
        if "lora_up.weight" in own:
            up, down = own["lora_up.weight"], own["lora_down.weight"]
            change = alpha / down.shape[0] * torch.mm(up.flatten(1), down.flatten(1)).reshape(weight.shape)
        else:
            rank = own["lokr_w2_b"].shape[0] if "lokr_w2_b" in own else None
            w2 = own["lokr_w2_a"] @ own["lokr_w2_b"] if rank else own["lokr_w2"]
            w1 = own["lokr_w1"][:, :, None, None] if w2.dim() == 4 else own["lokr_w1"]
            change = (alpha / rank if rank else 1.0) * torch.kron(w1, w2).reshape(weight.shape)
        new = weight + change
        if "dora_scale" in own:
            assert own["dora_scale"].shape[0] == weight.shape[0]
            new = new * (own["dora_scale"] / (rows(weight) + torch.finfo(torch.float32).eps))
        weights[f"{name}.weight"] = new
    assert used == tensors.keys()
    network.load_state_dict(weights)
    return network


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
@pytest.mark.parametrize("name", ["sd", "sdxl", *[each for each in MAKE if each != "dit"]])
def test_every_kind_of_every_family_is_what_was_trained(tiny_folder, trained, tmp_path, name, kind):
    targets = UNET if name in ("sd", "sdxl") else None
    run, network = trained(name, kind=kind, targets=targets, rank_pattern={"to_q": 1})
    made = export.run(export.Export(run, "comfyui", str(tiny_folder(name)), tmp_path / "style"))
    base = lora.network_of(fresh(tiny_folder(name)))
    without, expected = output(base), output(network)
    found = output(applied(base, load_file(made / "style.safetensors")))
    assert (expected - without).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_names_are_those_of_comfyuis_table(tiny_folder, trained, tmp_path):
    """Of a layer that ComfyUI has as rows of another."""
    run, _ = trained("sd3")
    made = export.run(export.Export(run, "comfyui", str(tiny_folder("sd3")), tmp_path / "style"))
    names = {key.split(".lora")[0].removesuffix(".alpha") for key in load_file(made / "style.safetensors")}
    assert {"transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.add_k_proj"} <= names
    assert all(re.fullmatch(r"transformer\.transformer_blocks\.\d+\.attn\.\w+(\.0)?", name) for name in names)


def test_half_precision_is_rounded_and_the_reader_knows_whose_norms_they_are(tiny_folder, trained, tmp_path):
    run, network = trained("sd", kind="dora")
    made = export.run(export.Export(run, "comfyui", str(tiny_folder("sd")), tmp_path / "style", dtype="bfloat16"))
    tensors = load_file(made / "style.safetensors")
    assert {value.dtype for key, value in tensors.items() if not key.endswith(".alpha")} == {torch.bfloat16}
    found = output(applied(fresh(tiny_folder("sd")).unet, {key: value.float() for key, value in tensors.items()}))
    torch.testing.assert_close(found, output(network), rtol=0.05, atol=0.05)
    with pytest.raises(DiffpoError, match=r"style.safetensors is a DoRA for ComfyUI .* the run instead"):
        lora_apply.load_lora(fresh(tiny_folder("sd")), made / "style.safetensors")


def test_what_comfyui_lacks_is_refused_with_the_way_out(tiny_folder, trained, tmp_path):
    run, _ = trained("dit")
    with pytest.raises(DiffpoError, match=r"DiTPipeline .* --to diffusers or --to merged"):
        export.run(export.Export(run, "comfyui", str(tiny_folder("dit")), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_dora_whose_rows_comfyui_swaps_is_refused(tiny_folder, trained, tmp_path):
    run, _ = trained("flux", kind="dora", targets=["norm_out.linear"])
    with pytest.raises(DiffpoError, match=r"DoRA of norm_out.linear with wrong norms; use --to merged"):
        export.run(export.Export(run, "comfyui", str(tiny_folder("flux")), tmp_path / "out"))
