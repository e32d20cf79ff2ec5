"""The oracle recognises the scene in an image of the embedded world and scores it against a caption.

It reports two scores:

- ``following``: does the image show what the caption describes? The mean over the attributes (background, count,
  colour, shape and, for relational captions, relation), each in 0..1. An attribute is *right* if the most likely
  alternative is the one in the caption; ``all_right`` is 1 if every attribute is right.
- ``appearance``: are the shapes crisp and solid, without stray blobs? ``exp(-rmse / 12)``, where rmse (in 0..255
  levels) is the distance between the image and an ideal drawing of the objects that the oracle recognises in it. It
  does not depend on the caption.

``total = FOLLOWING_WEIGHT * following + (1 - FOLLOWING_WEIGHT) * appearance`` is the preference used for labels.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from ..common.images import rgb
from . import scenes
from .scenes import BACKGROUNDS, COLOURS, SHAPES, SIZE, Scene

ATTRIBUTES = ("background", "count", "colour", "shape", "relation")
FOLLOWING_WEIGHT = 0.5
APPEARANCE_SCALE = 12.0

_COLOUR_NAMES = tuple(COLOURS)
_PALETTE = np.array(list(COLOURS.values()), float)
_BACKGROUND_NAMES = tuple(BACKGROUNDS)
_BACKGROUND_PALETTE = np.array(list(BACKGROUNDS.values()), float)
_CORE_DISTANCE = 70.0  # of a core pixel from its palette colour, at most; two colours are more than 100 apart
_MIN_CORE = 9  # core pixels; a smaller blob is a speck, not an object
_MAX_OBJECTS = 6  # the largest objects that are recognised, so that the matching below stays small


@dataclass(frozen=True)
class Seen:
    """A recognised object: probabilities of the palette's colours and of the shapes; centroid and radius in pixels."""

    colour_p: np.ndarray
    shape_p: np.ndarray
    cx: float
    cy: float
    radius: float

    @property
    def colour(self) -> str:
        return _COLOUR_NAMES[int(self.colour_p.argmax())]

    @property
    def shape(self) -> str:
        return SHAPES[int(self.shape_p.argmax())]


@dataclass(frozen=True)
class Reading:
    background_p: np.ndarray
    objects: tuple[Seen, ...]
    rmse: float  # from an ideal drawing of the recognised objects, in 0..255 levels

    @property
    def background(self) -> str:
        return _BACKGROUND_NAMES[int(self.background_p.argmax())]

    @property
    def appearance(self) -> float:
        return float(np.exp(-self.rmse / APPEARANCE_SCALE))


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def _as_array(image) -> np.ndarray:
    if isinstance(image, Image.Image):
        image = rgb(image)
        if image.size != (SIZE, SIZE):
            image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
        image = np.asarray(image)
    image = np.asarray(image, float)
    if image.shape != (SIZE, SIZE, 3):
        raise ValueError(f"the oracle needs images of shape ({SIZE}, {SIZE}, 3) in 0..255, not {image.shape}")
    return image


def _see(window: np.ndarray, pixels: np.ndarray, core: np.ndarray) -> Seen | None:
    """Recognise an object from its soft coverage ``window`` (SIZE, SIZE); None if it is too small."""
    area = window.sum()
    if area < _MIN_CORE:
        return None
    at = np.arange(SIZE) + 0.5
    cx, cy = (window.sum(0) @ at) / area, (window.sum(1) @ at) / area
    radius = float(np.sqrt(area / np.pi))
    # intersection over union of soft coverages, for a template of the same area and centroid
    ious = []
    for shape in SHAPES:
        template = scenes.coverage(shape, cx, cy, radius)
        ious.append(np.minimum(window, template).sum() / np.maximum(window, template).sum())
    shape_p = _softmax(np.array(ious) / 0.03)
    mean = pixels[core].mean(0)
    colour_p = _softmax(-np.linalg.norm(_PALETTE - mean, axis=1) / 12.0)
    return Seen(colour_p, shape_p, float(cx), float(cy), radius)


def read(image) -> Reading:
    """Recognise the scene of a PIL image or a (SIZE, SIZE, 3) array in 0..255. A larger PIL image is first reduced by
    averaging."""
    pixels = _as_array(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    to_background = np.linalg.norm(border[:, None] - _BACKGROUND_PALETTE, axis=2)
    background_p = _softmax(-np.median(to_background, axis=0) / 12.0)
    background = _BACKGROUND_PALETTE[background_p.argmax()]

    candidates = np.concatenate([_PALETTE, background[None]])
    distance = np.linalg.norm(pixels[:, :, None] - candidates, axis=3)
    nearest = distance.argmin(2)
    core = (nearest < len(_PALETTE)) & (distance.min(2) < _CORE_DISTANCE)
    labels = np.zeros((SIZE, SIZE), int)
    colours: list[int] = []
    for c in range(len(_PALETTE)):
        found, n = ndimage.label(core & (nearest == c))
        for k in range(1, n + 1):
            blob = found == k
            # a one-pixel rim of blended edge colours has no interior
            if blob.sum() >= _MIN_CORE and ndimage.binary_erosion(blob).any():
                colours.append(c)
                labels[blob] = len(colours)
    biggest = sorted(range(1, len(colours) + 1), key=lambda k: -(labels == k).sum())[:_MAX_OBJECTS]

    # a pixel within 2 px of a core counts, by its coverage, for the nearest core
    seen = []
    if biggest:
        away = np.stack([ndimage.distance_transform_edt(labels != k) for k in biggest])
        owner = away.argmin(0)
        for i, k in enumerate(biggest):
            span = _PALETTE[colours[k - 1]] - background
            covered = np.clip((pixels - background) @ span / (span @ span), 0, 1)
            window = np.where((owner == i) & (away[i] <= 2.0), covered, 0.0)
            if (one := _see(window, pixels, labels == k)) is not None:
                seen.append(one)
    ideal = scenes.draw(
        [(s.colour, s.shape, s.cx, s.cy, s.radius) for s in seen], _BACKGROUND_NAMES[background_p.argmax()]
    )
    return Reading(background_p, tuple(seen), float(np.sqrt(np.mean((pixels - ideal) ** 2))))


def _match(objects: tuple[Seen, ...], wanted: tuple[tuple[str, str], ...]) -> list[Seen | None]:
    """The recognised object for each wanted one, with the largest total probability; None for missing objects."""
    value = np.zeros((len(wanted), max(len(objects), len(wanted))))
    for i, (colour, shape) in enumerate(wanted):
        for j, one in enumerate(objects):
            # colour counts more than shape, as for a person; with 0.1 any object is better than none
            value[i, j] = 0.1 + one.colour_p[_COLOUR_NAMES.index(colour)] + 0.5 * one.shape_p[SHAPES.index(shape)]
    orders = itertools.permutations(range(value.shape[1]), len(wanted))
    best = max(orders, key=lambda order: sum(value[i, j] for i, j in enumerate(order)))
    return [objects[j] if j < len(objects) else None for j in best]


def _relation(a: Seen | None, b: Seen | None, relation: str) -> float:
    if a is None or b is None:
        return 0.0
    dx, dy = b.cx - a.cx, b.cy - a.cy
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    # 0.5 on the diagonal, where two relations hold equally
    return float(1 / (1 + np.exp(np.clip(-(along - abs(across)) / 1.0, -50, 50))))


def score(image, caption: str | Scene) -> dict[str, float]:
    """Score an image against a caption of this world.

    Returns ``total``, ``following``, ``appearance`` and ``all_right``, the attributes of ``ATTRIBUTES`` in 0..1
    (``relation`` is NaN if the caption has none) and ``right_<attribute>`` as 0 or 1. ValueError for other captions.
    """
    scene = scenes.parse(caption) if isinstance(caption, str) else caption
    reading = read(image)
    matched = _match(reading.objects, scene.objects)
    n, wanted = len(reading.objects), len(scene.objects)

    def mean(values) -> float:
        return float(np.mean(list(values)))

    soft = {
        "background": float(reading.background_p[_BACKGROUND_NAMES.index(scene.background)]),
        "count": 1 - abs(n - wanted) / max(n, wanted),
        "colour": mean(
            0.0 if m is None else m.colour_p[_COLOUR_NAMES.index(k[0])]
            for m, k in zip(matched, scene.objects, strict=True)
        ),
        "shape": mean(
            0.0 if m is None else m.shape_p[SHAPES.index(k[1])] for m, k in zip(matched, scene.objects, strict=True)
        ),
    }
    right = {
        "background": reading.background == scene.background,
        "count": n == wanted,
        "colour": all(m is not None and m.colour == k[0] for m, k in zip(matched, scene.objects, strict=True)),
        "shape": all(m is not None and m.shape == k[1] for m, k in zip(matched, scene.objects, strict=True)),
    }
    if scene.relation is not None:
        soft["relation"] = _relation(matched[0], matched[1], scene.relation)
        right["relation"] = soft["relation"] > 0.5
    following = mean(soft.values())
    return {
        "total": FOLLOWING_WEIGHT * following + (1 - FOLLOWING_WEIGHT) * reading.appearance,
        "following": following,
        "appearance": reading.appearance,
        "all_right": float(all(right.values())),
        **{a: soft.get(a, float("nan")) for a in ATTRIBUTES},
        **{f"right_{a}": float(right[a]) if a in right else float("nan") for a in ATTRIBUTES},
    }
