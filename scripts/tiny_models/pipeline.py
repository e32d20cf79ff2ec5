"""The pipeline from its trained parts, and its card with what it can do (stage assemble)."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from diffpo.shapes import ATTRIBUTES, heldout_captions, parse, score

from .common import LATENT_CHANNELS, LATENT_NOISE, SEED, data, load_scenes
from .unet import make_text_encoders, make_tokenizer, make_unet, train_unet
from .vae import check_vae, load_vae, train_decoder, train_vae

GUIDANCE = 3.0
MODEL_CARD = """# tiny-sdxl

A real `StableDiffusionXLPipeline` of {parameters:.1f} M parameters ({megabytes:.1f} MB, float32) that draws the
coloured shapes of `diffpo.shapes` at 32 px. Trained from scratch by `scripts/build_tiny_models.py` (seed {seed}, one
CPU core; `training-log.jsonl` holds the settings, losses and CPU seconds). Latents: {channels} x 8 x 8, unit
variance, scaling factor 1.

Autoencoder, 1,000 scenes it was not trained on, reconstructions read back by the oracle:

{vae}

Base model, {n} held-out prompts (object and pair combinations never seen in training), {steps} calls of
DPM-Solver++(2M), guidance {guidance}, one image each; 95 % Wilson intervals; chance = the same pictures against another
held-out prompt:

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


def generate(pipe, prompts: list[str], seeds: list[int], steps: int, batch: int = 64) -> list:
    """PIL pictures, one per prompt, each from its own seed."""
    import samplers

    pipe.scheduler = samplers.SolverScheduler.from_config(pipe.scheduler.config, solver="dpmpp")
    pipe.set_progress_bar_config(disable=True)
    images = []
    for i in range(0, len(prompts), batch):
        generators = [torch.Generator().manual_seed(s) for s in seeds[i : i + batch]]
        images += pipe(
            prompts[i : i + batch], num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generators
        ).images
    return images


def card(work: Path, folder: Path, n: int = 1024, steps: int = 20) -> None:
    from diffusers import StableDiffusionXLPipeline

    from diffpo.statistics import wilson

    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    prompts = heldout_captions(n)
    images = generate(pipe, prompts, [SEED * 10_000 + i for i in range(n)], steps)
    scores = [score(im, p) for im, p in zip(images, prompts, strict=True)]
    chance = [score(im, p) for im, p in zip(images, prompts[1:] + prompts[:1], strict=True)]
    rows = ["| attribute right | share | 95 % interval | chance |", "| --- | --- | --- | --- |"]
    for key in [f"right_{a}" for a in ATTRIBUTES] + ["all_right"]:
        values = np.array([s[key] for s in scores])
        values = values[~np.isnan(values)]
        low, high = wilson(values.sum(), len(values))
        by_chance = np.nanmean([s[key] for s in chance])
        rows.append(
            f"| {key.removeprefix('right_')} | {values.mean():.1%} | {low:.1%} to {high:.1%} | {by_chance:.1%} |"
        )
    # nearly all held-out prompts ask for two objects, so counting is told from chance on the others alone
    counted = [c for c in heldout_captions() if parse(c).relation is None] * 8
    seen = generate(pipe, counted, [SEED * 30_000 + i for i in range(len(counted))], steps)
    values = [score(im, c)["right_count"] for im, c in zip(seen, counted, strict=True)]
    low, high = wilson(sum(values), len(values))
    by_chance = np.mean([score(im, c)["right_count"] for im, c in zip(seen, counted[1:] + counted[:1], strict=True)])
    rows.append(
        f"| count, one to three equal objects (n {len(values)}) | {np.mean(values):.1%} | {low:.1%} to {high:.1%} "
        f"| {by_chance:.1%} |"
    )
    for key in ("following", "appearance", "total"):
        values = [s[key] for s in scores]
        half = 1.96 * np.std(values) / math.sqrt(n)
        rows.append(
            f"| {key} (mean score) | {np.mean(values):.3f} | ± {half:.3f} | {np.mean([s[key] for s in chance]):.3f} |"
        )
    arrays, captions = load_scenes(work)
    vae = check_vae(pipe.vae, arrays[-1000:], captions[-1000:])
    vae_rows = ["| | |", "| --- | --- |", f"| PSNR | {vae.pop('psnr'):.1f} dB |"]
    vae_rows += [f"| {k.removeprefix('right_')} | {v:.1%} |" for k, v in vae.items()]
    contact_sheet(images[:96], 16).save(folder / "grid.png")
    logs = [p for stage in ("data", "vae", "decoder", "unet") for p in [work / f"log-{stage}.jsonl"] if p.exists()]
    (folder / "training-log.jsonl").write_text(settings() + "".join(p.read_text() for p in logs))
    modules = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    text = MODEL_CARD.format(
        parameters=sum(p.numel() for m in modules for p in m.parameters()) / 1e6,
        megabytes=sum(f.stat().st_size for f in folder.rglob("*.safetensors")) / 1e6,
        seed=SEED,
        channels=LATENT_CHANNELS,
        vae="\n".join(vae_rows),
        n=n,
        steps=steps,
        guidance=GUIDANCE,
        base="\n".join(rows),
    )
    (folder / "README.md").write_text(text)
    print(text)


def settings() -> str:
    """The first line of the log: what every stage was run with."""
    stages = {"data": data, "vae": train_vae, "decoder": train_decoder, "unet": train_unet}
    values = {
        stage: {k: p.default for k, p in inspect.signature(f).parameters.items() if p.default is not p.empty}
        for stage, f in stages.items()
    }
    return json.dumps({"stage": "settings", "seed": SEED, "latent_noise": LATENT_NOISE, **values}) + "\n"


def contact_sheet(images: list, columns: int):
    from PIL import Image

    sheet = Image.new("RGB", (columns * 68, math.ceil(len(images) / columns) * 68), "white")
    for i, image in enumerate(images):
        sheet.paste(image.resize((64, 64), Image.Resampling.NEAREST), (i % columns * 68 + 2, i // columns * 68 + 2))
    return sheet
