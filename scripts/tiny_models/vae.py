"""The autoencoder (stage vae) and the finish of its decoder (stage decoder)."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from diffpo.shapes import SIZE, score

from .common import LATENT_CHANNELS, LATENT_NOISE, SEED, load_scenes, log, to_tensor, to_uint8


def cosine(step: int, steps: int, warmup: int = 100) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE,
        scaling_factor=1.0,
        force_upcast=False,
    )


def reconstruction_loss(decoded: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.l1_loss(decoded, x) + 2 * F.mse_loss(decoded, x)


@torch.no_grad()
def check_vae(vae: AutoencoderKL, images: np.ndarray, captions: list[str]) -> dict:
    decoded = vae.decode(vae.encode(to_tensor(images)).latent_dist.mode()).sample
    mse = F.mse_loss(decoded, to_tensor(images)).item()
    scores = [score(im, c) for im, c in zip(to_uint8(decoded), captions, strict=True)]
    keys = (
        "all_right",
        "right_background",
        "right_count",
        "right_colour",
        "right_shape",
        "right_relation",
        "appearance",
    )
    return {"psnr": 10 * math.log10(4 / mse), **{k: float(np.nanmean([s[k] for s in scores])) for k in keys}}


def train_vae(work: Path, steps: int = 2600, batch: int = 32, lr: float = 2e-3) -> None:
    """Autoencoder with unit-variance latents and a posterior of fixed width.

    The latents are normalised per channel while training (so the noise that the decoder must bear has a fixed meaning)
    and the normalisation is folded into quant_conv afterwards: encode() itself then gives unit-variance latents.
    """
    torch.manual_seed(SEED)
    images, captions = load_scenes(work)
    vae = make_vae()
    whiten = torch.nn.BatchNorm2d(LATENT_CHANNELS, affine=False, momentum=0.02)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
    rng, started = np.random.default_rng(SEED), time.time()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * cosine(step, steps)
        x = to_tensor(images[rng.integers(0, len(images) - 1000, batch)])
        z = whiten(vae.quant_conv(vae.encoder(x))[:, :LATENT_CHANNELS])
        decoded = vae.decode(z + LATENT_NOISE * torch.randn_like(z)).sample
        loss = reconstruction_loss(decoded, x)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 99:
            psnr = 10 * math.log10(4 / F.mse_loss(decoded, x).item())
            log(work, "vae", step=step + 1, loss=loss.item(), psnr=psnr, seconds=time.time() - started)
    with torch.no_grad():
        std = (whiten.running_var + whiten.eps).sqrt()
        conv, c = vae.quant_conv, LATENT_CHANNELS
        conv.weight[:c] /= std[:, None, None, None]
        conv.bias[:c] = (conv.bias[:c] - whiten.running_mean) / std
        conv.weight[c:] = 0  # a posterior of fixed width
        conv.bias[c:] = 2 * math.log(LATENT_NOISE)
    log(work, "vae", **check_vae(vae, images[-1000:], captions[-1000:]))
    save_file(vae.state_dict(), work / "vae.safetensors")


def load_vae(work: Path, name: str = "vae.safetensors") -> AutoencoderKL:
    vae = make_vae()
    vae.load_state_dict(load_file(work / name))
    return vae.eval()


def train_decoder(work: Path, steps: int = 1933, batch: int = 32, lr: float = 1e-3) -> None:
    """Finish the decoder on the frozen latents."""
    torch.manual_seed(SEED + 1)
    images, captions = load_scenes(work)
    vae = load_vae(work)
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
    rng, started = np.random.default_rng(SEED + 1), time.time()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * cosine(step, steps)
        x = to_tensor(images[rng.integers(0, len(images) - 1000, batch)])
        with torch.no_grad():
            z = vae.encode(x).latent_dist.mode()
        loss = reconstruction_loss(vae.decode(z + 0.5 * LATENT_NOISE * torch.randn_like(z)).sample, x)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if step % 200 == 199:
            log(work, "decoder", step=step + 1, loss=loss.item(), seconds=time.time() - started)
    log(work, "decoder", step=steps, **check_vae(vae, images[-1000:], captions[-1000:]))
    save_file(vae.state_dict(), work / "vae-final.safetensors")
