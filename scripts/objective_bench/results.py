"""The jobs' results: reading them, win rates over seeds, and what a win rate cost."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from . import store
from .job import cost

SEEDS = 3  # of a finished comparison
BAR = 0.60  # the fixed win rate whose cost is asked for


def read(label: str, root: Path = store.RESULTS) -> dict[str, list[dict[str, Any]]]:
    """Results of a regime (and model) by method, sorted by seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((root / label).glob("*.json")):
        result = store.read(path)
        found.setdefault(result["method"], []).append(result)
    return found


@dataclass(frozen=True)
class Earlier:
    """What was measured before results were kept one by one: pooled win rates and costs of three seeds (``rows``, by
    method), and the sentences about them (``reasons`` by method, ``claims`` by name)."""

    rows: dict[str, dict[str, Any]]
    reasons: dict[str, str]
    claims: dict[str, str]


def earlier(path: Path = store.EARLIER) -> Earlier:
    return Earlier(**json.loads(path.read_text()))


def pooled(runs: list[dict[str, Any]], score: str) -> tuple[float, float, float]:
    """Mean win rate of the seeds, the lowest lower end and the highest upper end of their intervals."""
    wins = np.array([run["curve"][-1][score]["win"] for run in runs])
    return float(wins[:, 0].mean()), float(wins[:, 1].min()), float(wins[:, 2].max())


def cell(runs: list[dict[str, Any]], score: str) -> str:
    mean, low, high = pooled(runs, score)
    return f"{mean:.1%} [{low:.1%}, {high:.1%}]"


def points(runs: list[dict[str, Any]], score: str, unit: str = "calls") -> list[tuple[float, float]]:
    """(calls or updates, mean win rate of the seeds) at every measurement, from 50 % at nothing."""
    found = [(0.0, 0.5)]
    for measured in zip(*(run["curve"] for run in runs), strict=False):
        calls = [cost(each["forward"], each["backward"]) for each in measured]
        spent = np.mean(calls if unit == "calls" else [each["step"] for each in measured])
        found.append((float(spent), float(np.mean([each[score]["win"][0] for each in measured]))))
    return found


def reached(runs: list[dict[str, Any]], bar: float = BAR, score: str = "total", unit: str = "calls") -> float | None:
    """Calls (or updates) at which the mean win rate first reaches ``bar``, between measurements by linear
    interpolation; None if it never does."""
    for (c0, w0), (c1, w1) in pairwise(points(runs, score, unit)):
        if w1 >= bar:
            return c1 if w1 == w0 else c0 + (c1 - c0) * max(0.0, bar - w0) / (w1 - w0)
    return None
