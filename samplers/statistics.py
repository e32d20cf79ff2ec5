"""Empirical model statistics, which DPM-Solver-v3 is built from: three coefficients per noise level, and their file.

They are estimated by `samplers.calibrate.estimate`.
"""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from . import _arrays
from ._names import unknown
from .prediction import PREDICTIONS

ARRAYS = {"lam": "F64", "l": "F32", "s": "F32", "b": "F32"}  # with their number formats in a file
# 2,600 noise levels of latents 4 x 128 x 128 take half of the largest size
LAYOUT = _arrays.Layout("statistics file", "samplers_statistics", ARRAYS, most_bytes=2**30)
HEADER = {"samples": int, "guidance": int | float, "prediction": str, "model": str}
FAR = 2.0  # of lambda outside the range of the statistics: e^2 = 7.4 times more or less noise


@dataclass(frozen=True, eq=False)
class Statistics:
    """The coefficients l, s, b of DPM-Solver-v3 (Zheng et al. 2023, arXiv 2310.13268) at M + 1 noise levels.

    With y = x / alpha and kappa = sigma / alpha, the solver integrates `f = kappa eps - l y`, which l makes insensitive
    to x, and expects `f' = s f + b`. Between the noise levels the three are linear in lambda, outside them constant.

    Attributes:
        lam: (M+1,) log(alpha / sigma), rising.
        l, s, b: (M+1, *shape). The shape is a sample's, or broadcasts over it: (C, 1, 1) is a number per channel.
        samples: how many x they were estimated from; 0 if unknown.
        guidance: the scale of classifier-free guidance of the model; 1 is none.
        prediction: what the network returned; the statistics are the same for every kind.
        model: the model's hash or name; empty if unknown.

    Raises:
        ValueError: shapes that do not agree, numbers that are not finite, lam that does not rise.
    """

    lam: np.ndarray
    l: np.ndarray
    s: np.ndarray
    b: np.ndarray
    samples: int = 0
    guidance: float = 1.0
    prediction: str = "epsilon"
    model: str = ""

    def __post_init__(self) -> None:
        for name in ARRAYS:
            array = np.array(getattr(self, name), np.float64)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
            if not np.isfinite(array).all():
                raise ValueError(f"statistics: {name} is not finite everywhere")
        if self.lam.ndim != 1 or len(self.lam) < 2 or not (np.diff(self.lam) > 0).all():
            raise ValueError("statistics: lam must rise over at least two noise levels")
        if not self.l.shape == self.s.shape == self.b.shape or self.l.shape[:1] != self.lam.shape:
            shapes = f"{self.l.shape}, {self.s.shape} and {self.b.shape}"
            raise ValueError(f"statistics: l, s and b have shapes {shapes}, but all need ({len(self.lam)}, *shape)")
        if self.prediction not in PREDICTIONS:
            raise unknown("prediction", self.prediction, PREDICTIONS)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the sample, or what broadcasts over it."""
        return self.l.shape[1:]

    def at(self, lam: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """l, s, b at noise levels: (points,) -> three of (points, *shape)."""
        i = np.clip(np.searchsorted(self.lam, lam) - 1, 0, len(self.lam) - 2)
        part = np.clip((lam - self.lam[i]) / (self.lam[i + 1] - self.lam[i]), 0.0, 1.0)
        part = part.reshape(-1, *[1] * len(self.shape))
        l, s, b = ((1.0 - part) * v[i] + part * v[i + 1] for v in (self.l, self.s, self.b))
        return l, s, b

    def check_range(self, lam: np.ndarray) -> None:
        """That noise levels lie within the range of the statistics, or near it.

        Raises:
            ValueError: one does not; infinite ones are left out.
        """
        inside = lam[np.isfinite(lam)]
        far = (inside < self.lam[0] - FAR) | (inside > self.lam[-1] + FAR)
        if far.any():
            low, high, given = np.exp(-self.lam[-1]), np.exp(-self.lam[0]), np.exp(-inside[far][0])
            raise ValueError(
                f"the statistics are of sigma / alpha from {low:.3g} to {high:.3g}, but the grid has {given:.3g}: "
                "they belong to another schedule, or need a wider range"
            )

    def save(self, path) -> None:
        """Write one safetensors file, l, s and b in float32. A file that is there is replaced once the new one is
        complete."""
        arrays = {
            name: np.asarray(getattr(self, name), "f8" if kind == "F64" else "f4") for name, kind in ARRAYS.items()
        }
        about = {"version": 1} | {name: getattr(self, name) for name in HEADER}
        _arrays.write(path, LAYOUT, arrays, json.dumps(about))

    @classmethod
    def load(cls, path) -> Statistics:
        """Read a file written by `save`.

        Raises:
            ValueError: the file is missing, truncated or something else. The message names it.
        """
        try:
            about, arrays = _arrays.read(path, LAYOUT)
            return cls(arrays["lam"], arrays["l"], arrays["s"], arrays["b"], **_checked(about))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r}: {str(error)[:500]}") from None

    @classmethod
    def read_published(cls, folder, lam_start: float, lam_end: float, **about) -> Statistics:
        """Read the layout of the authors' code: `l.npz` with l, `sb.npz` with s and b, on a uniform grid of lambda.

        Args:
            folder: with the two files. lam_start, lam_end: lambda at the noisy and the clean end; not in the files.
            about: the other fields of `Statistics`.

        Raises:
            ValueError: a file is missing, damaged, or has other arrays.
        """
        found: dict[str, np.ndarray] = {}
        for file, names in {"l.npz": ("l",), "sb.npz": ("s", "b")}.items():
            path = Path(folder) / file
            try:
                _arrays.require_file(path, LAYOUT.most_bytes)
                with zipfile.ZipFile(path) as parts:  # sizes before anything is unpacked
                    if sum(parts.getinfo(f"{name}.npy").file_size for name in names) > LAYOUT.most_bytes:
                        raise ValueError("its arrays are too large")
                with np.load(path, allow_pickle=False) as arrays:
                    found |= {name: arrays[name] for name in names}
            except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
                reason = getattr(error, "strerror", None) or str(error)[:300]
                raise ValueError(f"{os.fspath(path)!r}: {reason}; it needs the arrays {', '.join(names)}") from None
        lam = np.linspace(lam_start, lam_end, len(found["l"]))
        return cls(lam, found["l"], found["s"], found["b"], **about)

    def degenerated(self) -> Statistics:
        """l = 1, s = 0, b = 0 on the same noise levels: the data prediction of DPM-Solver++ ("degenerated" there)."""
        one, zero = np.ones((len(self.lam), *[1] * len(self.shape))), np.zeros((len(self.lam), *[1] * len(self.shape)))
        return replace(self, l=one, s=zero, b=zero)


def _checked(about: dict) -> dict:
    """The fields in a file's header.

    Raises:
        ValueError: it has other fields, or values of another kind.
    """
    if about.pop("version") != 1 or set(about) != set(HEADER):
        raise ValueError(f"the header of statistics must have version 1 and {', '.join(HEADER)}, nothing else")
    for name, kind in HEADER.items():
        if not isinstance(about[name], kind):
            raise ValueError(f"its header has {name} {str(about[name])[:100]!r}")
    return about
