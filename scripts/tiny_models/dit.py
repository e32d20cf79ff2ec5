"""Tokenizer, T5 encoder and DiT with flow matching on the autoencoder of tiny-sdxl (stages dit, assemble-dit)."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from diffpo.shapes import SIZE, train_captions

from .card import base_table, parameters_and_megabytes, write_card, write_log
from .common import LATENT_CHANNELS, LATENT_NOISE, SEED, average, data, load_scenes, log, to_tensor

TEXT_LENGTH = 24  # tokens in training; the pipeline pads to 300 and masks what it pads
TEXT_WIDTH = 96
MODEL_CARD = """# tiny-dit

A real `PixArtSigmaPipeline` of {parameters:.1f} M parameters ({megabytes:.1f} MB, float32): a diffusion transformer
({layers} layers, width {width}, a token for each latent), a T5 encoder, and flow matching (x_t = (1 - t) x_0 + t eps,
the network predicts eps - x_0). It draws the coloured shapes of `diffpo.shapes` at 32 px. Transformer and T5 were
trained from scratch by `scripts/build_tiny_models.py` (seed {seed}, one CPU core; `training-log.jsonl` holds the
settings, losses and CPU seconds) on the frozen autoencoder of `assets/tiny-sdxl`.

{n} held-out prompts (object and pair combinations never seen in training), {steps} calls of DPM-Solver++(2M), guidance
{guidance}, one image each. Intervals are 95 % Wilson intervals. *Chance* compares the same pictures with another
held-out prompt:

{base}

![samples](grid.png)
"""


def make_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer: every word of this world's captions is one token, other words are spelt out in letters."""
    words = sorted({word for caption in train_captions() for word in caption.split()})
    letters = "▁abcdefghijklmnopqrstuvwxyz0123456789.,-"
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    vocabulary += [(f"▁{word}", -2.0) for word in words] + [(letter, -8.0) for letter in letters]
    tokenizer = T5TokenizerFast(vocab=vocabulary, extra_ids=0)
    for word in words:
        if len(tokenizer(word).input_ids) != 2:
            raise RuntimeError(f"{word!r} is not one token: {tokenizer.tokenize(word)}")
    return tokenizer


def make_text_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=24,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def make_dit() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        sample_size=SIZE // 4,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=8,
        num_attention_heads=4,
        attention_head_dim=40,
        cross_attention_dim=160,
        caption_channels=TEXT_WIDTH,
        interpolation_scale=1,
    )


def train_dit(work: Path, assets: Path, steps: int = 6000, decay_steps: int = 1500, batch: int = 32, lr: float = 1e-3):
    """Velocity prediction at times uniform in 0..1, 10 % empty captions; text encoder and transformer together."""
    torch.manual_seed(SEED + 5)
    images, captions = load_scenes(work)
    vae = AutoencoderKL.from_pretrained(assets / "tiny-sdxl" / "vae").eval().requires_grad_(False)
    with torch.no_grad():
        latents = torch.cat([vae.encode(to_tensor(x)).latent_dist.mode() for x in np.array_split(images, 200)])
    tokenizer = make_tokenizer()
    distinct = sorted(set(captions))
    text = tokenizer(["", *distinct], padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
    position = {caption: i + 1 for i, caption in enumerate(distinct)}
    index = torch.tensor([position[caption] for caption in captions])
    dit, encoder = make_dit(), make_text_encoder(tokenizer)
    torch.nn.init.zeros_(dit.proj_out.weight)  # starts from no velocity, as DiT does
    torch.nn.init.zeros_(dit.proj_out.bias)
    modules = {"transformer": dit, "text_encoder": encoder}
    parameters = [p for module in modules.values() for p in module.parameters()]
    log(work, "dit", latents=len(latents), captions=len(distinct), parameters=sum(p.numel() for p in parameters))
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    ema = [p.detach().clone() for p in parameters]

    def save(name: str) -> None:
        it = iter(ema)
        state = {
            f"{prefix}.{key}": next(it).clone() for prefix, m in modules.items() for key, _ in m.named_parameters()
        }
        save_file(state, work / name)
        log(work, "dit", step=step, saved=name)

    started, step, running = time.time(), 0, None
    sizes = {"resolution": None, "aspect_ratio": None}
    while step < steps:
        rate = lr * min(1.0, (step + 1) / 400, (steps - step) / decay_steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        pick = torch.randint(0, len(latents), (batch,))
        x_0 = latents[pick] + LATENT_NOISE * torch.randn(batch, LATENT_CHANNELS, SIZE // 4, SIZE // 4)
        rows = torch.where(torch.rand(batch) < 0.1, 0, index[pick])
        mask = text.attention_mask[rows]
        embeds = encoder(text.input_ids[rows], attention_mask=mask)[0]
        # stratified times: less variance per batch than independent ones
        t = (torch.rand(batch) + torch.arange(batch)) / batch
        noise, sigma = torch.randn_like(x_0), t[:, None, None, None]
        x_t = (1 - sigma) * x_0 + sigma * noise
        predicted = dit(x_t, embeds, timestep=1000 * t, encoder_attention_mask=mask, added_cond_kwargs=sizes).sample
        loss = (predicted - (noise - x_0)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        average(ema, parameters, step)
        step += 1
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 200 == 0:
            seconds = time.time() - started
            log(work, "dit", step=step, of=steps, mse=running, grad_norm=norm.item(), lr=rate, seconds=seconds)
        if step % 1000 == 0:
            save(f"dit-{step}.safetensors")
    save("dit.safetensors")


def assemble_dit(work: Path, assets: Path, name: str = "dit.safetensors") -> None:
    """Write assets/tiny-dit, check it on held-out prompts, and leave the figures in its card."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline

    tokenizer = make_tokenizer()
    dit, encoder = make_dit(), make_text_encoder(tokenizer)
    state = load_file(work / name)
    for prefix, module in {"transformer": dit, "text_encoder": encoder}.items():
        own = {k.removeprefix(prefix + "."): v for k, v in state.items() if k.startswith(prefix + ".")}
        found = module.load_state_dict(own, strict=False)
        if found.unexpected_keys or any("embed_tokens" not in k and "pos_embed" not in k for k in found.missing_keys):
            raise RuntimeError(f"{prefix}: {found}")
    vae = AutoencoderKL.from_pretrained(assets / "tiny-sdxl" / "vae")
    vae.register_to_config(_name_or_path="assets/tiny-sdxl/vae")  # not where that lies on this machine
    pipe = PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae,
        transformer=dit,
        scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0),
    )
    folder = assets / "tiny-dit"
    pipe.save_pretrained(folder)
    # binning would make 1024 px of 32
    base = base_table(pipe, folder, use_resolution_binning=False, clean_caption=False)
    write_log(work, folder, {"data": data, "dit": train_dit})
    write_card(
        folder,
        MODEL_CARD,
        **parameters_and_megabytes(folder, dit, encoder, pipe.vae),
        layers=dit.config.num_layers,
        width=dit.inner_dim,
        base=base,
    )
