"""Calls and CPU seconds until the win rate over the base reaches 60 % and 70 %, on the embedded world.

    python scripts/bench_quality.py [--seeds 0 1] [--n 256] [--out runs/bench-quality]

`diffpo` is Diffusion-DPO with the settings that were chosen on seed 100 (scripts/objective_bench/results/tried.jsonl).
`curriculum` is curriculum_dpo, chosen among five settings on seed 100 too: the pairs with the largest score gaps first.
`scripts` has those of the example of diffusers' train_diffusion_dpo_sdxl.py: beta 5000, a constant learning rate of
1e-5, LoRA rank 8, 16 pairs. Both are trained by `diffpo train`, because the steps have the same mathematics. Win rates
of the oracle's total are measured on the first held-out prompts, on the way and at the end. Finished runs are kept
in OUT.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from objective_bench import job, results
from objective_bench.data import ASSETS

from diffpo.common import tables
from diffpo.common.carried import HOME as ROOT
from diffpo.config import load_config

BARS = (0.6, 0.7)


@dataclass(frozen=True)
class Side:
    """``looks``: the steps after which it is measured; the last is the end."""

    settings: tuple[str, ...]
    looks: tuple[int, ...]


STAGES = ("objective.name=curriculum_dpo", "data.curriculum=4", "data.curriculum_updates=8")
SIDES = {
    "curriculum": Side(
        (*STAGES, "objective.weighting=min_snr", "train.lr=1e-3", "train.lr_schedule=cosine"), (4, 8, 16, 24, 32, 48)
    ),
    "diffpo": Side(("train.lr=1e-3", "train.lr_schedule=cosine"), (8, 16, 24, 32, 48, 64, 100)),
    "scripts": Side(("objective.beta=5000", "train.lr=1e-5"), (48, 96, 144, 200, 304, 400)),
}


def curve(name: str, seed: int, n: int, out: Path) -> list[dict]:
    """[{step, forward, backward, n, total: {win: [value, low, high]}}], as in scripts/objective_bench."""
    base, output, side = out / f"base-{n}.json", out / f"run-{name}-{seed}", SIDES[name]
    if not base.exists():
        base.write_text(json.dumps(job.draw("tiny-sdxl", None, range(n))["scores"]))
    scores, end = json.loads(base.read_text()), side.looks[-1]
    options = [f"train.steps={end}", f"train.seed={seed}", f"output={output}", f"data.cache={out / 'cache'}"]
    options += ["data.validation=null", "train.checkpoint_every=4", f"train.checkpoint_keep={end}"]
    rows = job.logged(load_config(ROOT / "configs" / "quickstart.yaml", [*side.settings, *options, *PLACES]))
    found = []
    for step in side.looks:
        drawn = job.draw("tiny-sdxl", output / f"checkpoint-{step:06d}", range(n))
        calls = {kind: rows[step - 1][f"calls/{kind}"] for kind in ("forward", "backward")}
        found.append({"step": step, **calls, "n": n, **job.compare(scores, drawn["scores"], n)})
        print(name, seed, step, found[-1]["total"], flush=True)
    return found


PLACES = (f"model.path={ASSETS / 'tiny-sdxl'}", f"data.train={ASSETS / 'shapes-preferences' / 'train.parquet'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-quality"))
    asked = parser.parse_args()
    out = asked.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    print(tables.head(("side", "seed", "steps to 60 %", "to 70 %", "calls to 60 %", "to 70 %", "win rate by step")))
    for name in asked.sides:
        for seed in asked.seeds:
            kept = out / f"{name}-{seed}-{asked.n}.json"
            if not kept.exists():
                kept.write_text(json.dumps(curve(name, seed, asked.n, out), indent=1))
            found = json.loads(kept.read_text())
            runs = [{"curve": found}]
            reached = [results.reached(runs, bar, unit=unit) for unit in ("step", "calls") for bar in BARS]
            rates = ", ".join(f"{point['step']}: {point['total']['win'][0]:.1%}" for point in found)
            print(
                tables.row((name, seed, *(f"{each:,.0f}" if each else "never" for each in reached), rates)), flush=True
            )


if __name__ == "__main__":
    main()
