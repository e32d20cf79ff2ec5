"""The command line's default solver against a named one: scores of the base model's pictures, paired by prompt.

python scripts/bench_default_solver.py [--models tiny-sdxl tiny-dit] [--calls 6 10 20] [--seeds 0 1] [--n 512]
python scripts/bench_default_solver.py --latents [--guidance 1 3 5 7.5] [--calls 5 8 10 20] [--n 64]

Both make pictures of the same held-out prompts from the same noise, with as many calls and the same guidance. Prints
one Markdown row for each model, number of calls, seed of the noise and score, and one for all seeds together. The
difference is the default minus the other, with a bootstrap interval over prompts. Finished pictures in OUT are kept.

--latents: errors of the latents at sigma = 0 against 64 calls of third order, of the rule, and its ratios to
`ddim`, `dpmpp` and `unipc` on the grid beta_time with bootstrap intervals.
"""

import argparse
import os
from itertools import product
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from sampler_bench import compare
from sampler_bench.tiny import Tiny, TinyDiT, TinySDXL

from diffpo import scorers
from diffpo.common import tables
from diffpo.common.carried import HOME as ROOT
from diffpo.evaluation import generate, manifest, statistics
from diffpo.evaluation.generation import Generation
from samplers import Grid, build_plan, default_solver, sample

TINY = {"tiny-sdxl": TinySDXL, "tiny-dit": TinyDiT}
BESIDE = ("ddim", "dpmpp", "unipc")
SCORES = ("total", "following", "appearance", "all_right")


def measure(generation: Generation, out: Path, n: int) -> dict[str, np.ndarray]:
    """The oracle's scores of the pictures of ``n`` held-out prompts, (n,) each."""
    rows = generate.run({"base": generation}, "shapes:heldout", out, n)
    images = [manifest.open_image(out / row["file"]) for row in rows]
    return scorers.load("shapes").score(images, [row["prompt"] for row in rows])


def compared(found: list[dict[str, np.ndarray]], name: str) -> list[str]:
    """Means of the other and of the default, and their difference. ``found``: both, for every seed in turn."""
    other, default = (np.concatenate([each[f"shapes.{name}"] for each in found[arm::2]]) for arm in (0, 1))
    prompts = np.tile(np.arange(len(found[0][f"shapes.{name}"])), len(found) // 2)
    gap = statistics.mean_difference(other, default, prompts)
    return [f"{other.mean():.3f}", f"{default.mean():.3f}", f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"]


def latents(problem: Tiny, seed: int, every: list[int]) -> None:
    """One row for each number of calls."""
    schedule, prediction = problem.schedule, problem.prediction
    long = default_solver(64, 3.0, schedule).grid
    low = build_plan(schedule, "abm", 64, long, prediction, order=3).run(problem.model, problem.z.double())
    last = Grid(schedule, times=[schedule.t_min], end="zero")
    exact = sample(problem.model, low, schedule=schedule, solver="ddim", grid=last, steps=1, prediction=prediction)
    for calls in every:
        rule = {"guidance": problem.guidance, "end": "zero"}
        plans = {"rule": build_plan(schedule, None, calls, images=True, **rule)}
        plans |= {name: build_plan(schedule, name, calls, "beta_time") for name in BESIDE}
        found = {
            name: (plan.run(problem.model, problem.z, prediction=prediction, check_finite=False).double() - exact)
            .square()
            .flatten(1)
            .mean(1)
            .numpy()
            for name, plan in plans.items()
        }
        ratios = [compare.ratio(found["rule"], found[name]) for name in BESIDE]
        texts = [f"{value:.2f} [{low:.2f}, {high:.2f}]" for value, low, high in ratios]
        print(tables.row([problem.name, calls, seed, f"{compare.rmse(found['rule']):.3f}", *texts]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny-sdxl", "tiny-dit"], help="folders in assets/")
    parser.add_argument("--calls", type=int, nargs="+", default=[6, 10, 20])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0])
    parser.add_argument("--latents", action="store_true")
    parser.add_argument("--against", default="dpmpp", help="a solver's name")
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-default-solver"))
    args = parser.parse_args()
    if args.latents:
        print(tables.head(["model", "calls", "seed", "rule", *(f"rule / {name}" for name in BESIDE)]))
        for model, guidance, seed in product(args.models, args.guidance, args.seeds):
            latents(TINY[model](guidance, args.n, seed), seed, args.calls)
        return
    for guidance in args.guidance:
        pictures(args, guidance)


def pictures(args: argparse.Namespace, guidance: float) -> None:
    print(tables.head(["model", "calls", "seed", "score", args.against, "default", "difference [95 %]"]), flush=True)
    for model in args.models:
        for calls in args.calls:
            found: list[dict[str, np.ndarray]] = []
            for seed in args.seeds:
                for solver in (args.against, None):
                    options = {"steps": calls, "solver": solver, "guidance": guidance, "batch_size": 64}
                    out = args.out / f"{model}-{solver or 'default'}-{calls}-{guidance:g}-{seed}"
                    found.append(measure(Generation(ROOT / "assets" / model, seed=seed, **options), out, args.n))
                for name in SCORES:
                    print(tables.row([model, calls, seed, name, *compared(found[-2:], name)]), flush=True)
            if len(args.seeds) > 1:
                for name in SCORES:
                    print(tables.row([model, calls, "all", name, *compared(found, name)]), flush=True)


if __name__ == "__main__":
    main()
