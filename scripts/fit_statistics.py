#!/usr/bin/env python
"""Fit the statistics of the embedded models: assets/calibrated/NAME/statistics-gGUIDANCE.safetensors.

    python scripts/fit_statistics.py [--model tiny-sdxl tiny-dit] [--guidance 1 3 7.5] [--n 128] [--out DIR]

The prompts are training prompts; the held-out ones are for measurements. The statistics are numbers per channel, so
that the files are small and fit every image size. Takes minutes on one core.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from diffpo import models
from diffpo.common.rng import generator, normal
from diffpo.data.prompts import load_prompts
from diffpo.problems.policy import Policy
from diffpo.problems.regression import Conditioning
from diffpo.weights import lora
from samplers.calibrate import Batch, Problem, estimate, reference

ASSETS = Path(__file__).resolve().parents[1] / "assets"
BATCH = 64


def embedded(name: str, guidance: float, fitting: int, heldout: int = 1, calls: int = 100, seed: int = 0) -> Problem:
    """An embedded model as a problem: training prompts to fit to, held-out prompts to measure on.

    Args:
        name: of a folder in assets. fitting, heldout: numbers of prompts, with one noise each.
        calls: of the reference.
    """
    settings = models.named(str(ASSETS / name))
    family = models.load(settings, "no", 32)
    network = lora.network_of(family.pipe).requires_grad_(False).eval()
    pixels = family.sample_size(family.pipe) * models.vae_factor(family.pipe)
    shape, schedule = family.latent_shape(network, pixels), family.schedule()
    sizes = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], dtype=torch.float32)

    def condition(texts):
        return family.condition(family.encode_text(texts), sizes.repeat(len(texts), 1))

    def batches(split: str, count: int) -> tuple[Batch, ...]:
        prompts, made = load_prompts(f"shapes:{split}", count), []
        for first in range(0, count, BATCH):
            texts = prompts[first : first + BATCH]
            noise = normal([generator(seed, split, first + i) for i in range(len(texts))], shape)
            with torch.no_grad():
                uncond = condition([None] * len(texts)) if guidance != 1 else None
                given = Conditioning(condition(texts), uncond, guidance)

            def model(x, label, given=given):
                t = torch.as_tensor(label, dtype=torch.float32).expand(len(x))
                return Policy(family, network).output(x, t, given).to(x.dtype)

            made.append(Batch(model, noise, reference(model, noise, schedule, family.prediction, calls)))
        return tuple(made)

    return Problem(schedule, family.prediction, batches("train", fitting), batches("heldout", heldout), guidance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["tiny-sdxl", "tiny-dit"])
    parser.add_argument("--guidance", nargs="+", type=float, default=[1.0, 3.0, 7.5])
    parser.add_argument("--n", type=int, default=128, help="training prompts, with one noise each")
    parser.add_argument("--levels", type=int, default=60)
    parser.add_argument("--out", type=Path, default=ASSETS / "calibrated")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.model:
        fingerprint = models.source_of(models.named(str(ASSETS / name))).fingerprint()
        for guidance in args.guidance:
            began = time.process_time()
            problem = embedded(name, guidance, args.n)
            between = time.process_time()
            found = estimate(problem, args.levels, pooled=True)
            path = args.out / name / f"statistics-g{guidance:g}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            replace(found, model=fingerprint).save(path)
            took = f"{between - began:.0f} s for the targets, {time.process_time() - between:.0f} s for the statistics"
            print(f"{path}: {path.stat().st_size} bytes, {took}", flush=True)


if __name__ == "__main__":
    main()
