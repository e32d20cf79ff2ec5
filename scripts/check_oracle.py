"""How often is the oracle right about what was drawn, and how do its scores fall under noise?

python scripts/check_oracle.py [N]      # default 10,000 scenes of both splits
"""

import sys

import numpy as np

from diffpo.shapes import ATTRIBUTES, render, score
from diffpo.shapes.scenes import ALL_SCENES


def main(n: int) -> None:
    rng = np.random.default_rng(0)
    scenes = [ALL_SCENES[i] for i in rng.integers(len(ALL_SCENES), size=n)]
    images = [render(s, rng) for s in scenes]
    keys = ("all_right", *(f"right_{a}" for a in ATTRIBUTES), "following", "appearance", "total")
    print(f"{'noise':>6} {'n':>6}  " + "  ".join(f"{k.removeprefix('right_'):>10}" for k in keys))
    for sigma, count in ((0, n), (10, n // 10), (20, n // 10), (30, n // 10), (40, n // 10), (60, n // 10)):
        rows = [
            score(np.clip(x + rng.normal(0, sigma, x.shape), 0, 255) if sigma else x, s)
            for x, s in zip(images[:count], scenes[:count], strict=True)
        ]
        means = (np.nanmean([r[k] for r in rows]) for k in keys)
        print(f"{sigma:6} {count:6}  " + "  ".join(f"{m:10.4f}" for m in means), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
