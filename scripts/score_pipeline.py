#!/usr/bin/env python
"""Scores of the pictures of one pipeline: python scripts/score_pipeline.py PROMPTS OUT [SCORER]

Replace `picture` by your own pipeline. The scores are appended to OUT as JSON lines, so an interrupted run goes on.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from diffpo import scorers
from diffpo.data.prompts import load_prompts


def picture(prompt: str, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8))


def main(prompts: str, out: str, scorer: str = "aesthetic", batch: int = 8) -> None:
    done = Path(out).read_text().count("\n") if Path(out).exists() else 0
    rest, judge = load_prompts(prompts)[done:], scorers.load(scorer, scorers.default_device(scorer))
    for start in range(0, len(rest), batch):
        texts = rest[start : start + batch]
        numbers = judge.score([picture(text, done + start + k) for k, text in enumerate(texts)], texts)
        with open(out, "a") as file:
            for k, text in enumerate(texts):
                file.write(
                    json.dumps({"prompt": text} | {name: float(each[k]) for name, each in numbers.items()}) + "\n"
                )


if __name__ == "__main__":
    main(*sys.argv[1:])
