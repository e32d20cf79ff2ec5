"""Tiny pipelines with transformers, built from configs with real architectures: SD3, SD3.5, PixArt, FLUX, DiT."""

import json
from pathlib import Path

import torch
from tiny import TEXT, clip_text_config, clip_tokenizer, vae

T5_WIDTH = 16
FLOW = {"shift": 3.0, "num_train_timesteps": 1000}


def _t5():
    """A real T5 encoder and its tokenizer, which spells words out in letters."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    letters = "▁abcdefghijklmnopqrstuvwxyz0123456789.,"
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *[(letter, -3.0) for letter in letters]]
    tokenizer = T5TokenizerFast(vocab=vocabulary, extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=T5_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config), tokenizer


def make_sd3(folder: Path, seed: int = 0, **options) -> Path:
    """``options`` of the transformer: qk_norm and dual_attention_layers make it SD3.5's."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(seed)
    t5, t5_tokenizer = _t5()
    settings = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        # CLIP's two embeddings side by side, and padding
        "joint_attention_dim": 2 * TEXT["hidden_size"],
        "caption_projection_dim": 16,
        "pooled_projection_dim": 2 * TEXT["projection_dim"],
        "pos_embed_max_size": 16,
    }
    t5 = _wider(t5, settings["joint_attention_dim"])
    pipe = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**settings | options),
        scheduler=FlowMatchEulerDiscreteScheduler(**FLOW),
        vae=vae(shift_factor=0.06),
        text_encoder=CLIPTextModelWithProjection(clip_text_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_text_config()),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    )
    return _save(pipe, folder)


def make_sd35(folder: Path, seed: int = 0) -> Path:
    return make_sd3(folder, seed, qk_norm="rms_norm", dual_attention_layers=(0,))


def _wider(t5, width: int):
    from transformers import T5EncoderModel

    config = type(t5.config)(**{**t5.config.to_dict(), "d_model": width})
    return T5EncoderModel(config)


def make_pixart(folder: Path, sigma: bool = True, seed: int = 0, layers: int = 2) -> Path:
    """PixArt-Sigma, or PixArt-alpha with size conditioning, as at 1024 px."""
    from diffusers import (
        DPMSolverMultistepScheduler,
        PixArtAlphaPipeline,
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
    )

    torch.manual_seed(seed)
    t5, tokenizer = _t5()
    transformer = PixArtTransformer2DModel(
        sample_size=8 if sigma else 128,  # with 128 the pipeline conditions on sizes
        num_layers=layers,
        num_attention_heads=2,
        attention_head_dim=12,  # the width is divisible by 3: one part for each number of the size
        cross_attention_dim=24,
        caption_channels=T5_WIDTH,
        in_channels=4,
        out_channels=8,
    )
    pipe = (PixArtSigmaPipeline if sigma else PixArtAlphaPipeline)(
        transformer=_not_zero(transformer),
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
        vae=vae(),
        text_encoder=t5,
        tokenizer=tokenizer,
    )
    return _save(pipe, folder)


def make_alpha(folder: Path, seed: int = 0) -> Path:
    return make_pixart(folder, sigma=False, seed=seed)


def make_flux(folder: Path, seed: int = 0) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    t5, t5_tokenizer = _t5()
    pipe = FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=TEXT["hidden_size"],
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**FLOW, use_dynamic_shifting=True),
        vae=vae(shift_factor=0.1),
        text_encoder=CLIPTextModel(clip_text_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
    )
    return _save(pipe, folder)


def make_dit(folder: Path, seed: int = 0, names: tuple[str, ...] = ()) -> Path:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8
    )
    pipe = DiTPipeline(
        transformer=_not_zero(transformer),
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False, set_alpha_to_one=False),
        vae=vae(),
    )
    _save(pipe, folder)
    # as in the released model's; `save_pretrained` does not write it
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {"0": "tench", "1": "goldfish, carassius auratus"}
    index["id2label"] |= {str(2 + i): name for i, name in enumerate(names)}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _not_zero(network):
    """The released networks' last layers are trained; some fresh ones are 0."""
    for parameter in network.parameters():
        if parameter.ndim > 1 and parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.02)
    return network


def _save(pipe, folder: Path) -> Path:
    pipe.save_pretrained(folder)
    return folder


def make_kontext(folder: Path) -> Path:
    from diffusers import FluxKontextPipeline, FluxPipeline

    flux = FluxPipeline.from_pretrained(make_flux(folder.parent / "flux"))
    return _save(FluxKontextPipeline(**flux.components), folder)
