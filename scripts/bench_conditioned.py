"""What a negative LoRA and weights at generation do to pictures of the embedded world; the tables in docs/users.md.

python scripts/bench_conditioned.py negative|steer [--out runs/bench-conditioned] [--seed 0] [--n 256]

negative: Diffusion-DPO and Diffusion-NPO are trained alike on assets/shapes-preferences. Pictures by the base, by each
combination of the positive LoRA and the negative one, at one guidance scale, against the base.
steer: one LoRA (preset dpa) for the rewards following and appearance; pictures at five weights, against the base.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from PIL import Image

from diffpo.common.carried import HOME as ROOT
from diffpo.config import load_config
from diffpo.evaluation import generate, statistics
from diffpo.evaluation.generation import Generation
from diffpo.scorers.shapes import ShapesScorer
from diffpo.train.loop import train

MODEL = ROOT / "assets" / "tiny-sdxl"
SCORES = ("total", "following", "appearance")
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
MAKING = {"steps": 6, "guidance": 3.0, "batch_size": 64, "device": "cpu"}


def trained(folder: Path, name: str, seed: int, *overrides: str) -> Path:
    output = folder / f"{name}-{seed}"
    common = [f"model.path={MODEL}", f"data.cache={folder / 'cache'}", f"objective.name={name}", "objective.beta=500"]
    for split in ("train", "validation"):
        common.append(f"data.{split}={ROOT / 'assets' / 'shapes-preferences' / f'{split}.parquet'}")
    common += [f"train.seed={seed}", f"output={output}", "train.eval_every=100", *overrides]
    train(load_config(ROOT / "configs" / "quickstart.yaml", common))
    return output


def table(arms: dict[str, Generation], out: Path, n: int) -> None:
    """Win rate over the first arm and mean difference from it, of every score."""
    rows = generate.run(arms, "shapes:heldout", out, n)
    scorer, found = ShapesScorer(), {}
    for name in arms:
        own = [row for row in rows if row["arm"] == name]
        pictures = [Image.open(out / row["file"]).convert("RGB") for row in own]
        found[name] = scorer.score(pictures, [row["prompt"] for row in own])
    base, prompts = next(iter(found.values())), np.arange(n)
    for name, scores in found.items():
        cells = []
        for score in SCORES:
            ours, theirs = np.asarray(scores[f"shapes.{score}"]), np.asarray(base[f"shapes.{score}"])
            win = statistics.win_rate(theirs, ours, prompts)
            change = statistics.mean_difference(theirs, ours, prompts)
            cells.append(
                f"{win.value:.1%} [{win.low:.1%}, {win.high:.1%}], {change.value:+.4f} [{change.low:+.4f}, "
                f"{change.high:+.4f}]"
            )
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["negative", "steer"])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-conditioned"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=256, help="held-out prompts")
    parser.add_argument("--steps", type=int, default=200, help="updates")
    args = parser.parse_args()
    folder = args.out.resolve()
    base = Generation(MODEL, **MAKING)
    steps = f"train.steps={args.steps}"
    if args.what == "negative":
        good = trained(folder, "diffusion_dpo", args.seed, steps)
        bad = trained(folder, "diffusion_npo", args.seed, steps)
        arms = {
            "base": base,
            "negative": Generation(MODEL, negative_lora=bad, **MAKING),
            "positive": Generation(MODEL, lora=good, **MAKING),
            "both": Generation(MODEL, lora=good, negative_lora=bad, **MAKING),
            "both-half": Generation(MODEL, lora=good, negative_lora=bad, negative_lora_weight=0.5, **MAKING),
        }
    else:
        lora = trained(folder, "dpa", args.seed, steps, "data.columns.rewards=[following, appearance]")
        last = json.loads((lora / "metrics.jsonl").read_text().splitlines()[-1])
        print(f"held-out accuracy with drawn weights {last['eval/accuracy']:.3f}")
        arms = {"base": base}
        for w in WEIGHTS:
            steer = f"following:{w} appearance:{1 - w}"
            arms[f"following-{w}"] = Generation(MODEL, lora=lora, steer=steer, **MAKING)
    table(arms, folder / f"pictures-{args.what}-{args.seed}-{args.steps}", args.n)


if __name__ == "__main__":
    main()
