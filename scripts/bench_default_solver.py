"""The command line's default solver against a named one: scores of the base model's pictures, paired by prompt.

python scripts/bench_default_solver.py [--models tiny-sdxl tiny-dit] [--calls 6 10 20] [--seeds 0 1] [--n 512]

Both make pictures of the same held-out prompts from the same noise, with as many calls and the same guidance. Prints
one Markdown row for each model, number of calls, seed of the noise and score, and one for all seeds together. The
difference is the default minus the other, with a bootstrap interval over prompts. Finished pictures in OUT are kept.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from diffpo import scorers
from diffpo.common import tables
from diffpo.common.carried import HOME as ROOT
from diffpo.evaluation import generate, manifest, statistics
from diffpo.evaluation.generation import Generation

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
            found: list[dict[str, np.ndarray]] = []
            for seed in args.seeds:
                for solver in (args.against, None):
                    options = {"steps": calls, "solver": solver, "guidance": args.guidance, "batch_size": 64}
                    out = args.out / f"{model}-{solver or 'default'}-{calls}-{args.guidance:g}-{seed}"
                    found.append(measure(Generation(ROOT / "assets" / model, seed=seed, **options), out, args.n))
                for name in SCORES:
                    print(tables.row([model, calls, seed, name, *compared(found[-2:], name)]), flush=True)
            if len(args.seeds) > 1:
                for name in SCORES:
                    print(tables.row([model, calls, "all", name, *compared(found, name)]), flush=True)


if __name__ == "__main__":
    main()
