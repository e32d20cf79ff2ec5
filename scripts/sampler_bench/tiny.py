"""The embedded pipelines as problems: latents after a few calls against a solution with 500 calls."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import Self

import torch

from diffpo.data.prompts import load_prompts
from diffpo.evaluate.generate import initial_noise
from diffpo.models import load_pipeline
from samplers import Grid, RectifiedFlow, Schedule, VPDiscrete, sample

ASSETS = Path(__file__).resolve().parents[2] / "assets"
REFERENCE_CALLS = 500


class Tiny:
    """What all have in common, of that which `compare.py` asks of a problem: z (prompts, 8, 8, 8) float32, exact."""

    name: str
    guidance: float
    schedule: Schedule
    prediction: str
    z: torch.Tensor
    reference: tuple[str, str, dict]  # solver, grid and options of the long run
    reference_calls: int = REFERENCE_CALLS

    def model(self, x: torch.Tensor, label) -> torch.Tensor:
        raise NotImplementedError

    @cached_property
    def exact(self) -> dict[str, torch.Tensor]:
        """The solution at both ends: `reference_calls` of third order to the smallest time, then one step to sigma = 0.

        The network is not defined below that time, so that step is part of the problem, the same for everybody.
        """
        solver, grid, options = self.reference
        common = {"schedule": self.schedule, "prediction": self.prediction}
        path = Grid(self.schedule, grid, end="t_end")
        steps = self.reference_calls
        low = sample(self.model, self.z.double(), solver=solver, steps=steps, grid=path, **common, **options)
        last = Grid(self.schedule, times=[self.schedule.t_min], end="zero")
        return {"t_end": low, "zero": sample(self.model, low, solver="ddim", steps=1, grid=last, **common)}

    def head(self, prompts: int) -> Self:
        """The same problem with the first prompts only, for a cheap look at many methods."""
        part = copy.copy(self)
        part.exact = {end: x[:prompts] for end, x in self.exact.items()}
        part.z = self.z[:prompts]
        return part


class TinySDXL(Tiny):
    """SDXL with held-out prompts, their embeddings (encoded once), their initial noises and a guidance scale."""

    prediction = "epsilon"
    reference = ("dpmpp", "logsnr", {"order": 3})

    def __init__(self, guidance: float, prompts: int = 64, seed: int = 0):
        self.name, self.guidance = f"tiny-sdxl g={guidance:g}", guidance
        pipe = load_pipeline(str(ASSETS / "tiny-sdxl"), device="cpu")
        self.unet = pipe.unet.eval()
        config = pipe.scheduler.config
        self.schedule = VPDiscrete.scaled_linear(config["beta_start"], config["beta_end"])
        texts = load_prompts("shapes:heldout", prompts)
        self.z = _noise(pipe.unet.config, prompts, seed)
        with torch.inference_mode():
            self.cond, self.empty, self.pooled, self.empty_pooled = pipe.encode_prompt(
                texts, do_classifier_free_guidance=True
            )
        pixels = pipe.unet.config.sample_size * pipe.vae_scale_factor
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


class TinyDiT(Tiny):
    """PixArt-Sigma's pipeline with a flow model, set up like `TinySDXL`."""

    prediction = "flow"
    reference = ("abm", "time", {"order": 3})  # lambda is infinite at pure noise

    def __init__(self, guidance: float, prompts: int = 64, seed: int = 0):
        self.name, self.guidance = f"tiny-dit g={guidance:g}", guidance
        pipe = load_pipeline(str(ASSETS / "tiny-dit"), device="cpu")
        self.transformer = pipe.transformer.eval()
        self.schedule = RectifiedFlow(pipe.scheduler.config["flow_shift"])
        self.z = _noise(pipe.transformer.config, prompts, seed)
        texts = [*load_prompts("shapes:heldout", prompts), ""]  # unconditional is the empty caption
        with torch.inference_mode():
            self.states, self.mask, _, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False)
        # tokens that no prompt uses are masked in every row: without them the result is the same, in less time
        used = int(self.mask.sum(1).max())
        self.states, self.mask = self.states[:, :used], self.mask[:, :used]

    @torch.inference_mode()
    def model(self, x: torch.Tensor, label) -> torch.Tensor:
        """The guided flow, as `TinySDXL.model`."""
        n, twice = len(x), self.guidance != 1.0
        rows = [*range(n)] if not twice else [*[len(self.states) - 1] * n, *range(n)]
        label = torch.as_tensor(label, dtype=torch.float32).expand(len(rows))
        out = self.transformer(
            x.float().repeat(1 + twice, 1, 1, 1),
            encoder_hidden_states=self.states[rows],
            encoder_attention_mask=self.mask[rows],
            timestep=label,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        return (torch.lerp(*out.chunk(2), self.guidance) if twice else out).to(x.dtype)


def _noise(config, prompts: int, seed: int) -> torch.Tensor:
    shape = (config.in_channels, config.sample_size, config.sample_size)
    return torch.stack([initial_noise(shape, seed, i)[0] for i in range(prompts)])
