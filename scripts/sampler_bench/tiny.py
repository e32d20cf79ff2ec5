"""The embedded SDXL pipeline as a problem: latents after a few calls against a solution with 500 calls."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path

import torch

from diffpo.data.prompts import load_prompts
from diffpo.evaluate.generate import initial_noise
from diffpo.models import load_pipeline
from samplers import Grid, VPDiscrete, sample

MODEL = Path(__file__).resolve().parents[2] / "assets" / "tiny-sdxl"
REFERENCE_CALLS = 500


class TinySDXL:
    """Held-out prompts, their embeddings (encoded once), their initial noises and a guidance scale.

    Has what `compare.py` asks of a problem: name, schedule, z (prompts, 8, 8, 8) float32, model, exact.
    """

    def __init__(self, guidance: float, prompts: int = 64, seed: int = 0):
        self.name, self.guidance = f"tiny-sdxl g={guidance:g}", guidance
        pipe = load_pipeline(str(MODEL), device="cpu")
        self.unet = pipe.unet.eval()
        config = pipe.scheduler.config
        self.schedule = VPDiscrete.scaled_linear(config["beta_start"], config["beta_end"])
        texts = load_prompts("shapes:heldout", prompts)
        size = pipe.unet.config.sample_size
        shape = (pipe.unet.config.in_channels, size, size)
        self.z = torch.stack([initial_noise(shape, seed, i)[0] for i in range(prompts)])
        with torch.inference_mode():
            self.cond, self.empty, self.pooled, self.empty_pooled = pipe.encode_prompt(
                texts, do_classifier_free_guidance=True
            )
        pixels = size * pipe.vae_scale_factor
        self.ids = torch.tensor([pixels, pixels, 0, 0, pixels, pixels], dtype=torch.float32)

    @torch.inference_mode()
    def model(self, x: torch.Tensor, label) -> torch.Tensor:
        """The guided noise prediction; guidance 1 is the conditional model alone. x may hold the first prompts only."""
        n, twice = len(x), self.guidance != 1.0
        states, pooled, rows = self.cond[:n], self.pooled[:n], x.float()
        if twice:
            states, pooled = torch.cat([self.empty[:n], states]), torch.cat([self.empty_pooled[:n], pooled])
            rows = rows.repeat(2, 1, 1, 1)
        added = {"text_embeds": pooled, "time_ids": self.ids.expand(len(rows), -1)}
        label = torch.as_tensor(label, dtype=torch.float32)
        out = self.unet(rows, label, encoder_hidden_states=states, added_cond_kwargs=added).sample
        return (torch.lerp(*out.chunk(2), self.guidance) if twice else out).to(x.dtype)

    @cached_property
    def exact(self) -> dict[str, torch.Tensor]:
        """The solution at both ends: 500 calls of third order to label 0, then one step to sigma = 0.

        The network is not defined below label 0, so that step is part of the problem, the same for everybody.
        """
        path = Grid(self.schedule, "logsnr", end="t_end")
        options = {"schedule": self.schedule, "solver": "dpmpp", "order": 3, "steps": REFERENCE_CALLS}
        low = sample(self.model, self.z.double(), grid=path, **options)
        last = Grid(self.schedule, times=[self.schedule.t_min], end="zero")
        zero = sample(self.model, low, schedule=self.schedule, solver="ddim", steps=1, grid=last)
        return {"t_end": low, "zero": zero}

    def head(self, prompts: int) -> TinySDXL:
        """The same problem with the first prompts only, for a cheap look at many methods."""
        part = copy.copy(self)
        part.exact = {end: x[:prompts] for end, x in self.exact.items()}
        part.z = self.z[:prompts]
        return part
