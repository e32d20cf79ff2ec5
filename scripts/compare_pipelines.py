#!/usr/bin/env python
"""Two pipelines that diffpo does not know, compared: python scripts/compare_pipelines.py PROMPTS OUT

Replace `PIPELINES` by your own: a function of prompt and seed that returns a PIL picture.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import diffpo
from diffpo.data.prompts import load_prompts

PIPELINES = {
    "noise": lambda prompt, seed: Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)),
    "grey": lambda prompt, seed: Image.new("RGB", (64, 64), "grey"),
}


def main(prompts: str, out: str, scorer: str = "aesthetic", seeds: int = 2) -> None:
    texts = load_prompts(prompts)
    for name, pipeline in PIPELINES.items():
        folder = Path(out, name)
        folder.mkdir(parents=True, exist_ok=True)
        for index, prompt in enumerate(texts):
            for seed in range(seeds):
                if not (path := folder / f"{index}_{seed}.png").exists():
                    pipeline(prompt, seed).save(path)
    arms = {name: Path(out, name) for name in PIPELINES}
    found = diffpo.evaluate(arms, texts, out=Path(out, "eval"), scorers=[scorer])
    for row in found.table():
        print(
            row["scorer"], row["arm"], f"{row['win_rate']:.1%} [{row['win_rate_low']:.1%}, {row['win_rate_high']:.1%}]"
        )
    print(found.verdict.sentence)


if __name__ == "__main__":
    main(*sys.argv[1:])
