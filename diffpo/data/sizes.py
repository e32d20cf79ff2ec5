"""Aspect-ratio buckets: the sizes that images are trained at."""

from __future__ import annotations

import math
from functools import lru_cache

Size = tuple[int, int]  # width, height


@lru_cache
def sizes(resolution: int) -> list[Size]:
    """Sizes (width, height) of at most resolution^2 pixels with sides from resolution / 2 to 2 resolution, much as
    SDXL's (arXiv 2307.01952, appendix I). Sides are multiples of 64 px, or of 16 px (the width of a transformer's
    token) where resolution is below 512."""
    step = 64 if resolution >= 512 else 16 if resolution >= 64 else 8  # below 64 px: tests only
    found = {(resolution, resolution)}
    for long in range(resolution - resolution % step, 2 * resolution + 1, step):
        short = resolution**2 // long // step * step
        if long > resolution and 2 * short >= resolution:
            found |= {(long, short), (short, long)}
    return sorted(found)


@lru_cache(maxsize=4096)
def nearest(size: Size, resolution: int) -> Size:
    """The size of `sizes` with the nearest aspect ratio (by its logarithm); the largest if several are equally near."""
    aspect = math.log(size[0] / size[1])

    def distance(bucket: Size) -> tuple[float, int]:
        return round(abs(math.log(bucket[0] / bucket[1]) - aspect), 9), -bucket[0] * bucket[1]

    return min(sizes(resolution), key=distance)
