"""Preference pairs from the base model's own samples, labelled by the oracle (stage pairs)."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from diffpo.common.tables import Table
from diffpo.shapes import score, train_captions
from diffpo.shapes.oracle import FOLLOWING_WEIGHT

from .card import GUIDANCE, generate
from .common import SEED, log

DATA_CARD = """# shapes-preferences

Pairs of pictures that `assets/tiny-sdxl` drew for captions of its training split ({steps} calls of DPM-Solver++(2M),
guidance {guidance}), labelled by the oracle of `diffpo.shapes` and stored in the columns of Pick-a-Pic. Made by
`scripts/build_tiny_models.py pairs`, seed {seed}; lossless WebP bytes.

The preference is the oracle's total, {weight} x prompt following + {rest} x appearance. A pair whose totals differ by
less than {margin} is a tie (0.5 / 0.5). {flip:.0%} of the other labels are flipped at random, like mistakes of people.
The column `flipped` marks them. The totals and both axes of each picture are in `score_*`, `following_*` and
`appearance_*`, for analysis; Diffusion-DPO trains on the labels only. Captions of `validation` are not in `train`.

{table}
"""
FLIP = 0.04
TIE_MARGIN = 0.02


def pairs(
    work: Path, assets: Path, n_train: int = 700, n_validation: int = 80, samples: int = 8, steps: int = 10
) -> None:
    """Write assets/shapes-preferences: disjoint pairs of one caption: best with worst, second with last but one, ..."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(assets / "tiny-sdxl")
    captions = train_captions(n_train + n_validation, seed=SEED)
    folder = assets / "shapes-preferences"
    folder.mkdir(parents=True, exist_ok=True)
    rng, table = np.random.default_rng(SEED), Table(["split", "captions", "pairs", "ties", "flipped", "MB"])
    for split, own in {"train": captions[:n_train], "validation": captions[n_train:]}.items():
        offset = 0 if split == "train" else n_train
        prompts = [c for c in own for _ in range(samples)]
        images = generate(pipe, prompts, [SEED * 20_000 + offset * samples + i for i in range(len(prompts))], steps)
        scores = [score(im, p) for im, p in zip(images, prompts, strict=True)]
        rows = []
        for k, caption in enumerate(own):
            order = sorted(range(k * samples, (k + 1) * samples), key=lambda i: -scores[i]["total"])
            for better, worse in zip(order[: samples // 2], reversed(order[samples // 2 :]), strict=True):
                tie = scores[better]["total"] - scores[worse]["total"] < TIE_MARGIN
                flipped = bool(not tie and rng.random() < FLIP)
                first, second = (better, worse) if rng.random() < 0.5 else (worse, better)
                label = 0.5 if tie else float((first == better) != flipped)
                rows.append(
                    {
                        "caption": caption,
                        "jpg_0": lossless(images[first]),
                        "jpg_1": lossless(images[second]),
                        "label_0": label,
                        "label_1": 1 - label,
                        "image_0_uid": f"{split}-{first}",
                        "image_1_uid": f"{split}-{second}",
                        "are_different": True,
                        "has_label": True,
                        "flipped": flipped,
                        **{f"{name}_0": scores[first][key] for name, key in SCORE_COLUMNS.items()},
                        **{f"{name}_1": scores[second][key] for name, key in SCORE_COLUMNS.items()},
                    }
                )
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet", compression="zstd")
        size = (folder / f"{split}.parquet").stat().st_size / 1e6
        ties, flips = sum(r["label_0"] == 0.5 for r in rows), sum(r["flipped"] for r in rows)
        table.rows.append((split, len(own), len(rows), ties, flips, f"{size:.2f}"))
        spread = {k: float(np.std([s[k] for s in scores])) for k in ("total", "following", "appearance")}
        log(work, "pairs", split=split, pairs=len(rows), ties=ties, flipped=flips, megabytes=size, spread=spread)
    text = DATA_CARD.format(
        steps=steps,
        guidance=GUIDANCE,
        seed=SEED,
        weight=FOLLOWING_WEIGHT,
        rest=1 - FOLLOWING_WEIGHT,
        margin=TIE_MARGIN,
        flip=FLIP,
        table=table.markdown(),
    )
    (folder / "README.md").write_text(text)
    print(text)


SCORE_COLUMNS = {"score": "total", "following": "following", "appearance": "appearance"}


def lossless(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=True, quality=100, method=6)
    return buffer.getvalue()
