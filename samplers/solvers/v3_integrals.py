"""The integrals of DPM-Solver-v3 over a step, from statistics that are given at noise levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..statistics import Statistics

WIDEST = 0.5  # part of lambda that is integrated by one rule
AT_ONCE = 2**22  # numbers in an array


@dataclass
class Integrals:
    """Over a step s -> t in lambda, L and S counted from s; each of the statistics' shape.

    Attributes:
        l, s: int l, int s. beta: int e^{-S} b.
        moments: entry k is int e^{L - L_t + S} (lambda - lambda_s)^k / k!.
        source: int e^{L - L_t + S} B, with B = int_s e^{-S} b.
    """

    l: np.ndarray
    s: np.ndarray
    beta: np.ndarray
    moments: list[np.ndarray]
    source: np.ndarray


Between = Callable[[float, float, int], Integrals]  # lambda_s, lambda_t, number of moments


def exact(statistics: Statistics) -> Between:
    """Gauss-Legendre sums between the noise levels of the statistics: exact to rounding."""
    x, w = np.polynomial.legendre.leggauss(6)
    nodes, w = (x + 1) / 2, w / 2
    powers = np.arange(1, 7)
    inner = (nodes[:, None] ** powers / powers) @ np.linalg.inv(np.vander(nodes, increasing=True))  # from 0 to a node

    def between(start: float, end: float, count: int) -> Integrals:
        knots = statistics.lam[(statistics.lam > min(start, end)) & (statistics.lam < max(start, end))]
        even = np.linspace(start, end, max(2, math.ceil(abs(end - start) / WIDEST) + 1))
        edges = np.unique([*knots, *even]) if start != end else even
        edges = edges if end >= start else edges[::-1]
        width = np.diff(edges)
        lam = (edges[:-1, None] + width[:, None] * nodes).ravel()

        def total(v: np.ndarray) -> np.ndarray:
            return np.tensordot((width[:, None] * w).ravel(), v, 1)

        def running(v: np.ndarray) -> np.ndarray:
            parts = v.reshape(len(width), 6, -1) * width[:, None, None]
            sums = np.einsum("q,pqn->pn", w, parts)
            return (np.einsum("rq,pqn->prn", inner, parts) + (np.cumsum(sums, 0) - sums)[:, None]).reshape(v.shape)

        return _in_parts(statistics, lam, start, count, running, total)

    return between


def trapezoid(statistics: Statistics, at: Sequence[int]) -> Between:
    """The authors' trapezoidal sums over the noise levels; steps must go between the levels `at`."""
    levels = statistics.lam

    def between(start: float, end: float, count: int) -> Integrals:
        first, last = (min(at, key=lambda j: abs(levels[j] - edge)) for edge in (start, end))
        turn = 1 if last >= first else -1
        lam = levels[np.arange(first, last + turn, turn)]

        def running(v: np.ndarray) -> np.ndarray:
            parts = (v[1:] + v[:-1]) / 2 * np.diff(lam).reshape(-1, *[1] * (v.ndim - 1))
            return np.concatenate([np.zeros_like(v[:1]), np.cumsum(parts, 0)])

        return _in_parts(statistics, lam, lam[0], count, running, lambda v: running(v)[-1])

    return between


def _in_parts(statistics: Statistics, lam: np.ndarray, start: float, count: int, running, total) -> Integrals:
    """The integrals of all elements of the sample, so many at a time that memory stays small."""
    size = math.prod(statistics.shape)
    columns = max(1, AT_ONCE // len(lam))
    flat = [v.reshape(len(v), size) for v in (statistics.l, statistics.s, statistics.b)]
    parts = []
    for first in range(0, size, columns):
        l, s, b = (v[:, first : first + columns] for v in flat)
        some = Statistics(statistics.lam, l, s, b)
        l, s, b = some.at(lam)
        whole, big_l, big_s = total(l), running(l), running(s)
        inner = np.exp(-big_s) * b
        weight = np.exp(big_l - whole + big_s)
        offset = (lam - start)[:, None]
        moments = [total(weight * offset**k / math.factorial(k)) for k in range(count)]
        parts.append([whole, total(s), total(inner), total(weight * running(inner)), *moments])
    l, s, beta, source, *moments = (np.concatenate(each).reshape(statistics.shape) for each in zip(*parts, strict=True))
    return Integrals(l, s, beta, moments, source)
