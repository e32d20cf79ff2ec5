"""Stable Diffusion 1.x and 2.x (UNet2DConditionModel, one CLIP text encoder, epsilon or v-prediction)."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from samplers import VPDiscrete

from ..config import Model
from ..data.cache import content_key
from ..errors import DiffpoError
from ..lora import weights_hash
from . import dtype_option, load_pipeline, local, readable

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class StableDiffusion:
    """Everything that training asks of a family. Other families offer the same methods and attributes.

    Attributes:
        prediction: what the network returns, ``epsilon`` or ``v_prediction``.
        train_timesteps: T; timesteps are integers in 0..T-1.
        lora_targets: the layers that a LoRA adapts unless the config names others.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)
    no_network: ClassVar[dict[str, Any]] = {"unet": None, "safety_checker": None, "requires_safety_checker": False}
    component = "unet"  # the trained part's name in the pipeline, and its prefix in a LoRA file

    def __init__(self, settings: Model, precision: str = "no") -> None:
        from diffusers import DDPMScheduler

        self.settings, self.dtype = settings, DTYPES[precision]
        self.source = {"revision": settings.revision, "variant": settings.variant}
        with readable(settings.path):
            # read as DDPM's: only the betas and the prediction type matter to the forward process
            self.scheduler = DDPMScheduler.from_pretrained(
                local(settings.path), subfolder="scheduler", revision=settings.revision
            )
        self.prediction = self.scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise DiffpoError(f"{settings.path}: prediction_type {self.prediction!r} is not epsilon or v_prediction")
        self.train_timesteps = self.scheduler.config.num_train_timesteps
        self._alphas_cumprod = self.scheduler.alphas_cumprod
        self.pipe: Any = None

    # ---- the network

    def load_network(self, device: Any = "cpu") -> torch.nn.Module:
        """The frozen network in the run's precision, in eval mode."""
        from diffusers import UNet2DConditionModel

        with readable(self.settings.path):
            network = UNet2DConditionModel.from_pretrained(
                local(self.settings.path), subfolder="unet", **self.source, **dtype_option(self.dtype)
            )
        return network.requires_grad_(False).eval().to(device)

    def meta_network(self) -> torch.nn.Module:
        """The network with shapes and no weights, on the meta device."""
        from diffusers import UNet2DConditionModel

        with readable(self.settings.path):
            config = UNet2DConditionModel.load_config(
                local(self.settings.path), subfolder="unet", revision=self.settings.revision
            )
        with torch.device("meta"):
            return torch.nn.Module.to(UNet2DConditionModel.from_config(config), self.dtype)

    def predict(self, network: torch.nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """(n, C, h, w), (n,) and conditions -> the network's output (n, C, h, w)."""
        prompt_embeds = cond["prompt_embeds"].to(self.dtype)
        return network(x_t.to(self.dtype), t, encoder_hidden_states=prompt_embeds, **self._user(cond)).sample

    @staticmethod
    def _user(cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whom the picture is for, where the network takes that (users.py)."""
        return {"user": cond["user"]} if "user" in cond else {}

    # ---- the forward process

    def schedule(self) -> VPDiscrete:
        """The same forward process for the solvers of `samplers`."""
        return VPDiscrete(self.scheduler.betas)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, float32 (n, 1, 1, 1)."""
        cumulative = self._alphas_cumprod.to(t.device)[t].view(-1, 1, 1, 1)
        return cumulative.sqrt(), (1 - cumulative).sqrt()

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x_0 + sigma * noise

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should return for `add_noise(x_0, noise, t)`."""
        if self.prediction == "epsilon":
            return noise
        alpha, sigma = self.alpha_sigma(t)
        return alpha * noise - sigma * x_0

    # ---- text and images; the encoders are loaded for the caches and freed before the network comes

    def load_encoders(self, device: Any = "cpu") -> None:
        """Text encoders in the run's precision; the VAE in float32, because SDXL's overflows in half precision."""
        from diffusers import AutoencoderKL

        path = self.settings.vae or self.settings.path
        where = {} if self.settings.vae else {"subfolder": "vae", **self.source}
        with readable(path):
            vae = AutoencoderKL.from_pretrained(local(path), **where, **dtype_option(torch.float32))
        self.pipe = load_pipeline(
            self.settings.path, str(self.dtype).split(".")[1], device, vae=vae, **self.no_network, **self.source
        )
        self.vae_config = dict(self.pipe.vae.config)  # outlives the VAE
        for name in (*self.encoders, "vae"):
            getattr(self.pipe, name).requires_grad_(False).eval()

    def free_encoders(self, keep_vae: bool = False) -> None:
        for name in (*self.encoders, *(() if keep_vae else ("vae",))):
            setattr(self.pipe, name, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def text_hash(self) -> str:
        """Of all that an embedding depends on but the caption."""
        vocabularies = [sorted(getattr(self.pipe, name).get_vocab().items()) for name in self.tokenizers]
        weights = [weights_hash(getattr(self.pipe, name)) for name in self.encoders]
        return content_key(vocabularies, weights, str(self.dtype))

    def vae_hash(self) -> str:
        return content_key(weights_hash(self.pipe.vae))

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        """One row per caption; None is the unconditional embedding that sampling uses with guidance."""
        embeds, unconditional = self._encode([caption or "" for caption in captions])
        rows = [u if caption is None else e for caption, e, u in zip(captions, embeds, unconditional, strict=True)]
        return {"prompt_embeds": torch.stack(rows)}

    def _encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        return self.pipe.encode_prompt(captions, self.pipe.vae.device, 1, do_classifier_free_guidance=True)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> dict[str, Tensor]:
        """(n, 3, H, W) in [-1, 1] -> ``mean`` and ``logvar`` of the posterior, (n, C, h, w) float32, unscaled."""
        with torch.autocast(self.pipe.vae.device.type, enabled=False):
            posterior = self.pipe.vae.encode(pixels.to(self.pipe.vae.device, torch.float32)).latent_dist
        return {"mean": posterior.mean, "logvar": posterior.logvar}

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Posterior samples -> x_0, the variance that the network was trained on."""
        config = self.vae_config
        return (latents - (config.get("shift_factor") or 0.0)) * config["scaling_factor"]

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> Tensor:
        """(n, C, h, w) scaled latents -> pixels (n, 3, H, W) float32, about [-1, 1]; the VAE must still be there."""
        config = self.vae_config
        latents = x_0.float() / config["scaling_factor"] + (config.get("shift_factor") or 0.0)
        with torch.autocast(self.pipe.vae.device.type, enabled=False):
            return self.pipe.vae.decode(latents.to(self.pipe.vae.device)).sample

    def condition(self, text: dict[str, Tensor], micro_conditioning: Tensor) -> dict[str, Tensor]:
        """Text rows and (n, 6) sizes and crops -> what `predict` takes; this family ignores the sizes."""
        return text

    # ---- for `diffpo check`

    def meta_inputs(
        self, network: torch.nn.Module, n: int, resolution: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """x_t, t and cond of the right shapes on the meta device."""
        side = resolution // self.vae_factor()
        x_t = torch.empty(n, network.config.in_channels, side, side, device="meta")
        return x_t, torch.zeros(n, dtype=torch.long, device="meta"), self._meta_cond(network, n)

    def _meta_cond(self, network: torch.nn.Module, n: int) -> dict[str, Tensor]:
        return {"prompt_embeds": torch.empty(n, 77, network.config.cross_attention_dim, device="meta")}

    def vae_factor(self) -> int:
        """Pixels per latent, each way."""
        return 2 ** (len(self.vae_settings()["block_out_channels"]) - 1)

    def vae_settings(self) -> dict[str, Any]:
        from diffusers import AutoencoderKL

        path = self.settings.vae or self.settings.path
        where = {} if self.settings.vae else {"subfolder": "vae", "revision": self.settings.revision}
        with readable(path):
            return dict(AutoencoderKL.load_config(local(path), **where))
