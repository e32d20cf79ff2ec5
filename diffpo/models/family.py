"""What all model families share: the forward process, the VAE, the encoders, where the network's features are."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from samplers import RectifiedFlow, VPDiscrete

from ..config import Model
from ..data.cache import content_key
from ..errors import DiffpoError
from ..lora import weights_hash
from . import dtype_option, load_pipeline, local, readable, vae_factor

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PREDICTIONS = ("epsilon", "v_prediction")  # of networks that were trained on betas; the others are flows
UNSUPPORTED = ("shift_terminal", "invert_sigmas")  # options of flow schedulers that would need another forward process


class Family:
    """Everything that training asks of a model. A subclass says how text becomes conditions and how the network is
    called; this one holds a transformer unless the subclass says otherwise.

    Attributes:
        prediction: what the network returns, ``epsilon``, ``v_prediction`` or ``flow``.
        train_timesteps: T; timesteps are integers in 0..T-1, from clean to noise, for flows too.
        lora_targets: the layers that a LoRA adapts unless the config names others.
        component: the trained part's name in the pipeline, and its prefix in a LoRA file.
        without: what else the pipeline is loaded without.
    """

    network_class: str  # in diffusers
    component = "transformer"
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    encoders: tuple[str, ...] = ()
    tokenizers: tuple[str, ...] = ()
    without: ClassVar[dict[str, Any]] = {}

    def __init__(self, settings: Model, precision: str = "no", resolution: int = 1024) -> None:
        """``resolution`` of the images, in pixels: some flows shift their timesteps by it."""
        self.settings, self.dtype = settings, DTYPES[precision]
        self.source = {"revision": settings.revision, "variant": settings.variant}
        self._configs: dict[str, dict[str, Any]] = {}
        config = self._config("scheduler")
        if "FlowMatch" in config.get("_class_name", "") or config.get("use_flow_sigmas"):
            self._flow(config, resolution)
        else:
            self._diffusion()
        grain = self.patch() and self.patch() * self.vae_factor()
        if grain and resolution % grain:
            raise DiffpoError(f"data.resolution={resolution}: {settings.path} takes multiples of {grain} px")
        self.pipe: Any = None

    # ---- the forward process: x_t = alpha_t x_0 + sigma_t eps

    def _diffusion(self) -> None:
        from diffusers import DDPMScheduler

        with readable(self.settings.path):
            # read as DDPM's: only the betas and the prediction type matter to the forward process
            scheduler = DDPMScheduler.from_pretrained(
                local(self.settings.path), subfolder="scheduler", revision=self.settings.revision
            )
        self.prediction = scheduler.config.prediction_type
        if self.prediction not in PREDICTIONS:
            raise DiffpoError(
                f"{self.settings.path}: prediction_type {self.prediction!r} is not epsilon or v_prediction"
            )
        self.train_timesteps = scheduler.config.num_train_timesteps
        self._betas = scheduler.betas
        self._alpha, self._sigma = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
        self._told = torch.arange(self.train_timesteps)

    def _flow(self, config: dict[str, Any], resolution: int) -> None:
        """sigma = s t / (1 + (s - 1) t) at t = 1/T, ..., 1, with the scheduler's shift s: uniform timesteps are then
        the pipeline's own time (SD3, arXiv 2403.03206, eq. 23)."""
        for name in UNSUPPORTED:
            if config.get(name):
                raise DiffpoError(f"{self.settings.path}: a scheduler with {name} is not supported")
        self.prediction, self.train_timesteps = "flow", config.get("num_train_timesteps", 1000)
        shift = config.get("flow_shift" if config.get("use_flow_sigmas") else "shift", 1.0)
        if config.get("use_dynamic_shifting"):
            shift = self._dynamic_shift(config, resolution)
        self._shift = shift
        sigma = torch.from_numpy(self.schedule().sigma((torch.arange(self.train_timesteps) + 1) / self.train_timesteps))
        self._alpha, self._sigma = (1 - sigma).float(), sigma.float()
        self._told = (self.train_timesteps * sigma).float()

    def _dynamic_shift(self, config: dict[str, Any], resolution: int) -> float:
        """The pipelines' rule: mu is linear in the number of image tokens."""
        tokens = (resolution // self.vae_factor() // 2) ** 2
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        mu = low + (high - low) * (tokens - few) / (many - few)
        return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu

    def schedule(self) -> VPDiscrete | RectifiedFlow:
        """The same forward process for the solvers of `samplers`: timestep n is its time (n + 1) / T."""
        if self.prediction == "flow":
            return RectifiedFlow(self._shift, self.train_timesteps)
        betas = self._betas.double()
        if betas[-1] >= 1:  # zero terminal SNR: no noise level is infinite for a solver; diffusers stops there too
            betas[-1] = 1 - 2**-24 / (1 - betas[:-1]).prod()
        return VPDiscrete(betas)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, float32 (n, 1, 1, 1)."""
        alpha, sigma = (level.to(t.device)[t].view(-1, 1, 1, 1) for level in (self._alpha, self._sigma))
        return alpha, sigma

    def told(self, t: Tensor) -> Tensor:
        """What the network is told of the timesteps t: themselves, or 1000 sigma of a flow."""
        return self._told.to(t.device)[t]

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x_0 + sigma * noise

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should return for `add_noise(x_0, noise, t)`."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "flow":
            return noise - x_0
        alpha, sigma = self.alpha_sigma(t)
        return alpha * noise - sigma * x_0

    def to_x_0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's output (n, C, h, w) at (x_t, t) as x_0, float32."""
        alpha, sigma = self.alpha_sigma(t)
        output = output.float()
        if self.prediction == "epsilon":
            return (x_t - sigma * output) / alpha
        if self.prediction == "flow":
            return x_t - sigma * output
        return alpha * x_t - sigma * output

    # ---- the network

    def load_network(self, device: Any = "cpu") -> torch.nn.Module:
        """The frozen network in the run's precision, in eval mode."""
        with readable(self.settings.path):
            network = self._class().from_pretrained(
                local(self.settings.path), subfolder=self.component, **self.source, **dtype_option(self.dtype)
            )
        return network.requires_grad_(False).eval().to(device)

    def meta_network(self) -> torch.nn.Module:
        """The network with shapes and no weights, on the meta device."""
        config = self._config(self.component)
        with torch.device("meta"):
            return torch.nn.Module.to(self._class().from_config(config), self.dtype)

    def _class(self) -> Any:
        import diffusers

        return getattr(diffusers, self.network_class)

    def _config(self, part: str) -> dict[str, Any]:
        """The config.json of a part of the pipeline."""
        if part not in self._configs:
            from diffusers import ConfigMixin

            class Reader(ConfigMixin):
                config_name = "scheduler_config.json" if part == "scheduler" else "config.json"

            with readable(self.settings.path):
                self._configs[part] = dict(
                    Reader.load_config(local(self.settings.path), subfolder=part, revision=self.settings.revision)
                )
        return self._configs[part]

    def predict(self, network: torch.nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """(n, C, h, w), (n,) and conditions -> the network's output (n, C, h, w)."""
        raise NotImplementedError

    @staticmethod
    def _user(cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whom the picture is for, where the network takes that (users.py)."""
        return {"user": cond["user"]} if "user" in cond else {}

    def latent_shape(self, network: torch.nn.Module, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of a square image's latents."""
        side = resolution // self.vae_factor()
        return self.latent_channels(network.config), side, side

    def patch(self) -> int | None:
        """Latents per token, each way; None where any number of latents will do."""
        return self._config(self.component).get("patch_size", 2)

    @staticmethod
    def latent_channels(config: Any) -> int:
        return config.in_channels

    # ---- features of the network: NCP-DPO's error and the latent scorer

    @staticmethod
    def stages(network: torch.nn.Module) -> list[torch.nn.Module]:
        """The blocks after which the latent scorer looks, in their order; nothing after the last one need run."""
        blocks = network.transformer_blocks
        return [blocks[max(0, len(blocks) // 4 - 1)], blocks[max(0, len(blocks) // 2 - 1)]]

    @staticmethod
    def hidden(output: Any) -> Tensor:
        """What a stage returns, as (n, channels, positions)."""
        tokens = output[-1] if isinstance(output, tuple) else output  # text first, where it has its own stream
        return tokens.transpose(1, 2)

    def cut(self, network: torch.nn.Module) -> None:
        """Take away what follows the network's first half."""
        blocks = network.transformer_blocks
        network.transformer_blocks = blocks[: max(1, len(blocks) // 2)]

    def features(self, network: torch.nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Of a network that was `cut`: its features (n, ...), with gradients by x_t."""
        seen: list[Tensor] = []
        hook = network.transformer_blocks[-1].register_forward_hook(lambda _m, _i, out: seen.append(self.hidden(out)))
        try:
            self.predict(network, x_t, t, cond)
        finally:
            hook.remove()
        return seen[0]

    def text_features(self, cond: dict[str, Tensor]) -> list[Tensor]:
        """Every condition as (n, d) float32 in the order of their names: sequences are averaged over their tokens."""
        values = [cond[name].float() for name in sorted(cond)]
        return [value.mean(1) if value.ndim == 3 else value for value in values]

    # ---- text and images; the encoders are loaded for the caches and freed before the network comes

    def load_encoders(self, device: Any = "cpu") -> None:
        """Text encoders in the run's precision; the VAE in float32, because SDXL's overflows in half precision."""
        from diffusers import AutoencoderKL

        path = self.settings.vae or self.settings.path
        where = {} if self.settings.vae else {"subfolder": "vae", **self.source}
        with readable(path):
            vae = AutoencoderKL.from_pretrained(local(path), **where, **dtype_option(torch.float32))
        without = {self.component: None, **self.without}
        self.pipe = load_pipeline(
            self.settings.path, str(self.dtype).split(".")[1], device, vae=vae, **without, **self.source
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

    def encode_text(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        """One row per caption; None is the unconditional embedding that sampling uses with guidance."""
        raise NotImplementedError

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
        """Text rows and (n, 6) sizes and crops -> what `predict` takes; most families ignore the sizes."""
        return text

    # ---- for `diffpo check`

    def meta_inputs(
        self, network: torch.nn.Module, n: int, resolution: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """x_t, t and cond of the right shapes on the meta device."""
        x_t = torch.empty(n, *self.latent_shape(network, resolution), device="meta")
        return x_t, torch.zeros(n, dtype=torch.long, device="meta"), self._meta_cond(network, n)

    def _meta_cond(self, network: torch.nn.Module, n: int) -> dict[str, Tensor]:
        raise NotImplementedError

    def vae_factor(self) -> int:
        """Pixels per latent, each way."""
        return 2 ** (len(self.vae_settings()["block_out_channels"]) - 1)

    def vae_settings(self) -> dict[str, Any]:
        from diffusers import AutoencoderKL

        if not self.settings.vae:
            return self._config("vae")
        with readable(self.settings.vae):
            return dict(AutoencoderKL.load_config(local(self.settings.vae)))

    # ---- a whole pipeline, for generation

    @classmethod
    def sample_size(cls, pipe: Any) -> int:
        """The latents' usual height and width."""
        return getattr(pipe, cls.component).config.sample_size

    @classmethod
    def painting(
        cls, pipe: Any, prompts: list[str], negative: str | None, noise: Tensor, guidance: float
    ) -> dict[str, Any]:
        """What the pipeline is called with, beside steps, generators and what it returns. ``noise``: (n, C, h, w)."""
        height, width = (side * vae_factor(pipe) for side in noise.shape[-2:])
        return {
            "prompt": prompts,
            "negative_prompt": negative and [negative] * len(prompts),  # None is not "": SDXL then uses zeros
            "latents": noise,
            "guidance_scale": guidance,
            "height": height,
            "width": width,
        }
