"""Files that are no model, or a damaged or incomplete one, are refused by what they are."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from single_files import model_of, same

from diffpo import models
from diffpo.common.errors import DiffpoError
from diffpo.config import Model


def names_of(*names, width=4):
    return {name: torch.zeros(width, width, 1, 1) for name in names}


UNET = "model.diffusion_model.input_blocks.0.0.weight"
REFUSED = {
    "kohya": (names_of("lora_unet_mid_block_attentions_0.lora_down.weight"), "a LoRA, not a model.*--lora"),
    "peft": (names_of("unet.mid_block.to_q.lora_A.weight"), "a LoRA, not a model"),
    "flux-lora": (names_of("diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight"), "a LoRA, not a model"),
    "vae": (names_of("first_stage_model.decoder.conv_in.weight"), "a VAE alone: set model.vae"),
    "bare-vae": (names_of("encoder.conv_in.weight", "decoder.conv_in.weight"), "a VAE alone: set model.vae"),
    "text": (names_of("text_model.encoder.layers.0.mlp.fc1.weight"), "a text encoder alone"),
    "t5": (names_of("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"), "a text encoder alone"),
    "embedding": (names_of("emb_params"), "a textual inversion"),
    "unet": (names_of("input_blocks.0.0.weight", "out.2.weight"), "a UNet alone"),
    "diffusers": (names_of("down_blocks.0.resnets.0.conv1.weight"), "alone, with diffusers' names.*folder"),
    "controlnet": (names_of(UNET, "control_model.time_embed.0.weight"), "a ControlNet"),
    "refiner": (names_of(UNET, "conditioner.embedders.0.model.ln_final.weight"), "SDXL's refiner"),
    "flux2": (
        names_of("double_blocks.0.img_attn.qkv.weight", "single_stream_modulation.lin.weight"),
        "FLUX.2.*set model.config",
    ),
    "chroma": (
        names_of("double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.in_proj.bias"),
        "Chroma.*set model.config",
    ),
    "lumina": (names_of("cap_embedder.1.weight", "noise_refiner.0.attention.qkv.weight"), "Lumina-Image 2.0"),
    "nf4": (names_of("double_blocks.0.img_attn.qkv.weight.absmax"), "quantised to few bits.*nf4"),
    "upscaler": (names_of("conv_first.weight", "body.0.rdb1.conv1.weight"), r"2 weights"),
    "empty": ({}, r"\(0 weights\)"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_other_files_are_called_what_they_are(tmp_path, name):
    state, said = REFUSED[name]
    file = tmp_path / f"{name}.safetensors"
    save_file(state, file)
    with pytest.raises(DiffpoError, match=rf"{name}\.safetensors .*{said}"):
        models.load(Model(path=str(file)))


def test_inpainting_is_refused(one, tmp_path):
    folder, file = one("sd")
    state = load_file(file)
    state["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(8, 9, 3, 3)
    save_file(state, tmp_path / "inpaint.safetensors")
    with pytest.raises(DiffpoError, match=r"inpaint\.safetensors takes 9 input channels.*inpainting"):
        models.load(model_of(tmp_path / "inpaint.safetensors", folder))


def test_no_weight_may_be_missing_or_too_much(one, tmp_path):
    folder, file = one("sdxl")
    lost = {
        "unet": "model.diffusion_model.middle_block.1.proj_in.weight",
        "vae": "first_stage_model.encoder.norm_out.bias",
        "text_encoder": "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
        "text_encoder_2": "conditioner.embedders.1.model.text_projection",
    }
    for part, name in lost.items():
        state = load_file(file)
        value = state.pop(name)
        save_file(state, tmp_path / "less.safetensors")
        with pytest.raises(DiffpoError, match=rf"the {part} .*less\.safetensors"):
            models.load_pipeline(model_of(tmp_path / "less.safetensors", folder), device="cpu")
        prefix = name.rpartition("." if part != "text_encoder_2" else "text")[0].rstrip(".")
        save_file(load_file(file) | {f"{prefix}.and_more.weight": value.clone()}, tmp_path / "more.safetensors")
        with pytest.raises(DiffpoError, match=rf"the {part} .*more\.safetensors"):
            models.load_pipeline(model_of(tmp_path / "more.safetensors", folder), device="cpu")


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    for name in ("model.ckpt", "model.pt", "model.bin", "model.safetensors"):
        torch.save({"state_dict": Bomb()}, tmp_path / name)
        with pytest.raises(DiffpoError, match=rf"{name} is pickled(.|\n)*weights_only=True"):
            models.load(Model(path=str(tmp_path / name)))
    # the way out does what it says
    state = {"a": torch.arange(3.0), "b": torch.ones(2).to(torch.float16)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "model.ckpt")
    with pytest.raises(DiffpoError) as error:
        models.load(Model(path=str(tmp_path / "model.ckpt")))
    program = str(error.value).partition('python -c "')[2].removesuffix('"')
    exec(program, {})
    same(load_file(tmp_path / "model-converted.safetensors"), state)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("cut.safetensors", None, r"cut\.safetensors: .*truncated"),
        ("page.safetensors", b"<!DOCTYPE html><html>log in</html>", r"page\.safetensors: .*not a safetensors file"),
        ("empty.safetensors", b"", r"empty\.safetensors: .*not a safetensors file"),
        ("lfs.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        ("model.gguf", b"GGUF\x03\x00", r"model\.gguf is quantised"),
    ],
)
def test_damaged_files(one, tmp_path, name, content, said):
    whole = one("sd")[1].read_bytes()
    (tmp_path / name).write_bytes(whole[:-100] if content is None else content)
    with pytest.raises(DiffpoError, match=said):
        models.load(Model(path=str(tmp_path / name)))


def test_files_that_are_not_there(one, tmp_path):
    folder, file = one("sd")
    with pytest.raises(DiffpoError, match=r"there is no file .*gone\.safetensors"):
        models.load(Model(path=str(tmp_path / "gone.safetensors")))
    with pytest.raises(DiffpoError, match=r"https://host/a/b\.safetensors is a URL"):
        models.load(Model(path="https://host/a/b.safetensors"))
    with pytest.raises(DiffpoError, match=r"holds no model_index\.json.*name the file itself: .*sd\.safetensors"):
        models.load(Model(path=str(file.parent)))
    with pytest.raises(DiffpoError, match=r"model\.config .*leave it out"):
        models.load(model_of(folder, folder))
    with pytest.raises(DiffpoError, match=r"model\.config=.*nowhere: there is no such folder"):
        models.load(model_of(file, tmp_path / "nowhere"))
    with pytest.raises(DiffpoError, match=r"'sdxxl'.* sd1, sd2, sdxl, sd2-v, sdxl-v"):
        models.load(model_of(file, "sdxxl"))
    with pytest.raises(DiffpoError, match="is not the folder of a pipeline"):
        models.load(model_of(file, tmp_path))
    with pytest.raises(DiffpoError, match=r"cannot read the scheduler|cannot read the unet"):
        (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
        models.load(model_of(file, tmp_path))
