"""One cell = one model, guidance scale and number of calls: settings chosen, plans fitted, everything measured.

Files of a cell: `results/SPLIT-CALLS-KEY.npz`, one for each method, setting and split, with mean squared errors and
scores per sample; `plans/METHOD-CALLS-KEY`, a fitted plan and what it cost; `cell-CALLS/KIND-FAMILY.json`, what is
reported of one method.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from samplers import Plan
from samplers.calibrate import Problem, errors
from samplers.calibrate.problem import REFERENCE_CALLS, rms

from .methods import RULE, Candidate, calibrated, source_of, uncalibrated
from .references import References
from .store import digest, read_arrays, read_entries, read_json, write_arrays, write_entry, write_json
from .worlds import SELECT, World

SCAN, SHORTLIST = 8, 3  # prompts that all settings of a family are tried on, and settings that go on to all of SELECT


@dataclass(frozen=True)
class Sizes:
    """Numbers of prompts: measured on, chosen on, fitted to; `batch`: prompts in one call when measuring.

    rivals: how many uncalibrated families are measured, the best on `select`; None: all. budget: model calls of the
    search on all prompts that are fitted to; None: its own default.
    """

    heldout: int = 256
    select: int = SELECT
    fit: int = 256
    batch: int = 32
    rivals: int | None = None
    budget: int | None = None


@dataclass(eq=False)
class Cell:
    """See the module. `base`: the world whose fitted plans are used; a LoRA's own is not fitted to."""

    world: World
    calls: int
    out: Path
    sizes: Sizes
    base: World | None = None
    log: Callable[[str], None] = field(default=print)

    @cached_property
    def references(self) -> References:
        return References(self.world, self.out, self.sizes.batch)

    @cached_property
    def folder(self) -> Path:
        return self.out / self.world.key

    @property
    def summary(self) -> dict:
        """{"uncalibrated": {family: chosen}, "calibrated": {method: chosen and cost}, "model", "guidance", "calls"}."""
        return read_entries(self._entries)

    @property
    def _entries(self) -> Path:
        return self.folder / f"cell-{self.calls}"

    def _note(self, kind: str, family: str, about: dict) -> None:
        where = {"model": self.world.name, "guidance": self.world.guidance, "calls": self.calls}
        write_entry(self._entries, kind, family, about, where)

    # ---- what is measured

    def measure(self, candidate: Candidate, split: str, count: int) -> dict[str, np.ndarray] | None:
        """Squares (and scores, of `heldout`) of the first `count` samples; None where the method makes no such run."""
        path = self.folder / "results" / f"{split}-{self.calls}-{candidate.key}.npz"
        found = read_arrays(path)
        if "refused" in found:
            return None
        done = len(found.get("squares", ()))
        for first in range(done, count, self.sizes.batch):
            rows = self._rows(candidate, split, first, min(self.sizes.batch, count - first))
            if rows is None:
                write_arrays(path, {"refused": np.array(True)})
                return None
            found = {name: np.concatenate([found.get(name, x[:0]), x]) for name, x in rows.items()}
            write_arrays(path, found)
        return {name: x[:count] for name, x in found.items()}

    def _rows(self, candidate: Candidate, split: str, first: int, count: int) -> dict[str, np.ndarray] | None:
        part = self.world.part(split, first, count)
        try:
            x, end = candidate.latents(part, self.calls)
        except (ValueError, FloatingPointError):
            return None
        exact = self.references.exact(split, first, count)[end]
        squares = (x.detach().cpu().double() - exact).square().flatten(1).mean(1)
        scores = self.world.scores(split, first, x) if split == "heldout" else {}
        return {"squares": torch.nan_to_num(squares, nan=torch.inf).numpy(), **scores}

    def cached(self, candidate: Candidate, split: str) -> int:
        """Samples of this candidate that are measured already."""
        found = read_arrays(self.folder / "results" / f"{split}-{self.calls}-{candidate.key}.npz")
        return 10**9 if "refused" in found else len(found.get("squares", ()))

    # ---- methods without a fit

    def choose(self, candidates: Iterable[Candidate]) -> tuple[Candidate, float] | None:
        """The candidate with the least RMS error on `select`, and this error."""
        candidates = list(candidates)
        if len(candidates) > SHORTLIST:
            seen = self._ranked(candidates, min(SCAN, self.sizes.select))
            candidates = [candidate for candidate, _ in seen[:SHORTLIST]]
        ranked = self._ranked(candidates, self.sizes.select)
        return ranked[0] if ranked else None

    def _ranked(self, candidates: list[Candidate], count: int) -> list[tuple[Candidate, float]]:
        found = [(candidate, self.measure(candidate, "select", count)) for candidate in candidates]
        known = [(c, float(np.sqrt(rows["squares"].mean()))) for c, rows in found if rows is not None]
        return sorted(known, key=lambda pair: pair[1])

    def run_uncalibrated(self, families: list[str] | None = None) -> None:
        """Choose a setting of each family, and measure it; of `sizes.rivals` families only, if that is not None.

        Which ones is decided on `select` alone. The default rule is always measured.
        """
        groups: dict[str, list[Candidate]] = {}
        for candidate in uncalibrated(self.world, self.calls, families):
            groups.setdefault(candidate.family, []).append(candidate)
        rivals, rule = self.sizes.rivals, groups.get(RULE, [])
        if rivals is not None:
            scanned = {family: self._ranked(those, min(SCAN, self.sizes.select)) for family, those in groups.items()}
            order = sorted((f for f in groups if scanned[f]), key=lambda family: scanned[family][0][1])
            groups = {family: groups[family] for family in order[: 2 * rivals]}
            groups |= {RULE: rule} if rule else {}
        chosen = {family: self.choose(candidates) for family, candidates in groups.items()}
        found = {family: pair for family, pair in chosen.items() if pair is not None}
        order = sorted(found, key=lambda family: found[family][1])
        for family in found:
            if rivals is None or family == RULE or family in order[:rivals]:
                self._report("uncalibrated", family, *found[family])

    def _report(self, kind: str, family: str, candidate: Candidate, selected: float, **more) -> None:
        rows = self.measure(candidate, "heldout", self.sizes.heldout)
        if rows is None:
            return
        self._note(kind, family, {"name": candidate.name, "key": candidate.key, "select": selected, **more})
        self.log(
            f"{self.world.name} g={self.world.guidance:g}, {self.calls} calls, {family}: RMSE "
            f"{np.sqrt(rows['squares'].mean()):.4f} on {len(rows['squares'])} held-out, {candidate.name}"
        )

    # ---- methods that fit

    def run_calibrated(self, names: list[str] | None = None, problem: Callable[[], Problem] | None = None) -> None:
        """Fit each method to `problem()`, or read its plan, and measure it. A method that fails is noted."""
        for name, method in calibrated(self.base or self.world, self.sizes.budget).items():
            if names is not None and name not in names:
                continue
            plan, cost = self._fitted(name, method, problem)
            if plan is None:
                self._note("calibrated", name, cost)
                self.log(f"{self.world.name}, {self.calls} calls, {name}: {cost['failed']}")
                continue
            candidate = Candidate.of(name, plan.name, plan)
            rows = self.measure(candidate, "select", self.sizes.select)
            selected = float("inf") if rows is None else float(np.sqrt(rows["squares"].mean()))
            self._report("calibrated", name, candidate, selected, **cost)

    def _fitted(self, name: str, method: Callable, problem: Callable[[], Problem] | None) -> tuple[Plan | None, dict]:
        path = self.plan_path(name, method)
        cost = read_json(path.with_suffix(".json"))
        if cost:
            return (None if "failed" in cost else Plan.load(path)), cost
        if problem is None:
            return None, {"failed": f"no plan is fitted to {(self.base or self.world).name}: run it without --lora"}
        fitting, tally = problem(), (self.base or self.world).tally
        before, wall, cpu = asdict(tally), time.perf_counter(), time.process_time()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            plan = method(fitting, self.calls)
            cost = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            cost |= {name: value - before[name] for name, value in asdict(tally).items()}
            cost |= {"fitted": rms(errors(plan, fitting.fitting, fitting.prediction)), "n_fit": self.sizes.fit}
            cost |= {"threads": torch.get_num_threads(), "device": self.world.options.device}
            plan.save(path)
        except (ValueError, FloatingPointError, RuntimeError) as error:
            plan, cost = None, {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        write_json(path.with_suffix(".json"), cost)
        return plan, cost

    def plan_path(self, name: str, method: Callable) -> Path:
        key = digest(name, source_of(method), self.sizes.fit, REFERENCE_CALLS)
        return self.out / (self.base or self.world).key / "plans" / f"{name}-{self.calls}-{key}.safetensors"


def best(summary: dict, kind: str) -> str | None:
    """The family of a cell that is best on `select`."""
    known = {family: about["select"] for family, about in summary.get(kind, {}).items() if "select" in about}
    return min(known, key=known.__getitem__) if known else None
