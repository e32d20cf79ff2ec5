"""The forward process of a model, x_t = alpha_t x_0 + sigma_t eps, read from its scheduler's config."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from samplers import RectifiedFlow, VPDiscrete
from samplers.foreign import REFUSED
from samplers.forward import add_noise, predicted_x_0, training_target

from ..common.errors import DiffpoError
from ..config import Model
from .pretrained import readable

PREDICTIONS = ("epsilon", "v_prediction")  # of networks that were trained on betas; the others are flows
# no solver here takes the place of these, and the model's betas or flow are read from their configs all the same
SAME_PROCESS = {"LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler", "UnCLIPScheduler", "RePaintScheduler"}
SAME_PROCESS |= {"DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"}


class ForwardProcess:
    """Noise levels of the integer timesteps 0..T-1, and what the network predicts at them.

    Attributes:
        prediction: what the network returns, ``epsilon``, ``v_prediction`` or ``flow``.
        train_timesteps: T; timesteps are integers in 0..T-1, from clean to noise, for flows too.
    """

    settings: Model
    prediction: str
    train_timesteps: int

    def _read_schedule(self, config: dict[str, Any], resolution: int) -> None:
        """``config``: the scheduler's; some flows shift their timesteps by the ``resolution`` in pixels."""
        name = config.get("_class_name", "")
        if name in REFUSED and name not in SAME_PROCESS:
            raise DiffpoError(
                f"{self.settings.path}: its scheduler is a {name}, but diffpo trains on discrete betas or rectified "
                f"flow. Replace its scheduler_config.json by the base model's, e.g. that of a DDIMScheduler"
            )
        if "FlowMatch" in config.get("_class_name", "") or config.get("use_flow_sigmas"):
            self._flow(config, resolution)
        else:
            self._diffusion(config)

    def vae_factor(self) -> int:
        """Pixels per latent, each way."""
        raise NotImplementedError

    def patch(self) -> int | None:
        """Latents per token, each way; None where any number of latents will do."""
        raise NotImplementedError

    def _diffusion(self, config: dict[str, Any]) -> None:
        from diffusers import DDPMScheduler

        with readable(self.settings.path):
            # read as DDPM's: only the betas and the prediction type matter to the forward process
            scheduler = DDPMScheduler.from_config(config)
        self.prediction = scheduler.config.prediction_type
        if self.prediction not in PREDICTIONS:
            raise DiffpoError(
                f"{self.settings.path}: its scheduler has prediction_type {self.prediction!r}; diffpo trains epsilon "
                f"and v_prediction"
            )
        self.train_timesteps = scheduler.config.num_train_timesteps
        self._betas = scheduler.betas
        self._alpha, self._sigma = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
        self._network_time = torch.arange(self.train_timesteps)

    def _flow(self, config: dict[str, Any], resolution: int) -> None:
        """sigma = s t / (1 + (s - 1) t) at t = 1/T, ..., 1, with the scheduler's shift s: uniform timesteps are then
        the pipeline's own time (SD3, arXiv 2403.03206, eq. 23). shift_terminal (Qwen-Image) moves the sampler's last
        calls alone, so that it is left to the solvers."""
        if config.get("invert_sigmas"):
            raise DiffpoError(f"{self.settings.path}: a scheduler with invert_sigmas is not supported")
        self.prediction, self.train_timesteps = "flow", config.get("num_train_timesteps", 1000)
        shift = config.get("flow_shift" if config.get("use_flow_sigmas") else "shift", 1.0)
        if config.get("use_dynamic_shifting"):
            shift = self._dynamic_shift(config, resolution)
        self._shift = shift
        sigma = torch.from_numpy(self.schedule().sigma((torch.arange(self.train_timesteps) + 1) / self.train_timesteps))
        self._alpha, self._sigma = (1 - sigma).float(), sigma.float()
        self._network_time = (self.train_timesteps * sigma).float()

    def _dynamic_shift(self, config: dict[str, Any], resolution: int) -> float:
        mu = self.mu(config, (resolution // self.vae_factor() // (self.patch() or 2)) ** 2)
        return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu

    def mu(self, config: dict[str, Any], tokens: int) -> float:
        """The pipeline's rule for the shift of a picture of so many tokens: linear in their number."""
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return low + (high - low) * (tokens - few) / (many - few)

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

    def network_time(self, t: Tensor) -> Tensor:
        """The network's input for the timesteps t: t itself, or 1000 sigma of a flow. A t that is no integer is the
        network's input already: that of a solver, which calls it between the timesteps too."""
        return t if t.is_floating_point() else self._network_time.to(t.device)[t]

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return add_noise(x_0, noise, *self.alpha_sigma(t))

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should return for `add_noise(x_0, noise, t)`."""
        return training_target(self.prediction, x_0, noise, *self.alpha_sigma(t))

    def to_x_0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's output (n, C, h, w) at (x_t, t) as x_0, float32."""
        return predicted_x_0(self.prediction, output.float(), x_t, *self.alpha_sigma(t))
