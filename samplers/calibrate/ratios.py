"""DC-Solver's ratios for numbers of calls and guidance scales that were not searched (arXiv 2409.03755, sec. 3.4).

Cascade polynomial regression is a cubic in step / calls, whose coefficients are quadratic in the guidance scale, whose
coefficients are quadratic in the number of calls: 36 products of powers. The released coefficients are of the powers
themselves and reach 1e4, since powers on a short range are almost parallel. Here the same polynomials are written in
Legendre's basis on the fitted ranges, and small coefficients are preferred.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.polynomial import legendre

DEGREES = (3, 2, 2)  # in step / calls, guidance, calls
RIDGE = 1e-3


class DCRatios(NamedTuple):
    """Ratios that a search found: (calls,) for one guidance scale. The first `dc_order` of them are 1 and not used."""

    guidance: float
    ratios: np.ndarray
    dc_order: int = 2


@dataclass(frozen=True, eq=False)
class RatioSurface:
    """The ratios as a polynomial in step / calls, guidance and calls.

    Attributes:
        coefficients: (4, 3, 3) or fewer, of Legendre polynomials in the three inputs.
        guidance, calls: the fitted ranges, which map to [-1, 1]. Outside, the value at the nearest end is used.
        condition: of the linear system that was solved.
        dc_order: the first ratios, so many, are 1.
    """

    coefficients: np.ndarray
    guidance: tuple[float, float]
    calls: tuple[float, float]
    condition: float
    dc_order: int = 2

    def ratios(self, calls: int, guidance: float) -> np.ndarray:
        """(calls,) ratios for `dc_solver`."""
        basis = self._basis(np.arange(1, calls + 1) / calls, guidance, calls)
        ratios = 1.0 + basis @ self.coefficients.ravel()
        ratios[: self.dc_order] = 1.0
        return ratios

    def _basis(self, progress: np.ndarray, guidance: float, calls: int) -> np.ndarray:
        degrees = [n - 1 for n in self.coefficients.shape]
        scaled = [2.0 * progress - 1.0, _scaled(guidance, self.guidance), _scaled(calls, self.calls)]
        a, b, c = (legendre.legvander(v, d) for v, d in zip(scaled, degrees, strict=True))
        return np.einsum("ni,j,k->nijk", a, b[0], c[0]).reshape(len(progress), -1)


def fit_surface(found: Sequence[DCRatios], ridge: float = RIDGE) -> RatioSurface:
    """The surface through searched ratios, by ridge regression towards ratio 1.

    The degrees are those of the paper, or one less than the number of different values where that is lower.

    Args:
        ridge: weight of the squared coefficients beside the mean squared gap.

    Raises:
        ValueError: nothing to fit.
    """
    found = [each for each in found if len(each.ratios) > each.dc_order]
    if not found:
        raise ValueError("no searched ratios to fit: pass searches with more calls than dc_order")
    if len({each.dc_order for each in found}) > 1:
        raise ValueError("the searched ratios are of different dc_order: fit a surface to each")
    guidances, numbers = ({float(v) for v in c} for c in ([e.guidance for e in found], [len(e.ratios) for e in found]))
    dc_order, longest = found[0].dc_order, int(max(numbers))
    degrees = [min(d, n - 1) for d, n in zip(DEGREES, (longest - dc_order, len(guidances), len(numbers)), strict=True)]
    shape = tuple(d + 1 for d in degrees)
    ranges = (min(guidances), max(guidances)), (min(numbers), max(numbers))
    empty = RatioSurface(np.zeros(shape), *ranges, 1.0, dc_order)
    rows, values = [], []
    for each in found:
        steps = np.arange(dc_order + 1, len(each.ratios) + 1)
        rows.append(empty._basis(steps / len(each.ratios), each.guidance, len(each.ratios)))
        values.append(np.asarray(each.ratios, np.float64)[dc_order:] - 1.0)
    matrix, gaps = np.concatenate(rows), np.concatenate(values)
    matrix = np.concatenate([matrix / np.sqrt(len(gaps)), np.sqrt(ridge) * np.eye(matrix.shape[1])])
    right = np.append(gaps / np.sqrt(len(gaps)), np.zeros(matrix.shape[1]))
    coefficients = np.linalg.lstsq(matrix, right, rcond=None)[0]
    return RatioSurface(coefficients.reshape(shape), *ranges, float(np.linalg.cond(matrix)), dc_order)


def published_ratios(coefficients: np.ndarray, calls: int, guidance: float) -> np.ndarray:
    """The ratios of coefficients (36,) in the authors' layout: powers of step / calls, guidance / 12, calls / 50."""
    a = np.asarray(coefficients, np.float64).reshape(4, 3, 3)
    n, c, x = calls / 50, guidance / 12, np.arange(1, calls + 1) / calls
    of_guidance = a @ [n**2, n, 1.0]
    ratios = np.polynomial.polynomial.polyval(x, of_guidance @ [c**2, c, 1.0])
    ratios[:2] = 1.0
    return ratios


def _scaled(value: float, ends: tuple[float, float]) -> np.ndarray:
    low, high = ends
    return np.array([0.0 if low == high else np.clip((2.0 * value - low - high) / (high - low), -1.0, 1.0)])
