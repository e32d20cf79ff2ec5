"""Tables of what is cached. Nothing is measured here.

The ratio of a method is that of its RMS error to the best uncalibrated method's, which was chosen on `select`. In
hindsight another one may be best on the held-out prompts; the table has that ratio too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from diffpo.common.tables import Table
from samplers.calibrate import ratio

from .cells import best
from .methods import RULE
from .store import read_arrays, read_entries


@dataclass(eq=False)
class Results:
    """A measured cell, from its folder `cell-CALLS`; at most the first `prompts` held-out ones."""

    path: Path
    prompts: int

    @cached_property
    def about(self) -> dict:
        return read_entries(self.path)

    @cached_property
    def rows(self) -> dict[str, dict[str, np.ndarray]]:
        """{family or method: arrays per held-out sample}, cut to the samples that all have."""
        chosen = {**self.about["uncalibrated"], **self.about["calibrated"]}
        found = {name: read_arrays(self._file(one["key"])) for name, one in chosen.items() if "key" in one}
        found = {name: arrays for name, arrays in found.items() if "squares" in arrays}
        n = min([self.prompts, *(len(arrays["squares"]) for arrays in found.values())])
        return {name: {key: x[:n] for key, x in arrays.items()} for name, arrays in found.items()}

    def _file(self, key: str) -> Path:
        return self.path.parent / "results" / f"heldout-{self.about['calls']}-{key}.npz"

    @property
    def n(self) -> int:
        return min((len(arrays["squares"]) for arrays in self.rows.values()), default=0)

    def errors(self, name: str) -> np.ndarray:
        """(n,) RMSE of each sample."""
        return np.sqrt(self.rows[name]["squares"])

    def rmse(self, name: str) -> float:
        return float(np.sqrt(self.rows[name]["squares"].mean()))

    @property
    def rival(self) -> str | None:
        """The uncalibrated family that is best on `select`."""
        return best(self.about, "uncalibrated")

    @property
    def other(self) -> str | None:
        """As `rival`, without the default rule."""
        known = {name: about for name, about in self.about["uncalibrated"].items() if name != RULE}
        return best({"uncalibrated": known}, "uncalibrated")

    @property
    def hindsight(self) -> str | None:
        """The one that is best on the held-out prompts."""
        return min((name for name in self.about["uncalibrated"] if name in self.rows), key=self.rmse, default=None)

    def ratio(self, name: str, other: str) -> tuple[float, float, float]:
        """RMS over RMS with a 95 % interval: paired bootstrap over prompts, each of which has one noise."""
        return ratio(self.errors(name), self.errors(other))

    def median_ratio(self, name: str, other: str, draws: int = 2000) -> tuple[float, float, float]:
        """As `ratio`, of the medians."""
        one, two = self.errors(name), self.errors(other)
        pick = np.random.default_rng(0).integers(0, len(one), (draws, len(one)))
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = np.nanquantile(np.median(one[pick], 1) / np.median(two[pick], 1), [0.025, 0.975])
            return float(np.median(one) / np.median(two)), float(low), float(high)


@dataclass(frozen=True)
class Selected:
    """Which cells are shown."""

    models: Sequence[str]
    guidance: Sequence[float]
    calls: Sequence[int]
    methods: Sequence[str]
    prompts: int


def cells(out: Path, chosen: Selected, wanted: Callable[[str], bool] = lambda key: True) -> Iterator[Results]:
    """The measured cells, in the order of the models, guidance scales and calls. `wanted`: of a world's key."""
    found = [Results(path, chosen.prompts) for path in out.glob("*/cell-*/") if wanted(path.parent.name)]
    found = [r for r in found if r.about["guidance"] in chosen.guidance and r.about["calls"] in chosen.calls]
    for model in chosen.models:
        own = [r for r in found if r.about["model"] == model or r.about["model"].startswith(f"{model} + ")]
        yield from sorted(own, key=lambda r: (r.about["model"], r.about["guidance"], r.about["calls"]))


def shown(values: tuple[float, float, float]) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*values)


def ratios(found: list[Results], methods: Sequence[str]) -> Table:
    """One row for each cell: the rival, the default rule to the best other, ratios of RMS errors to the rival, and the
    best method's other comparisons."""
    columns = ["model", "guidance", "calls", "n", "best uncalibrated (chosen on training prompts)", "RMSE"]
    columns += [f"{RULE}, to the best other"]
    table = Table([*columns, *methods, "best plan, medians", "best plan, to the best in hindsight", "fewest calls"])
    for r in found:
        if r.rival is None or r.rival not in r.rows:
            continue
        row = [*where(r), str(r.n), r.about["uncalibrated"][r.rival]["name"], f"{r.rmse(r.rival):.4f}"]
        row += [shown(r.ratio(RULE, r.other)) if RULE in r.rows and r.other in r.rows else "-"]
        row += [shown(r.ratio(name, r.rival)) if name in r.rows else "-" for name in methods]
        plan = best(r.about, "calibrated")
        if plan in r.rows:
            row += [shown(r.median_ratio(plan, r.rival)), f"{r.rmse(plan) / r.rmse(r.hindsight):.2f} {r.hindsight}"]
            row += [fewest(r, found)]
        table.rows.append(row + [""] * (len(table.columns) - len(row)))
    return table


def fewest(r: Results, found: list[Results]) -> str:
    """The fewest calls with which a plan, chosen on `select`, is as accurate as the uncalibrated rival of cell r."""
    for other in sorted(found, key=lambda each: each.about["calls"]):
        plan = best(other.about, "calibrated")
        if where(other)[:2] == where(r)[:2] and plan in other.rows and other.rmse(plan) <= r.rmse(r.rival):
            saved = 1 - other.about["calls"] / r.about["calls"]
            return f"{other.about['calls']} ({saved:.0%} fewer)"
    return "-"


def where(r: Results) -> list[str]:
    return [r.about["model"], f"{r.about['guidance']:g}", str(r.about["calls"])]


def everyone(found: list[Results]) -> Table:
    """RMS and median error and mean scores of every family and method of each cell, the most accurate first."""
    table = Table(["model", "guidance", "calls", "n", "method", "setting", "RMSE", "median", "total", "all right"])
    for r in found:
        chosen = {**r.about["uncalibrated"], **r.about["calibrated"]}
        for name in sorted(r.rows, key=r.rmse):
            arrays = r.rows[name]
            scores = [f"{arrays[key].mean():.3f}" if key in arrays else "" for key in ("total", "all_right")]
            numbers = [f"{r.rmse(name):.4f}", f"{np.median(r.errors(name)):.4f}"]
            table.rows.append([*where(r), str(r.n), name, chosen[name]["name"], *numbers, *scores])
    return table


def costs(found: list[Results]) -> Table:
    """What each calibration cost, and its error on the prompts that it was fitted to and on the held-out ones."""
    columns = ["model", "guidance", "calls", "method", "CPU s", "wall s", "threads", "model calls", "x samples"]
    table = Table([*columns, "fitted to", "fitted RMSE", "held-out RMSE", "n", "ratio"])
    for r in found:
        for name, c in r.about["calibrated"].items():
            if "failed" in c:
                table.rows.append([*where(r), name, c["failed"], *[""] * (len(table.columns) - 5)])
            elif name in r.rows and " + " not in r.about["model"]:
                spent = [f"{c['cpu']:.0f}", f"{c['wall']:.0f}", f"{c['threads']} {c['device']}", str(c["calls"])]
                error = [f"{c['fitted']:.4f}", f"{r.rmse(name):.4f}", str(r.n), f"{r.rmse(name) / c['fitted']:.2f}"]
                table.rows.append([*where(r), name, *spent, str(c["samples"]), str(c["n_fit"]), *error])
    return table


def missing(found: list[Results], chosen: Selected) -> list[str]:
    """Cells without results, and methods without a result or with fewer samples than asked for."""
    lines, seen = [], {tuple(where(r)): r for r in found}
    for model in chosen.models:
        for guidance in chosen.guidance:
            for calls in chosen.calls:
                r = seen.get((model, f"{guidance:g}", str(calls)))
                cell = f"{model} g={guidance:g}, {calls} calls"
                absent = [name for name in (RULE, *chosen.methods) if r is not None and name not in r.rows]
                if r is None:
                    lines.append(f"{cell}: nothing")
                elif absent or r.n < chosen.prompts:
                    lines.append(f"{cell}: n = {r.n} of {chosen.prompts}; without {', '.join(absent) or 'nothing'}")
    return lines
