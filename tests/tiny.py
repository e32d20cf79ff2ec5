"""Tiny pipelines built from configs with real architectures, and small data sets of pairs."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "projection_dim": 16,
}


def clip_tokenizer():
    """A real CLIP tokenizer that spells words out in bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    symbols = sorted(ByteLevel.alphabet())
    vocabulary = [*symbols, *[f"{s}</w>" for s in symbols], "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)},
        merges=[],
        model_max_length=TEXT["max_position_embeddings"],
    )
    assert len(tokenizer) == len(vocabulary) == 514
    return tokenizer


def clip_text_config():
    from transformers import CLIPTextConfig

    return CLIPTextConfig(vocab_size=514, bos_token_id=512, eos_token_id=513, pad_token_id=513, **TEXT)


def vae(latent_channels: int = 4, **options):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        **options,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        sample_size=16,
        mid_block_add_attention=False,
    )


def _unet(**options):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        use_linear_projection=True,
        **options,
    )


def _save(pipe, folder: Path) -> Path:
    pipe.save_pretrained(folder)
    return folder


def make_sdxl(folder: Path, seed: int = 0) -> Path:
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    pipe = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(clip_text_config()),
        text_encoder_2=CLIPTextModelWithProjection(clip_text_config()),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=_unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )
    return _save(pipe, folder)


def make_sd(folder: Path, prediction: str = "epsilon", seed: int = 0) -> Path:
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(clip_text_config()),
        tokenizer=clip_tokenizer(),
        unet=_unet(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction,
            clip_sample=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _save(pipe, folder)


def picture(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    """A smooth random picture (width, height)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def pick_a_pic_rows(n: int, size: tuple[int, int] = (16, 16), ties: int = 0) -> list[dict]:
    """n rows in Pick-a-Pic's columns; the first image wins in even rows; the last ``ties`` rows are ties."""
    rows = []
    for i in range(n):
        label = 0.5 if i >= n - ties else float(i % 2 == 0)
        rows.append(
            {
                "caption": f"cat {i % 3}",
                "jpg_0": png(picture(2 * i, size)),
                "jpg_1": png(picture(2 * i + 1, size)),
                "label_0": label,
                "label_1": 1 - label,
            }
        )
    return rows


def write_parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_folder(folder: Path, n: int) -> Path:
    """A folder with metadata.jsonl (prompt, chosen_file_name, rejected_file_name)."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(n):
        names = {}
        for j, role in enumerate(("chosen", "rejected")):
            names[f"{role}_file_name"] = f"images/{i}-{role}.png"
            picture(2 * i + j).save(folder / names[f"{role}_file_name"])
        lines.append(json.dumps({"prompt": f"dog {i}", **names}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def metrics_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
