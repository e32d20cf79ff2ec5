"""The kinds of VAE: how many pixels a latent has, and what the network's latents are of what the VAE gives.

AutoencoderKL (Stable Diffusion, FLUX.1, Z-Image, Lumina, Chroma, HiDream) scales all channels alike. Qwen-Image's has a
mean and a standard deviation for each, and takes pictures as videos of one frame; that of 2.1 with opacity. FLUX.2's
makes one position of 2 x 2 latents and normalises them as its batch norm says. AutoencoderDC (Sana) has no noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NO_NOISE = -1e4  # a log-variance: exp(NO_NOISE / 2) is 0 in float32


def vae_class(config: dict[str, Any]) -> Any:
    """The class of the VAE with this config."""
    import diffusers

    return getattr(diffusers, config.get("_class_name", "AutoencoderKL"))


def factor(config: Any) -> int:
    """Pixels per latent of the network, each way."""
    if "temperal_downsample" in config:
        return 2 ** len(config["temperal_downsample"])
    blocks = config.get("encoder_block_out_channels") or config["block_out_channels"]
    return 2 ** (len(blocks) - 1) * _patch(config)


def _patch(config: Any) -> int:
    """Latents of the VAE in one of the network's, each way."""
    return config["patch_size"][0] if "batch_norm_eps" in config else 1


def about(vae: Any) -> dict[str, Any]:
    """The VAE's config, with the normalisation that is among its weights: enough for `scaled` and `unscaled`."""
    found = dict(vae.config)
    if "batch_norm_eps" in found:
        found["latents_mean"] = vae.bn.running_mean.tolist()
        found["latents_std"] = (vae.bn.running_var + found["batch_norm_eps"]).sqrt().tolist()
    return found


def encode(vae: Any, pixels: Tensor) -> dict[str, Tensor]:
    """(n, 3, H, W) in [-1, 1] -> ``mean`` and ``logvar`` of the posterior, (n, C, h, w), not `scaled`."""
    video = "temperal_downsample" in vae.config
    if vae.config.get("in_channels") == 4:  # the last one is opacity
        pixels = torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1)
    found = vae.encode(pixels[:, :, None] if video else pixels)
    if not hasattr(found, "latent_dist"):
        return {"mean": found.latent, "logvar": torch.full_like(found.latent, NO_NOISE)}
    moments = {"mean": found.latent_dist.mean, "logvar": found.latent_dist.logvar}
    if video:
        return {name: value[:, :, 0] for name, value in moments.items()}
    return {name: _folded(value, _patch(vae.config)) for name, value in moments.items()}


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Latents (n, C, h, w), `unscaled` -> pixels (n, 3, H, W), about [-1, 1]."""
    latents = _unfolded(latents.to(vae.device), _patch(vae.config))
    if "temperal_downsample" in vae.config:
        return _opaque(vae.decode(latents[:, :, None]).sample[:, :, 0])
    return vae.decode(latents).sample


def _opaque(pixels: Tensor) -> Tensor:
    """Pixels with opacity, (n, 4, H, W), on white, as files of them are read; others as they are."""
    if pixels.shape[1] != 4:
        return pixels
    opacity = (pixels[:, 3:] / 2 + 0.5).clamp(0, 1)
    return pixels[:, :3].clamp(-1, 1) * opacity + (1 - opacity)


def scaled(latents: Tensor, config: dict[str, Any]) -> Tensor:
    """What `encode` gives -> x_0, the variance that the network was trained on. ``config`` as of `about`."""
    if "scaling_factor" in config:
        return (latents - (config.get("shift_factor") or 0.0)) * config["scaling_factor"]
    mean, std = _moments(latents, config)
    return (latents - mean) / std


def unscaled(x_0: Tensor, config: dict[str, Any]) -> Tensor:
    """The inverse of `scaled`, float32."""
    x_0 = x_0.float()
    if "scaling_factor" in config:
        return x_0 / config["scaling_factor"] + (config.get("shift_factor") or 0.0)
    mean, std = _moments(x_0, config)
    return x_0 * std + mean


def _moments(latents: Tensor, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (1, C, 1, 1)."""
    mean, std = (latents.new_tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    return mean, std


def _folded(x: Tensor, patch: int) -> Tensor:
    """(n, C, p h, p w) -> (n, p p C, h, w)."""
    return x if patch == 1 else torch.nn.functional.pixel_unshuffle(x, patch)


def _unfolded(x: Tensor, patch: int) -> Tensor:
    return x if patch == 1 else torch.nn.functional.pixel_shuffle(x, patch)
