"""The embedded pipelines as problems: latents after a few calls against a solution with 500 calls."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Self

import torch

from diffpo.commands.guided_model import PromptedModel
from diffpo.data.prompts import load_prompts
from diffpo.evaluation.generate import initial_noise
from diffpo.evaluation.generation import Generation
from samplers import Grid, sample

ASSETS = Path(__file__).resolve().parents[2] / "assets"
REFERENCE_CALLS = 500


class Tiny:
    """A pipeline with held-out prompts, their embeddings (encoded once), their initial noises and a guidance scale.

    Of that which `compare.py` asks of a problem: z (prompts, 8, 8, 8) float32, `exact`, `model`, schedule, prediction.
    """

    folder: ClassVar[str]  # in assets
    long_run: ClassVar[tuple[str, str, dict]]  # solver, grid and options of the solution with 500 calls
    reference_calls: int = REFERENCE_CALLS

    def __init__(self, guidance: float, prompts: int = 64, seed: int = 0):
        self.name, self.guidance = f"{self.folder} g={guidance:g}", guidance
        self.texts = load_prompts("shapes:heldout", prompts)
        generation = Generation(model=str(ASSETS / self.folder), guidance=guidance, device="cpu")
        self.prompted = PromptedModel(generation, self.texts)
        self.schedule, self.prediction = self.prompted.family.schedule(), self.prompted.family.prediction
        self.z = torch.stack([initial_noise(self.prompted.shape, seed, i)[0] for i in range(prompts)])
        self.guided = self.prompted.at(self.texts)

    @torch.inference_mode()
    def model(self, x: torch.Tensor, label) -> torch.Tensor:
        """The guided output; guidance 1 is the conditional model alone."""
        return self.guided(x, label)

    @cached_property
    def exact(self) -> dict[str, torch.Tensor]:
        """The solution at both ends: `reference_calls` of third order to the smallest time, then one step to sigma = 0.

        The network is not defined below that time, so that step is part of the problem, the same for everybody.
        """
        solver, grid, options = self.long_run
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
        part.z, part.guided = self.z[:prompts], self.prompted.at(self.texts[:prompts])
        return part


class TinySDXL(Tiny):
    folder = "tiny-sdxl"
    long_run = ("dpmpp", "logsnr", {"order": 3})


class TinyDiT(Tiny):
    """PixArt-Sigma's pipeline with a flow model."""

    folder = "tiny-dit"
    long_run = ("abm", "time", {"order": 3})  # lambda is infinite at pure noise
