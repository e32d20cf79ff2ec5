"""The command line's default solver against a named one: scores of the base model's pictures, paired by prompt.

python scripts/bench_default_solver.py [--models tiny-sdxl tiny-dit] [--calls 6 10 20] [--seeds 0 1] [--n 512]

Both make pictures of the same held-out prompts from the same noise, with as many calls and the same guidance. Prints
one Markdown row for each model, number of calls and seed of the noise. The difference is the default minus the other,
with a bootstrap interval over prompts. Finished pictures in OUT are kept.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from diffpo import scorers
from diffpo.commands.quickstart import ROOT
from diffpo.common import tables
from diffpo.evaluate import generate, manifest, statistics
from diffpo.evaluate.generation import Generation

SCORES = ("total", "following", "appearance", "all_right")


def measure(generation: Generation, out: Path, n: int) -> dict[str, np.ndarray]:
    """The oracle's scores of the pictures of ``n`` held-out prompts, (n,) each."""
    rows = generate.run({"base": generation}, "shapes:heldout", out, n)
    images = [manifest.open_image(out / row["file"]) for row in rows]
    return scorers.load("shapes").score(images, [row["prompt"] for row in rows])


def compared(other: np.ndarray, default: np.ndarray) -> list[str]:
    prompts = np.arange(len(default))
    found = statistics.mean_difference(other, default, prompts)
    return [f"{other.mean():.3f}", f"{default.mean():.3f}", f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny-sdxl", "tiny-dit"], help="folders in assets/")
    parser.add_argument("--calls", type=int, nargs="+", default=[6, 10, 20])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--against", default="dpmpp", help="a solver's name")
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-default-solver"))
    args = parser.parse_args()
    print(tables.head(["model", "calls", "seed", "score", args.against, "default", "difference [95 %]"]), flush=True)
    for model in args.models:
        for calls in args.calls:
            for seed in args.seeds:
                found = {}
                for solver in (args.against, None):
                    options = {"steps": calls, "solver": solver, "guidance": args.guidance, "batch_size": 64}
                    generation = Generation(ROOT / "assets" / model, seed=seed, **options)
                    out = args.out / f"{model}-{solver or 'default'}-{calls}-{args.guidance:g}-{seed}"
                    found[solver] = measure(generation, out, args.n)
                for name in (f"shapes.{each}" for each in SCORES):
                    about = [model, calls, seed, name.removeprefix("shapes.")]
                    print(tables.row([*about, *compared(found[args.against][name], found[None][name])]), flush=True)


if __name__ == "__main__":
    main()
