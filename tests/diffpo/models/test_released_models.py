"""The released models: names and shapes of their files, and what is known of them without the hub."""

import original_format
import pytest
import torch
from single_files import sparse

from diffpo import models
from diffpo.common.errors import DiffpoError
from diffpo.config import Model
from diffpo.models import flux_names, original, released, sd3_names, unet_names

SD1 = original_format.ldm_unet(320, (1, 2, 4, 4), (1, 1, 1, 0), 768, linear=False)
SD2 = original_format.ldm_unet(320, (1, 2, 4, 4), (1, 1, 1, 0), 1024, linear=True)
SDXL = original_format.ldm_unet(320, (1, 2, 4), (0, 2, 10), 2048, linear=True, label=2816)


def test_the_lists_are_the_released_files():
    """As many tensors and numbers as in v1-5-pruned-emaonly, sd_xl_base_1.0, flux1-dev and flux1-schnell."""
    sizes = {
        name: (len(shapes), sum(torch.Size(shape).numel() for shape in shapes.values()))
        for name, shapes in {
            "sd1": SD1,
            "sdxl": SDXL,
            "vae": original_format.ldm_vae(),
            "dev": original_format.flux_model(True),
            "schnell": original_format.flux_model(False),
        }.items()
    }
    assert sizes == {
        "sd1": (686, 859_520_964),
        "sdxl": (1680, 2_567_463_684),
        "vae": (248, 83_653_863),
        "dev": (780, 11_901_408_320),
        "schnell": (776, 11_891_178_560),
    }


MMDIT = {"in_channels": 16, "joint_attention_dim": 4096, "pooled_projection_dim": 2048}
FLUX = {"in_channels": 64, "num_layers": 19, "num_single_layers": 38}


def mmdit(depth, positions, **options):
    wide = {"num_attention_heads": depth, "num_layers": depth, "caption_projection_dim": 64 * depth}
    return MMDIT | wide | {"pos_embed_max_size": positions, "qk_norm": "rms_norm", **options}


RELEASED = {
    "sd1": ("UNet2DConditionModel", released.UNET, SD1),
    "sd2": ("UNet2DConditionModel", released.UNET_2, SD2),
    "sdxl": ("UNet2DConditionModel", released.UNET_XL, SDXL),
    "sd3.5-medium": (
        "SD3Transformer2DModel",
        mmdit(24, 384, dual_attention_layers=list(range(13))),
        original_format.sd3_mmdit(24, 384, range(13)),
    ),
    "sd3.5-large": ("SD3Transformer2DModel", mmdit(38, 192), original_format.sd3_mmdit(38, 192)),
    "sd3-medium": (
        "SD3Transformer2DModel",
        mmdit(24, 192, qk_norm=None),
        original_format.sd3_mmdit(24, 192, (), False),
    ),
    "flux-dev": ("FluxTransformer2DModel", FLUX | {"guidance_embeds": True}, original_format.flux_model(True)),
    "flux-schnell": ("FluxTransformer2DModel", FLUX, original_format.flux_model(False)),
    "vae": ("AutoencoderKL", released.VAE, original_format.ldm_vae()),
    "vae-16": (
        "AutoencoderKL",
        released.VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
        original_format.ldm_vae(16, quant=False),
    ),
}


@pytest.mark.parametrize("name", list(RELEASED))
def test_names_and_shapes_of_the_released_networks(name):
    """On the meta device: ours are the original program's, and diffusers' converter gives its own back."""
    import diffusers
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    cls, config, expected = RELEASED[name]
    with torch.device("meta"):
        network = getattr(diffusers, cls).from_config(dict(config))
    write = {
        "SD3Transformer2DModel": sd3_names.sd3,
        "FluxTransformer2DModel": flux_names.flux,
        "AutoencoderKL": original.vae,
    }
    state = network.state_dict()
    found = write.get(cls, unet_names.unet)(state, network.config)
    prefix = "" if cls == "AutoencoderKL" else "model.diffusion_model."
    assert {prefix + key: tuple(value.shape) for key, value in found.items()} == expected
    back = SINGLE_FILE_LOADABLE_CLASSES[cls]["checkpoint_mapping_fn"]
    given = back(checkpoint={prefix + key: value for key, value in found.items()}, config=dict(config))
    assert {k: v.shape for k, v in given.items()} == {k: v.shape for k, v in state.items()}


@pytest.mark.parametrize(("name", "released_as"), [("ViT-H-14", released.CLIP_H), ("ViT-bigG-14", released.CLIP_G)])
def test_names_and_shapes_of_open_clip(name, released_as):
    """Against open_clip itself; of SD 2.x's 24 layers diffusers has 23, and no projection."""
    import open_clip
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        theirs = open_clip.create_model(name, device="meta")
        cls = CLIPTextModelWithProjection if name == "ViT-bigG-14" else CLIPTextModel
        ours = cls(CLIPTextConfig(**released_as))
    expected = {
        key: tuple(value.shape)
        for key, value in theirs.state_dict().items()
        if not key.startswith(("visual.", "logit_scale")) and "attn_mask" not in key
    }
    if name == "ViT-H-14":
        expected = {k: v for k, v in expected.items() if "resblocks.23." not in k and k != "text_projection"}
    found = original.open_clip(ours.state_dict())
    assert {key: tuple(value.shape) for key, value in found.items()} == expected
    back = original.from_open_clip(found, released_as["num_hidden_layers"])
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in original.clip(ours.state_dict()).items()}


def text_shapes(config, prefix, projection=False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(CLIPTextConfig(**config))
    write = original.open_clip if prefix.endswith(".model.") else original.clip
    return {prefix + name: tuple(value.shape) for name, value in write(model.state_dict()).items()}


@pytest.fixture(scope="module")
def released_files(tmp_path_factory):
    """Files with the released models' names and shapes."""
    folder = tmp_path_factory.mktemp("released")
    vae = {f"first_stage_model.{name}": shape for name, shape in original_format.ldm_vae().items()}
    sd1 = SD1 | vae | text_shapes(released.CLIP_L, "cond_stage_model.transformer.")
    sd2 = SD2 | vae | text_shapes(released.CLIP_H, "cond_stage_model.model.")
    sdxl = SDXL | vae | text_shapes(released.CLIP_L, "conditioner.embedders.0.transformer.")
    sdxl |= text_shapes(released.CLIP_G, "conditioner.embedders.1.model.", projection=True)
    return {
        "sd1": sparse(folder / "sd1.safetensors", sd1),
        "sd2": sparse(folder / "sd2.safetensors", sd2),
        "sd2-v": sparse(folder / "sd2-v.safetensors", sd2, {"modelspec.prediction_type": "v"}),
        "sdxl": sparse(folder / "sdxl.safetensors", sdxl),
        "sdxl-v": sparse(folder / "sdxl-v.safetensors", sdxl | {"v_pred": (0,)}),
    }


@pytest.mark.parametrize(
    ("name", "family", "prediction", "scale"),
    [
        ("sd1", "StableDiffusion", "epsilon", 0.18215),
        ("sd2-v", "StableDiffusion", "v_prediction", 0.18215),
        ("sdxl", "StableDiffusionXL", "epsilon", 0.13025),
        ("sdxl-v", "StableDiffusionXL", "v_prediction", 0.13025),
    ],
)
def test_released_models_need_nothing_from_the_hub(released_files, monkeypatch, name, family, prediction, scale):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = models.load(Model(path=str(released_files[name])), "bf16", 512)
    assert (type(found).__name__, found.prediction) == (family, prediction)
    assert found.vae_settings()["scaling_factor" if scale != 0.18215 else "layers_per_block"] in (scale, 2)
    network = found.meta_network()
    assert network.config.sample_size == {"sd1": 64, "sd2-v": 64}.get(name, 128) and found.vae_factor() == 8
    # abar_T by hand: betas evenly spaced in their roots
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    last = (1 - betas).prod().sqrt().item()
    assert found.alpha_sigma(torch.tensor([999]))[0].item() == pytest.approx(last, rel=1e-4)


def test_sd2_is_asked_what_it_predicts(released_files):
    file = str(released_files["sd2"])
    with pytest.raises(DiffpoError, match=r"sd2\.safetensors is Stable Diffusion 2\.x, .* sd2 or to sd2-v"):
        models.load(Model(path=file))
    assert models.load(Model(path=file, config="sd2")).prediction == "epsilon"
    assert models.load(Model(path=file, config="sd2-v")).prediction == "v_prediction"
    with pytest.raises(DiffpoError, match=r"sd2\.safetensors has 865,910,724 weights.* sd1 .*859,520,964"):
        models.load(Model(path=file, config="sd1")).meta_network()
    with pytest.raises(DiffpoError, match=r"sd2\.safetensors.*StableDiffusionXLPipeline.*StableDiffusionPipeline"):
        models.load(Model(path=file, config="sdxl"))


def test_the_vocabulary_is_clips():
    """The same numbers for words as by open_clip's own tokenizer."""
    import open_clip
    from transformers import CLIPTokenizer

    texts = ["a photo of a cat", "Über-naïve straße, 3 dogs'!", "猫 🐈 photorealistic masterpiece"]
    expected = open_clip.SimpleTokenizer()
    for part, pad in (("tokenizer", 49407), ("tokenizer_2", 0)):
        tokenizer = CLIPTokenizer.from_pretrained(released.folder("sdxl"), subfolder=part)
        assert len(tokenizer) == 49408 and tokenizer.pad_token_id == pad
        for text in texts[: 3 if pad else 1]:  # "!" is special where it pads
            assert tokenizer(text).input_ids[1:-1] == expected.encode(text), text
        assert tokenizer("cat", padding="max_length").input_ids == [49406, 2368, 49407, *[pad] * 74]
