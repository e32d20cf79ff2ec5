"""kohya's format, read back by diffusers' own loaders."""

import diffusers
import pytest
import torch
from exports import fresh, output
from safetensors.torch import load_file, save_file

from diffpo.common.errors import DiffpoError
from diffpo.export import export, kohya
from diffpo.models.flux import Flux
from diffpo.models.sdxl import StableDiffusionXL
from diffpo.weights import lora
from diffpo.weights.lora_change import Change

# of FLUX's tiny version, the blocks whose widths diffusers' reader does not write out
DOUBLE = [f"transformer_blocks.{i}.attn.{part}" for i in (0, 1) for part in ("to_q", "to_v", "to_out.0", "add_k_proj")]
UNET = ["to_q", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "time_emb_proj", "conv_shortcut", "upsamplers.0.conv"]
UNET += ["downsamplers.0.conv", "conv_in", "time_embedding.linear_1"]


@pytest.mark.parametrize(
    ("name", "targets", "alpha"),
    [("sd", None, 2), ("sd", UNET, 3), ("sdxl", None, 2), ("sdxl", UNET, 3), ("flux", DOUBLE, 2), ("flux", DOUBLE, 3)],
)
def test_kohya_through_the_pipelines_own_loader(tiny_folder, trained, tmp_path, name, targets, alpha):
    run, network = trained(name, alpha=alpha, targets=targets)
    export.run(export.Export(run, "kohya", str(tiny_folder(name)), tmp_path / "style"))
    pipe = fresh(tiny_folder(name))
    without = output(lora.network_of(pipe))
    pipe.load_lora_weights(str(tmp_path / "style"), weight_name="style.safetensors")
    expected = output(network)
    assert (expected - without).abs().max() > 1e-2
    torch.testing.assert_close(output(lora.network_of(pipe)), expected, rtol=1e-4, atol=1e-4)
    state = load_file(tmp_path / "style" / "style.safetensors")
    assert {key.split(".", 1)[1] for key in state} == {"lora_down.weight", "lora_up.weight", "alpha"}
    for key, value in state.items():  # alpha / rank is what scales
        if key.endswith(".alpha"):
            assert value.item() / len(state[key.replace("alpha", "lora_down.weight")]) == alpha / 2


def test_sdxl_names_are_those_of_the_released_checkpoint():
    """Where sd_xl_base_1.0.safetensors has its transformers: 70 blocks of them."""
    config = {"block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10)}
    down = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    up = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    with torch.device("meta"):
        network = diffusers.UNet2DConditionModel(
            **config, down_block_types=down, up_block_types=up, cross_attention_dim=2048, use_linear_projection=True
        )
    names = {name for name, _ in network.named_modules() if name.endswith("attn2.to_out.0")}
    empty = Change("lora", {"down": torch.zeros(1, 1), "up": torch.zeros(1, 1)})
    state = kohya.convert(StableDiffusionXL, network, dict.fromkeys(names, empty))
    there = {"input_blocks_4_1": 2, "input_blocks_5_1": 2, "input_blocks_7_1": 10, "input_blocks_8_1": 10}
    there |= {"middle_block_1": 10, "output_blocks_0_1": 10, "output_blocks_1_1": 10, "output_blocks_2_1": 10}
    there |= {"output_blocks_3_1": 2, "output_blocks_4_1": 2, "output_blocks_5_1": 2}
    expected = {
        f"lora_unet_{block}_transformer_blocks_{i}_attn2_to_out_0.alpha" for block, n in there.items() for i in range(n)
    }
    assert {key for key in state if key.endswith("alpha")} == expected and len(expected) == 70


def test_flux_at_its_own_width():
    """Every layer of a block of each kind, read by diffusers: scale * B A is what it was, in its rows."""
    with torch.device("meta"):
        network = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    draw, layers = torch.Generator().manual_seed(0), {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and "transformer_blocks" in name:
            down = torch.randn(2, module.in_features, generator=draw)
            up = torch.randn(module.out_features, 2, generator=draw)
            layers[name] = Change("lora", {"down": down, "up": up}, 1.5)
    del layers["single_transformer_blocks.0.attn.to_k"]
    state = kohya.convert(Flux, network, layers)
    assert state["lora_unet_single_blocks_0_linear1.alpha"] == 12
    read = diffusers.FluxPipeline.lora_state_dict(dict(state))
    read = {name.removeprefix("transformer."): value for name, value in read.items()}
    assert not read.pop("single_transformer_blocks.0.attn.to_k.lora_B.weight").any()
    del read["single_transformer_blocks.0.attn.to_k.lora_A.weight"]
    assert len(read) == 2 * len(layers) == 38
    for name, layer in layers.items():
        probe = torch.randn(layer.factors["down"].shape[1], generator=draw)
        found = read[f"{name}.lora_B.weight"] @ (read[f"{name}.lora_A.weight"] @ probe)
        expected = 1.5 * (layer.factors["up"] @ (layer.factors["down"] @ probe))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["sd3", "pixart", "dit"])
def test_families_without_the_format_are_named(tiny_folder, trained, tmp_path, name):
    run, _ = trained(name)
    with pytest.raises(DiffpoError, match=r"LoRA for \w+Pipeline.* cannot be written in kohya's format"):
        export.run(export.Export(run, "kohya", str(tiny_folder(name)), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_diffusers_cannot_read_back_is_not_kept(tiny_folder, trained, tmp_path):
    """diffusers' reader takes FLUX's single blocks at their released width alone."""
    run, _ = trained("flux")
    with pytest.raises(DiffpoError, match=r"diffusers cannot read .*--to merged"):
        export.run(export.Export(run, "kohya", str(tiny_folder("flux")), tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_lokr_of_three_layers_in_one_is_refused_by_name(tiny_folder, tmp_path):
    """FLUX's query, key and value under one name: a Kronecker product of all rows is none of each layer's own."""
    width = fresh(tiny_folder("flux")).transformer.transformer_blocks[0].attn.to_q.weight.shape[0]
    file = tmp_path / "qkv.safetensors"
    factors = {"lokr_w1": torch.ones(3, 1), "lokr_w2": torch.ones(width, width)}
    save_file({f"transformer.double_blocks.0.img_attn.qkv.{name}": each for name, each in factors.items()}, file)
    with pytest.raises(DiffpoError, match=f"{file.name}.* transformer\\b"):
        export.run(export.Export(file, "kohya", str(tiny_folder("flux")), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_wrong_scale_would_be_noticed(tiny_sd, trained, tmp_path, monkeypatch):
    convert = kohya.convert

    def scale_one(*args):
        return {k: v / 1.5 if k.endswith("alpha") else v for k, v in convert(*args).items()}

    monkeypatch.setattr(kohya, "convert", scale_one)
    run, _ = trained("sd")
    with pytest.raises(DiffpoError, match=r"kohya.*was not kept; .*--to diffusers"):
        export.run(export.Export(run, "kohya", str(tiny_sd), tmp_path / "out"))
    assert not (tmp_path / "out").exists()
