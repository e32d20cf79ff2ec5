"""A random SDXL pipeline of a chosen width: the published layout, with all channels scaled."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffpo.common.carried import HOME as ROOT
from diffpo.models.released import EULER, UNET_XL

HEAD = 64  # channels of an attention head, as in SDXL
GROUPS = 32  # of a group norm


def make(folder: Path, channels: int) -> Path:
    """Write the pipeline into ``folder``, unless it is there. ``channels``: of the first level; SDXL has 320. Its text
    encoders have 2.4 and 4 times as many, as CLIP-L and OpenCLIP bigG have at SDXL's width."""
    if (folder / "model_index.json").exists():
        return folder
    torch.manual_seed(0)
    tiny = ROOT / "assets" / "tiny-sdxl"
    tokenizers = [CLIPTokenizer.from_pretrained(tiny, subfolder=name) for name in ("tokenizer", "tokenizer_2")]
    widths = [HEAD * round(2.4 * channels / HEAD), 4 * channels]
    unet = dict(UNET_XL)
    levels = [channels, 2 * channels, 4 * channels]
    unet |= {"block_out_channels": levels, "attention_head_dim": [level // HEAD for level in levels]}
    unet |= {"cross_attention_dim": sum(widths), "projection_class_embeddings_input_dim": widths[1] + 6 * 256}
    vae = AutoencoderKL(
        block_out_channels=[GROUPS * max(1, round(width * channels / 320 / GROUPS)) for width in (128, 256, 512, 512)],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.13025,
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(tokenizers[0], widths[0], 12)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizers[1], widths[1], 32)),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=UNet2DConditionModel.from_config(unet),
        scheduler=EulerDiscreteScheduler.from_config(EULER),
    )
    pipe.save_pretrained(folder)
    return folder


def text_config(tokenizer, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
