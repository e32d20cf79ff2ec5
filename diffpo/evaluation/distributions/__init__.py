"""Distances between two sets of pictures, by their features: FID, KID, CMMD, precision and recall.

`compare` works on arrays of features, `run` on folders and files. One file per kind of distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...common.errors import DiffpoError
from ...common.images import named
from ..manifest import json_bytes, save
from ..statistics import Estimate
from . import features as embedding
from . import frechet, manifold, mmd
from .frechet import Gaussian

CACHE = Path("~/.cache/diffpo/features")


@dataclass(frozen=True)
class Distances:
    """How far a set of pictures is from a reference set.

    Attributes:
        features: the name of the features; numbers of different features cannot be compared.
        pictures, reference: how many there are; reference is None for a statistics file.
        dimensions: of a feature vector.
        numbers: fid, kid, cmmd (of CLIP features only), precision, recall, density and coverage, each with its 95 %
            interval. A statistics file gives fid alone.
        fid_limit: fid extrapolated to infinitely many pictures (`frechet.extrapolated`).
        notes: sentences on what to mind.
    """

    features: str
    pictures: int
    reference: int | None
    dimensions: int
    numbers: dict[str, Estimate]
    fid_limit: float
    notes: tuple[str, ...] = field(default=())

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each number, for `pandas.DataFrame`."""
        about = {"features": self.features, "pictures": self.pictures, "reference": self.reference}
        return [about | {"distance": name} | asdict(estimate) for name, estimate in self.numbers.items()]


def compare(x, y, name: str = "features", groups=None, reference_groups=None) -> Distances:
    """All distances of features ``x`` (n, d) to ``y``: (m, d), or a `Gaussian` for FID alone.

    ``groups``, ``reference_groups``: (n,), (m,), equal for pictures of one prompt, which are not independent. ``name``:
    of the features; those of CLIP (clip, shapes) get CMMD too. DiffpoError for fewer than two pictures, different
    features, or numbers that are not finite.
    """
    both = (groups, reference_groups)
    numbers = {"fid": frechet.fid(x, y, *both)}
    if not isinstance(y, Gaussian):
        numbers["kid"] = mmd.kid(x, y, *both)
        if name.partition("=")[0] in ("clip", "shapes"):
            numbers["cmmd"] = mmd.cmmd(x, y, *both)
        numbers |= manifold.precision_recall(x, y, *both) | manifold.density_coverage(x, y, *both)
    size, width = np.shape(x)
    reference = None if isinstance(y, Gaussian) else len(y)
    limit = frechet.extrapolated(x, y, *both)
    notes = _notes(numbers["fid"], limit, size if reference is None else min(size, reference), width)
    return Distances(name, size, reference, width, numbers, limit, notes)


def _notes(fid: Estimate, limit: float, least: int, width: int) -> tuple[str, ...]:
    """``least``: the number of pictures of the smaller set."""
    found = []
    if least <= width:
        found.append(
            f"{least} pictures are too few for FID with {width} features: the covariance is singular, and FID is far "
            "above that of more pictures. Compare by KID, or make more pictures."
        )
    if fid.value - limit > fid.value - fid.low:
        found.append(
            f"FID depends on the number of pictures: extrapolated to infinitely many it is about {limit:.3g} instead "
            f"of {fid.value:.3g}. Compare only FIDs of equal numbers of pictures."
        )
    return tuple(found)


def run(
    source: str | Path,
    reference: str | Path,
    features: Sequence[str],
    out: str | Path | None = None,
    cache: str | Path = CACHE,
    device: str | None = None,
) -> list[Distances]:
    """The distances of the pictures in ``source`` to those in ``reference``, one result for each of ``features``.

    ``source``, ``reference``: see `features.find`; the reference may be a statistics file (.npz). ``features``: see
    `diffpo.scorers.features.load`. ``out``: a JSON file to write. Features are kept in ``cache``. Unreadable pictures
    are counted and left out. DiffpoError as for `compare`, and if a source or the features cannot be read.
    """
    from ... import scorers
    from ...scorers import features as kinds

    if not features:
        raise DiffpoError("no features named; for example --features inception")
    if any(each.partition("=")[0] == "lpips" for each in features):
        raise DiffpoError("lpips compares two pictures, not two sets: use inception, clip or dinov2 here")
    mine = embedding.find(source)
    fixed = Gaussian.read(reference) if str(reference).endswith(".npz") else None
    other = None if fixed else embedding.find(reference)
    found = []
    for spec in features:
        loaded = kinds.load(spec, device or scorers.default_device(spec))
        one = embedding.embed(mine, loaded, Path(cache))
        two = embedding.embed(other, loaded, Path(cache)) if other else None
        for part, each in ((mine, one), (other, two)):
            if part and each and each.bad and spec == features[0]:
                first = named([f"{file} ({reason})" for file, reason in each.bad.items()])
                print(f"{part.name}: {len(each.bad)} pictures cannot be read and are left out: {first}")
        vectors = np.concatenate(one.vectors)
        if two is None:
            found.append(compare(vectors, fixed, loaded.name, one.groups))
        else:
            found.append(compare(vectors, np.concatenate(two.vectors), loaded.name, one.groups, two.groups))
    if out is not None:
        about = {"pictures": mine.name, "reference": other.name if other else str(reference)}
        save(Path(out), json_bytes(about | {"distances": [asdict(each) for each in found]}, indent=1) + b"\n")
    return found
