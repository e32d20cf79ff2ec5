"""The traits of all arms' pictures, whatever they show: signals, diversity, and the distance to the first arm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from ..common.errors import DiffpoError
from . import signals
from .items import Item
from .manifest import open_image

BATCH = 32
Embed = Callable[[list[Image.Image]], np.ndarray]  # n pictures -> (n, d)


@dataclass(frozen=True)
class Traits:
    """Numbers of n items by arm, as `measured.Measured` takes them; NaN where an arm has no picture that can be read.

    Attributes:
        signals: by name and arm, (n,).
        distance: of each arm but the first, (n,).
        diversity: of each arm, (prompts,).
        features: what ``distance`` and ``diversity`` are measured in.
    """

    signals: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    distance: dict[str, np.ndarray] = field(default_factory=dict)
    diversity: dict[str, np.ndarray] = field(default_factory=dict)
    features: str = "pixels"


def measure(items: Sequence[Item], arms: Sequence[str], embed: Embed | None = None, name: str = "pixels") -> Traits:
    """Open every picture once. ``embed``: gives the features, which are called ``name``; None: small pictures."""
    from tqdm.auto import tqdm

    found = Traits({each: {} for each in signals.SIGNALS}, {}, {}, name)
    prompts = np.array([item.index for item in items])
    first: np.ndarray | None = None
    with tqdm(total=sum(len(item.pictures) for item in items), desc="comparing pictures", unit="image", delay=1) as bar:
        for arm in arms:
            features, there = _read(items, arm, embed or signals.features, found, bar.update)
            whole = np.full((len(items), features.shape[1] if len(features) else 0), np.nan, np.float32)
            whole[there] = features
            found.diversity[arm] = _by_prompt(features, prompts, there)
            if first is None:
                first = whole
            elif whole.shape == first.shape:
                found.distance[arm] = signals.distance(whole, first)
    return found


def _read(
    items: Sequence[Item], arm: str, embed: Embed, found: Traits, step: Callable[[int], object]
) -> tuple[np.ndarray, np.ndarray]:
    """The features of an arm's pictures and the items (their numbers) that have them; fills in the signals."""
    numbers = {name: np.full(len(items), np.nan) for name in signals.SIGNALS}
    own = [k for k, item in enumerate(items) if arm in item.pictures]
    parts, there = [], []
    for start in range(0, len(own), BATCH):
        batch, images = own[start : start + BATCH], []
        for k in batch:
            try:
                images.append(open_image(items[k].pictures[arm]))
                there.append(k)
            except DiffpoError:  # the scorers counted it
                continue
        if images:
            for name, values in signals.signals(images).items():
                numbers[name][there[-len(images) :]] = values
            parts.append(np.asarray(embed(images), np.float32))
        step(len(batch))
    for name, values in numbers.items():
        found.signals[name][arm] = values
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32), np.array(there, int)


def _by_prompt(features: np.ndarray, prompts: np.ndarray, there: np.ndarray) -> np.ndarray:
    """`signals.diversity` at the place of each prompt of all items; NaN for prompts without a picture."""
    names = np.unique(prompts)
    values = np.full(len(names), np.nan)
    if len(there):
        values[np.searchsorted(names, np.unique(prompts[there]))] = signals.diversity(features, prompts[there])
    return values
