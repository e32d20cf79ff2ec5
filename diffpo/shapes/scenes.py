"""Scenes, their captions, the train/held-out split, and the renderer.

A scene is either one to three equal objects (``"two red circles on a black background"``) or two different objects in
a relation (``"a red circle left of a blue square on a white background"``): 5,112 captions in all. The split is
compositional: the objects of ``HELD_OUT_OBJECTS`` (colour and shape) and one in ten pairs of objects do not occur in
training, but every colour, shape, relation, count and background does.
"""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass

import numpy as np

SIZE = 32  # width and height of a rendered image, in pixels
SUPERSAMPLING = 4

COLOURS = {
    "red": (220, 30, 40),
    "green": (30, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (245, 215, 40),
    "purple": (150, 50, 190),
    "cyan": (50, 205, 225),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "brown": (120, 75, 45),
}
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {"a": 1, "two": 2, "three": 3}

Kind = tuple[str, str]  # (colour, shape)
KINDS: tuple[Kind, ...] = tuple(itertools.product(COLOURS, SHAPES))
HELD_OUT_OBJECTS: frozenset[Kind] = frozenset({("yellow", "triangle"), ("blue", "circle")})


@dataclass(frozen=True)
class Scene:
    """The content of a caption. ``relation`` is that of ``objects[0]`` to ``objects[1]``; None for equal objects."""

    objects: tuple[Kind, ...]
    relation: str | None
    background: str

    @property
    def caption(self) -> str:
        if self.relation is not None:
            (c0, s0), (c1, s1) = self.objects
            return f"a {c0} {s0} {self.relation} a {c1} {s1} on a {self.background} background"
        colour, shape = self.objects[0]
        n = len(self.objects)
        word = {v: k for k, v in COUNTS.items()}[n]
        return f"{word} {colour} {shape}{'s' if n > 1 else ''} on a {self.background} background"

    @property
    def held_out(self) -> bool:
        """Whether this combination of objects is excluded from training."""
        if any(kind in HELD_OUT_OBJECTS for kind in self.objects):
            return True
        if self.relation is None:
            return False
        pair = "|".join(sorted(" ".join(kind) for kind in self.objects))
        return zlib.crc32(pair.encode()) % 10 == 0  # the same hash on every platform


def _all_scenes() -> list[Scene]:
    scenes = []
    for background in BACKGROUNDS:
        for kind in KINDS:
            scenes += [Scene((kind,) * n, None, background) for n in COUNTS.values()]
        for pair in itertools.permutations(KINDS, 2):
            scenes += [Scene(pair, relation, background) for relation in RELATIONS]
    return scenes


ALL_SCENES: tuple[Scene, ...] = tuple(_all_scenes())
_BY_CAPTION = {scene.caption: scene for scene in ALL_SCENES}


def parse(caption: str) -> Scene:
    """The scene of a caption of this world. ValueError for any other text."""
    try:
        return _BY_CAPTION[caption.strip()]
    except KeyError:
        raise ValueError(
            f"not a caption of the embedded world: {caption!r}; examples are "
            "'a red circle left of a blue square on a white background' and 'two cyan squares on a black background'"
        ) from None


def _weighted_order(scenes: list[Scene], seed: int) -> list[Scene]:
    """A fixed random order in which scenes of equal objects, which are few, come four times as early."""
    rng = np.random.default_rng(seed)
    weights = np.array([1.0 if scene.relation else 4.0 for scene in scenes])
    return [scenes[i] for i in np.argsort(-np.log(rng.random(len(scenes))) / weights)]


def train_captions(n: int | None = None, seed: int = 0) -> list[str]:
    """Up to ``n`` distinct captions of the training split, in an order fixed by ``seed``."""
    return [s.caption for s in _weighted_order([s for s in ALL_SCENES if not s.held_out], seed)][:n]


def heldout_captions(n: int | None = None, seed: int = 0) -> list[str]:
    """Up to ``n`` distinct captions of the held-out split, in an order fixed by ``seed``."""
    return [s.caption for s in _weighted_order([s for s in ALL_SCENES if s.held_out], seed)][:n]


_TRAIN_PAIRS = [s for s in ALL_SCENES if not s.held_out and s.relation]
_TRAIN_EQUAL = [s for s in ALL_SCENES if not s.held_out and not s.relation]


def sample_scene(rng: np.random.Generator) -> Scene:
    """A random scene of the training split: 70 % relational, 30 % one to three equal objects."""
    pool = _TRAIN_PAIRS if rng.random() < 0.7 else _TRAIN_EQUAL
    return pool[rng.integers(len(pool))]


def coverage(shape: str, cx: float, cy: float, radius: float, size: int = SIZE) -> np.ndarray:
    """Fraction of each pixel inside a shape, (size, size) float. ``radius`` is that of the circle of equal area, and
    (cx, cy) the centroid, in pixels; y points down."""
    n = size * SUPERSAMPLING
    at = (np.arange(n) + 0.5) / SUPERSAMPLING
    x, y = at[None, :] - cx, at[:, None] - cy
    if shape == "circle":
        inside = x * x + y * y <= radius * radius
    elif shape == "square":
        inside = np.maximum(np.abs(x), np.abs(y)) <= radius * np.sqrt(np.pi) / 2
    elif shape == "triangle":  # equilateral, point up; R = circumradius of the triangle with area pi radius^2
        R = radius * np.sqrt(4 * np.pi / (3 * np.sqrt(3)))
        inside = (y <= R / 2) & (np.sqrt(3) * np.abs(x) - y <= R)
    else:
        raise ValueError(f"unknown shape {shape!r}")
    return inside.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING).mean(axis=(1, 3))


def _place(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centre and radius of every object. Objects do not overlap or leave the image, and relations are unambiguous."""
    n = len(scene.objects)
    while True:
        radii = rng.uniform(4.6, 6.2, n) if n < 3 else rng.uniform(4.0, 5.0, n)
        reach = radii * 1.56  # the circumradius of a triangle, the largest distance of any shape from its centroid
        xs, ys = rng.uniform(reach, SIZE - reach), rng.uniform(reach, SIZE - reach)
        gaps = [
            np.hypot(xs[i] - xs[j], ys[i] - ys[j]) - 1.25 * (radii[i] + radii[j]) - 2
            for i, j in itertools.combinations(range(n), 2)
        ]
        if any(g < 0 for g in gaps):
            continue
        if scene.relation is not None:
            dx, dy = xs[1] - xs[0], ys[1] - ys[0]
            along, across = {
                "left of": (dx, dy),
                "right of": (-dx, dy),
                "above": (dy, dx),
                "below": (-dy, dx),
            }[scene.relation]
            if along < 10 or abs(across) > 0.6 * along:
                continue
        return list(zip(xs, ys, radii, strict=True))


def draw(shapes: list[tuple[str, str, float, float, float]], background: str) -> np.ndarray:
    """An image of (colour, shape, cx, cy, radius) on a background: (SIZE, SIZE, 3) float in 0..255."""
    image = np.broadcast_to(np.array(BACKGROUNDS[background], float), (SIZE, SIZE, 3)).copy()
    for colour, shape, cx, cy, radius in shapes:
        a = coverage(shape, cx, cy, radius)[..., None]
        image = image * (1 - a) + np.array(COLOURS[colour], float) * a
    return image


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A random image of a scene: (SIZE, SIZE, 3) uint8, antialiased."""
    places = _place(scene, rng)
    objects = [(*kind, *place) for kind, place in zip(scene.objects, places, strict=True)]
    return np.clip(np.rint(draw(objects, scene.background)), 0, 255).astype(np.uint8)
