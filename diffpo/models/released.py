"""The configs of the released Stable Diffusion pipelines: a single file of theirs needs nothing from the hub.

Numbers are those of the released config files where they differ from the classes' defaults, and where diffusers'
converters look for them. The vocabulary is OpenAI's CLIP's (MIT licence), which the package open_clip brings.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

from ..common.errors import DiffpoError
from ..common.files import writing

VOCABULARY = 49408
BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
DDIM = {"_class_name": "DDIMScheduler", **BETAS, "clip_sample": False, "set_alpha_to_one": False}
EULER = {"_class_name": "EulerDiscreteScheduler", **BETAS}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
CLIP = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "vocab_size": VOCABULARY}
CLIP_L = {
    **CLIP,
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
CLIP_H = CLIP_L | {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,  # the last one is not computed
    "projection_dim": 512,
}
CLIP_G = CLIP_L | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "sample_size": 64,
    "layers_per_block": 2,
    "cross_attention_dim": 768,
}
UNET_2 = UNET | {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "upcast_attention": True,
}
UNET_XL = UNET | {
    "sample_size": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
END = "<|endoftext|>"
# by what the file is: the pipeline, its options, the parts' configs, and what each tokenizer pads with
PIPELINES: dict[str, tuple[str, dict[str, Any], dict[str, dict[str, Any]], dict[str, str]]] = {
    "sd1": (
        "StableDiffusionPipeline",
        {"requires_safety_checker": False},
        {"scheduler": DDIM, "unet": UNET, "vae": VAE, "text_encoder": CLIP_L},
        {"tokenizer": END},
    ),
    "sd2": (
        "StableDiffusionPipeline",
        {"requires_safety_checker": False},
        {"scheduler": DDIM, "unet": UNET_2, "vae": VAE, "text_encoder": CLIP_H},
        {"tokenizer": "!"},
    ),
    "sdxl": (
        "StableDiffusionXLPipeline",
        {"force_zeros_for_empty_prompt": True},
        {
            "scheduler": EULER,
            "unet": UNET_XL,
            "vae": VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
            "text_encoder": CLIP_L,
            "text_encoder_2": CLIP_G,
        },
        {"tokenizer": END, "tokenizer_2": "!"},
    ),
}


@functools.cache
def folder(name: str) -> Path:
    """A pipeline's folder without weights, one of `PIPELINES`; it lasts as long as the process."""
    where = Path(_scratch().name) / name
    pipeline, options, parts, tokenizers = PIPELINES[name]
    index = {"_class_name": pipeline, **options}
    files: dict[str, Any] = {}
    for part, config in parts.items():
        cls = config.get("_class_name")
        index[part] = ["diffusers", cls] if cls else ["transformers", config["architectures"][0]]
        files[f"{part}/{'scheduler_config' if part == 'scheduler' else 'config'}.json"] = config
    for part, pad in tokenizers.items():
        index[part] = ["transformers", "CLIPTokenizer"]
        words = {"bos_token": "<|startoftext|>", "eos_token": END, "unk_token": END, "pad_token": pad}
        files[f"{part}/tokenizer_config.json"] = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **words}
        files[f"{part}/special_tokens_map.json"] = words
        files[f"{part}/vocab.json"], merges = vocabulary()
        files[f"{part}/merges.txt"] = "\n".join(["#version: 0.2", *merges]) + "\n"
    with writing(f"the model's configs into {where}", "TMPDIR=FOLDER", kept=""):
        for path, content in {"model_index.json": index, **files}.items():
            (where / path).parent.mkdir(parents=True, exist_ok=True)
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            (where / path).write_text(text, encoding="utf-8")
    return where


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="diffpo-configs-")


@functools.cache
def vocabulary() -> tuple[dict[str, int], list[str]]:
    """CLIP's byte pair encoding: the number of each token, and the merges in their order."""
    package = importlib.util.find_spec("open_clip")
    path = Path(package.origin if package and package.origin else ".").with_name("bpe_simple_vocab_16e6.txt.gz")
    try:
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    except (OSError, EOFError, ValueError) as error:
        raise DiffpoError(f"CLIP's vocabulary cannot be read ({error}): pip install open_clip_torch") from None
    merges = lines[1 : VOCABULARY - 2 * 256 - 2 + 1]
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = [*map(chr, printed), *(chr(256 + n) for n in range(256 - len(printed)))]
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *(merge.replace(" ", "") for merge in merges)]
    tokens += ["<|startoftext|>", END]
    return {token: number for number, token in enumerate(tokens)}, merges
