"""Data of the comparison, all made from assets/shapes-preferences: the same images in other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from diffpo.commands.quickstart import ROOT

MODEL = ROOT / "assets" / "tiny-sdxl"
PAIRS = ROOT / "assets" / "shapes-preferences" / "train.parquet"
VALIDATION = ROOT / "assets" / "shapes-preferences" / "validation.parquet"
FLIPS = (20, 40)  # per cent of the labels


def make(folder: Path) -> None:
    """Write lists.parquet, pairs-scored.parquet, flipped-20/40.parquet and captions.parquet into ``folder``.

    lists: the eight images of a caption with their scores (the oracle's total). scored: the pairs with both scores.
    flipped: the labels of so many per cent of the pairs that are no ties are turned round. captions: the rejected image
    has a caption of its own, the prompt with one word changed (DCPO's perturbed prompt).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    rows = pq.read_table(PAIRS).to_pylist()

    def write(name: str, content: list[dict[str, Any]]) -> None:
        pq.write_table(pa.Table.from_pylist(content), folder / f"{name}.parquet")

    write("lists", as_lists(rows))
    for share in FLIPS:
        write(f"flipped-{share}", flipped(rows, share / 100))
    write("captions", [own_captions(row, i) for i, row in enumerate(rows) if row["label_0"] != 0.5])


def scorers(folder: Path, cache: Path) -> None:
    """The step-aware scorers of configs/, trained once: ``folder``/pixel, from the time-blind ``folder``/blind, and
    ``folder``/latent."""
    from diffpo.config import ScorerConfig, load_config
    from diffpo.train.step_scorer import train_scorer

    own = {
        "blind": ("pixel", ["scorer.times=clean", f"scorer.clip={ROOT / 'assets' / 'tiny-clip'}"]),
        "pixel": ("pixel", [f"scorer.clip={folder / 'blind'}"]),
        "latent": ("latent", []),
    }
    for name, (kind, settings) in own.items():
        settings += [f"output={folder / name}", f"data.cache={cache}"]
        settings += [f"model.path={MODEL}", f"data.train={PAIRS}", f"data.validation={VALIDATION}"]
        if not (folder / name / "scorer.json").exists():
            train_scorer(load_config(ROOT / "configs" / f"train_scorer_{kind}.yaml", settings, kind=ScorerConfig))


def as_lists(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for a caption: its images and their scores."""
    lists: dict[str, dict[str, Any]] = {}
    for row in rows:
        one = lists.setdefault(row["caption"], {"prompt": row["caption"], "images": [], "scores": []})
        for i in "01":
            one["images"].append(row[f"jpg_{i}"])
            one["scores"].append(row[f"score_{i}"])
    return list(lists.values())


def flipped(rows: list[dict[str, Any]], share: float, seed: int = 0) -> list[dict[str, Any]]:
    """The pairs with ``share`` of the oracle's own preferences turned round (the few flips of the data set undone)."""
    clear = [row for row in rows if row["label_0"] != 0.5]
    turned = set(np.random.default_rng(seed).permutation(len(clear))[: round(share * len(clear))].tolist())
    result = []
    for i, row in enumerate(clear):
        label = float((row["score_0"] > row["score_1"]) != (i in turned))
        result.append({**row, "label_0": label, "label_1": 1 - label})
    return result


def own_captions(row: dict[str, Any], seed: int) -> dict[str, Any]:
    """The prompt for the chosen image, the prompt with another colour, shape or relation for the rejected one."""
    from diffpo.shapes.scenes import COLOURS, SHAPES

    words = row["caption"].split()
    families = [list(COLOURS), list(SHAPES)]
    rng = np.random.default_rng(seed)
    at = [(i, family) for i, word in enumerate(words) for family in families if word in family]
    place, family = at[int(rng.integers(len(at)))]
    other = [word for word in family if word != words[place]]
    words[place] = other[int(rng.integers(len(other)))]
    perturbed = " ".join(words)
    chosen, rejected = ("jpg_0", "jpg_1") if row["label_0"] > 0.5 else ("jpg_1", "jpg_0")
    return {
        "chosen": row[chosen],
        "rejected": row[rejected],
        "caption_chosen": row["caption"],
        "caption_rejected": perturbed,
    }
