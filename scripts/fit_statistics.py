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
from tqdm.auto import tqdm

from diffpo.commands.calibration_problem import Samples, make_problem
from diffpo.data.prompts import load_prompts
from diffpo.evaluation.generation import Generation
from samplers.calibrate import estimate

ASSETS = Path(__file__).resolve().parents[1] / "assets"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["tiny-sdxl", "tiny-dit"])
    parser.add_argument("--guidance", nargs="+", type=float, default=[1.0, 3.0, 7.5])
    parser.add_argument("--n", type=int, default=128, help="training prompts, with one noise each")
    parser.add_argument("--levels", type=int, default=60)
    parser.add_argument("--out", type=Path, default=ASSETS / "calibrated")
    args = parser.parse_args()
    torch.set_num_threads(1)
    samples = Samples(tuple(load_prompts("shapes:train", args.n)), tuple(load_prompts("shapes:heldout", 1)))
    for name in args.model:
        for guidance in args.guidance:
            began = time.process_time()
            generation = Generation(model=str(ASSETS / name), guidance=guidance, batch_size=64, device="cpu")
            made = make_problem(generation, samples, lambda total: tqdm(total=total, desc="reference calls"))
            between = time.process_time()
            found = estimate(made.problem, args.levels, pooled=True)
            path = args.out / name / f"statistics-g{guidance:g}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            replace(found, model=made.model_hash).save(path)
            took = f"{between - began:.0f} s for the targets, {time.process_time() - between:.0f} s for the statistics"
            print(f"{path}: {path.stat().st_size} bytes, {took}", flush=True)


if __name__ == "__main__":
    main()
