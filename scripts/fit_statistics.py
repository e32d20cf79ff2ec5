#!/usr/bin/env python
"""Fit the statistics of the embedded models: assets/calibrated/NAME/statistics-gGUIDANCE.safetensors.

    python scripts/fit_statistics.py [--model tiny-sdxl tiny-dit] [--guidance 1 3] [--n 32] [--levels 30]
                                     [--calls 24] [--out DIR]

The prompts are training prompts; the held-out ones are for measurements. The statistics are numbers per channel, so
that the files are small and fit every image size. About 2 minutes on one core for a model and a guidance scale.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from diffpo.commands.guided_model import PromptedModel
from diffpo.common.rng import generator, normal
from diffpo.data.prompts import load_prompts
from diffpo.evaluation.generation import Generation
from samplers.calibrate import Batch, Problem, estimate, reference

ASSETS = Path(__file__).resolve().parents[1] / "assets"
BATCH = 32
SEED = 7  # of the noises


def problem(model: PromptedModel, prompts: list[str], calls: int) -> Problem:
    """The model at these prompts, with one noise each. The targets only have to look like the model's pictures."""
    schedule, prediction = model.family.schedule(), model.family.prediction
    batches = []
    for first in range(0, len(prompts), BATCH):
        guided = model.at(prompts[first : first + BATCH])
        noise = normal([generator(SEED, "statistics", first + i) for i in range(len(guided.prompts))], model.shape)
        batches.append(Batch(guided, noise, reference(guided, noise, schedule, prediction, calls, model.guidance)))
    return Problem(schedule, prediction, tuple(batches), (), model.guidance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["tiny-sdxl", "tiny-dit"])
    parser.add_argument("--guidance", nargs="+", type=float, default=[1.0, 3.0])
    parser.add_argument("--n", type=int, default=32, help="training prompts, with one noise each")
    parser.add_argument("--levels", type=int, default=30)
    parser.add_argument("--calls", type=int, default=24, help="of the solver that makes the pictures")
    parser.add_argument("--out", type=Path, default=ASSETS / "calibrated")
    args = parser.parse_args()
    torch.set_num_threads(1)
    prompts = load_prompts("shapes:train", args.n)
    for name in args.model:
        for guidance in args.guidance:
            began = time.process_time()
            model = PromptedModel(Generation(str(ASSETS / name), guidance=guidance, device="cpu"), prompts)
            made = problem(model, prompts, args.calls)
            between = time.process_time()
            bar = tqdm(total=args.levels + 1, desc=f"{name} g={guidance:g}: levels")
            found = estimate(made, args.levels, pooled=True, progress=lambda done, total, bar=bar: bar.update())
            bar.close()
            path = args.out / name / f"statistics-g{guidance:g}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            replace(found, model=model.model_hash).save(path)
            took = f"{between - began:.0f} s for the pictures, {time.process_time() - between:.0f} s for the statistics"
            print(f"{path}: {path.stat().st_size} bytes, {took} of processor time", flush=True)


if __name__ == "__main__":
    main()
