"""The embedded SDXL pipeline as a problem: latents after a few calls against a solution with 500 calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from diffpo.generate import initial_noise
from diffpo.models import load_pipeline
from diffpo.prompts import load_prompts
from samplers import Grid, VPDiscrete, sample

MODEL = Path(__file__).resolve().parents[2] / "assets" / "tiny-sdxl"
REFERENCE_CALLS = 500


class TinySDXL:
    """Held-out prompts, their embeddings (encoded once) and their initial noises.

    z: (prompts, 8, 8, 8) float32. schedule: the network's.
    """

    def __init__(self, prompts: int = 64, seed: int = 0):
        pipe = load_pipeline(str(MODEL), device="cpu")
        self.unet = pipe.unet.eval()
        config = pipe.scheduler.config
        self.network = {key: config[key] for key in ("beta_start", "beta_end", "beta_schedule")}
        self.schedule = VPDiscrete.scaled_linear(config["beta_start"], config["beta_end"])
        self.prompts = load_prompts("shapes:heldout", prompts)
        size = pipe.unet.config.sample_size
        shape = (pipe.unet.config.in_channels, size, size)
        self.z = torch.stack([initial_noise(shape, seed, i)[0] for i in range(prompts)])
        with torch.inference_mode():
            cond, empty, pooled, empty_pooled = pipe.encode_prompt(self.prompts, do_classifier_free_guidance=True)
        pixels = size * pipe.vae_scale_factor
        ids = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], dtype=torch.float32).repeat(prompts, 1)
        self._cond = (cond, {"text_embeds": pooled, "time_ids": ids})
        both = {"text_embeds": torch.cat([empty_pooled, pooled]), "time_ids": ids.repeat(2, 1)}
        self._both = (torch.cat([empty, cond]), both)
        self._exact: dict[float, dict[str, torch.Tensor]] = {}

    def model(self, guidance: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The guided noise prediction `model(x, label)`; guidance 1 is the conditional model alone."""

        @torch.inference_mode()
        def model(x, label):
            twice = guidance != 1.0
            states, added = self._both if twice else self._cond
            x_in = torch.cat([x, x]) if twice else x
            label = torch.as_tensor(label, dtype=torch.float32)
            out = self.unet(x_in.float(), label, encoder_hidden_states=states, added_cond_kwargs=added).sample
            if not twice:
                return out.to(x.dtype)
            uncond, cond = out.chunk(2)
            return torch.lerp(uncond, cond, guidance).to(x.dtype)

        return model

    def exact(self, guidance: float) -> dict[str, torch.Tensor]:
        """The solution at both ends: 500 calls of third order to label 0, then one step to sigma = 0.

        The network is not defined below label 0, so that step is part of the problem, the same for everybody.
        """
        if guidance not in self._exact:
            model, z = self.model(guidance), self.z.double()
            path = Grid(self.schedule, "logsnr", end="t_end")
            low = sample(model, z, schedule=self.schedule, solver="dpmpp", order=3, steps=REFERENCE_CALLS, grid=path)
            last = Grid(self.schedule, times=[self.schedule.t_min], end="zero")
            zero = sample(model, low, schedule=self.schedule, solver="ddim", steps=1, grid=last)
            self._exact[guidance] = {"t_end": low, "zero": zero}
        return self._exact[guidance]

    def errors(self, x: torch.Tensor, end: str, guidance: float) -> torch.Tensor:
        """(prompts,): mean squared error of every prompt's latent."""
        return (x.double() - self.exact(guidance)[end]).square().flatten(1).mean(1)
