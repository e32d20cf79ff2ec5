"""What pictures look like whatever they show: sharpness, saturation, contrast, clipping; and how far apart they are.

No number here says that a picture is good. They show what a scorer that is being gamed does not see: pictures that turn
garish, over-sharpened or all alike, or that leave the base model's behind.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

LUMA = np.array([0.299, 0.587, 0.114])  # of R, G, B (ITU-R BT.601)
SIDE = 256  # pixels of the shorter side that larger pictures are shrunk to, so that resolutions can be compared
CLIPPED = 2 / 255  # this near to 0 or 1 a channel has lost its detail

SIGNALS = ("sharpness", "saturation", "contrast", "clipping")


def signals(images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
    """`SIGNALS` of n PIL pictures, each (n,) float64. Pictures are shrunk to `SIDE` first, never enlarged.

    sharpness: standard deviation of the Laplacian of luma (Pech-Pacheco et al. 2000, ICPR, take its square), for luma
    in 0..1. saturation: mean of max - min over R, G, B (the chroma of HSV), in 0..1. contrast: standard deviation of
    luma. clipping: share of values within `CLIPPED` of black or of full.
    """
    rows = [_signals(_shrunk(image)) for image in images]
    return {name: np.array([row[k] for row in rows], float) for k, name in enumerate(SIGNALS)}


def _shrunk(image: Image.Image, side: int = SIDE) -> np.ndarray:
    """(H, W, 3) in 0..1."""
    image = image.convert("RGB")
    if (shorter := min(image.size)) > side:
        image = image.resize([max(1, round(length * side / shorter)) for length in image.size], Image.Resampling.BOX)
    return np.asarray(image, float) / 255


def _signals(pixels: np.ndarray) -> tuple[float, float, float, float]:
    luma = pixels @ LUMA
    padded = np.pad(luma, 1, mode="edge")
    laplacian = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:] - 4 * luma
    clipped = (pixels <= CLIPPED) | (pixels >= 1 - CLIPPED)
    chroma = pixels.max(2) - pixels.min(2)
    return float(laplacian.std()), float(chroma.mean()), float(luma.std()), float(clipped.mean())


def features(images: Sequence[Image.Image], side: int = 64) -> np.ndarray:
    """Pixels as features (n, side * side * 3), where no network gives better ones: the euclidean distance of two rows
    is the root-mean-square distance of the pictures, in 0..1. All are resized to ``side`` x ``side``."""
    small = [image.convert("RGB").resize((side, side), Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(each, float).ravel() for each in small]) / 255 / np.sqrt(3 * side * side)


def distance(features: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n,): the euclidean distance of each row of ``features`` (n, d) to the same row of ``others``."""
    return np.linalg.norm(np.asarray(features, float) - np.asarray(others, float), axis=1)


def diversity(features: np.ndarray, prompt_id) -> np.ndarray:
    """How different the pictures are, one number for each prompt: (prompts,), prompts in ascending order.

    ``features`` (n, d) of n pictures. With several seeds: the mean distance between the pictures of the prompt, NaN for
    a prompt with a single one. With one seed everywhere: the prompt's jackknife pseudo-value of the mean distance over
    all pairs of prompts. The mean of these is that mean distance, and their spread gives its standard error although
    every picture is in many pairs (Arvesen 1969, Ann. Math. Stat. 40, 2076-2100).
    """
    prompt_id, features = np.asarray(prompt_id), np.asarray(features, float)
    names, prompt, counts = np.unique(prompt_id, return_inverse=True, return_counts=True)
    if counts.max(initial=0) > 1:
        return np.array([_mean_distance(features[prompt == k]) for k in range(len(names))])
    if (n := len(features)) < 3:
        return np.full(n, np.nan)
    each = _distances(features)[np.argsort(prompt)].sum(1)
    total = each.sum() / 2
    without = (total - each) / ((n - 1) * (n - 2) / 2)
    return n * total / (n * (n - 1) / 2) - (n - 1) * without


def _mean_distance(features: np.ndarray) -> float:
    n = len(features)
    return float(_distances(features).sum() / (n * (n - 1))) if n > 1 else float("nan")


def _distances(features: np.ndarray) -> np.ndarray:
    """(n, n) euclidean distances."""
    squares = (features**2).sum(1)
    squared = np.maximum(squares[:, None] + squares[None] - 2 * features @ features.T, 0)
    np.fill_diagonal(squared, 0)
    return np.sqrt(squared)
