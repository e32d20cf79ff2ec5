"""The pipeline from its trained parts, and its card with what it can do (stage assemble)."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from diffpo.common.tables import Table

from .card import base_table, parameters_and_megabytes, write_card, write_log
from .common import LATENT_CHANNELS, data, load_scenes
from .unet import make_text_encoders, make_tokenizer, make_unet, train_unet
from .vae import check_vae, load_vae, train_decoder, train_vae

MODEL_CARD = """# tiny-sdxl

A real `StableDiffusionXLPipeline` of {parameters:.1f} M parameters ({megabytes:.1f} MB, float32) that draws the
coloured shapes of `diffpo.shapes` at 32 px. Trained from scratch by `scripts/build_tiny_models.py` (seed {seed}, one
CPU core; `training-log.jsonl` holds the settings, losses and CPU seconds). Latents: {channels} x 8 x 8, unit
variance, scaling factor 1.

Autoencoder: reconstructions of 1,000 scenes that it was not trained on, recognised by the oracle:

{vae}

Base model: {n} held-out prompts (object and pair combinations never seen in training), {steps} calls of
DPM-Solver++(2M), guidance {guidance}, one image each. Intervals are 95 % Wilson intervals. *Chance* compares the same
pictures with another held-out prompt:

{base}

![samples](grid.png)
"""


def assemble(work: Path, assets: Path) -> None:
    """Write assets/tiny-sdxl, check it on held-out prompts, and leave the figures in its card."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizer = make_tokenizer(work / "tokenizer")
    unet, encoders, vae = make_unet(), make_text_encoders(tokenizer), load_vae(work, "vae-final.safetensors")
    state = load_file(work / "unet.safetensors")
    for prefix, module in {"unet": unet, "text_encoder": encoders[0], "text_encoder_2": encoders[1]}.items():
        own = {k.removeprefix(prefix + "."): v for k, v in state.items() if k.startswith(prefix + ".")}
        missing = module.load_state_dict(own, strict=False)
        if missing.unexpected_keys or any("position_ids" not in k for k in missing.missing_keys):
            raise RuntimeError(f"{prefix}: {missing}")
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    pipe = StableDiffusionXLPipeline(
        vae, encoders[0], encoders[1], tokenizer, tokenizer, unet, scheduler, add_watermarker=False
    )
    folder = assets / "tiny-sdxl"
    pipe.save_pretrained(folder)
    card(work, folder)


def card(work: Path, folder: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    base = base_table(pipe, folder)
    arrays, captions = load_scenes(work)
    vae = check_vae(pipe.vae, arrays[-1000:], captions[-1000:])
    rows = [("PSNR", f"{vae.pop('psnr'):.1f} dB")]
    rows += [(k.removeprefix("right_"), f"{v:.1%}") for k, v in vae.items()]
    write_log(work, folder, {"data": data, "vae": train_vae, "decoder": train_decoder, "unet": train_unet})
    write_card(
        folder,
        MODEL_CARD,
        **parameters_and_megabytes(folder, pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2),
        channels=LATENT_CHANNELS,
        vae=Table(["", ""], rows).markdown(),
        base=base,
    )
