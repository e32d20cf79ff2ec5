"""Curves of the report that go over several arms: over the checkpoints of a run, and over the number of model calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import DiffpoError
from ..common.run_folder import CHECKPOINT
from ..common.text import plain
from . import charts
from .charts import DASHES, PALETTE, Line
from .generation import RECORDED, Generation
from .table import section

if TYPE_CHECKING:
    from .compare import Evaluation

PANELS = 6  # scores that are no parts of others; the primary one first
_CALLS = ("steps", "solver", "plan", "plan_hash")  # what arms on one chart of calls may differ in
_LORA = ("lora", "lora_hash")

Places = dict[str, list[tuple[float, str]]]  # of a chart: by the name of a line, (x, arm)


def made(manifest: Iterable[Mapping[str, Any]]) -> dict[str, Generation]:
    """How each arm's pictures were made, where the manifest says it all."""
    first: dict[str, Mapping[str, Any]] = {}
    for row in manifest:
        first.setdefault(row["arm"], row)
    found = {}
    for arm, row in first.items():
        try:
            found[arm] = Generation.of(dict(row))
        except (DiffpoError, TypeError, KeyError):  # a folder without a manifest, or with one of another program
            continue
    return found


def over_checkpoints(evaluation: Evaluation, manifest: Sequence[Mapping[str, Any]]) -> str:
    """The scores over the updates of each run of which at least two states are arms; the base is at 0 updates."""
    arms = {arm: how for arm, how in made(manifest).items() if arm in evaluation.arms}
    states: dict[tuple, Places] = defaultdict(lambda: defaultdict(list))
    runs = {place[0] for how in arms.values() if (place := checkpoint(how.lora))}
    for arm, how in arms.items():
        if place := checkpoint(how.lora) or _finished(how.lora, runs):
            states[_key(how, _LORA)][str(place[0])].append((place[1], arm))
    found: Places = {}
    for key, by_run in states.items():
        start = [(0, arm) for arm, how in arms.items() if how.lora is None and _key(how, _LORA, key) == key]
        for run, places in by_run.items():
            if len(places) > 1:
                found[Path(run).name] = sorted([*start[:1], *places])
    return _panels(evaluation, found, "updates")


def over_calls(evaluation: Evaluation, manifest: Sequence[Mapping[str, Any]]) -> str:
    """The scores over the model calls of arms that differ in calls, solver and plan only: a line for each solver, one
    for plans."""
    groups: dict[tuple, Places] = defaultdict(lambda: defaultdict(list))
    for arm, how in made(manifest).items():
        if arm in evaluation.arms and how.steps is not None:
            name = "plans" if how.plan else how.solver or "default solver"
            groups[_key(how, _CALLS)][name].append((how.steps, arm))
    found: Places = {}
    for number, places in enumerate(groups.values()):
        if max((len({x for x, _ in line}) for line in places.values()), default=0) > 1:
            for name, line in places.items():
                found[name if name not in found else f"{name} ({number + 1})"] = sorted(line)
    return _panels(evaluation, found, "model calls")


def checkpoint(lora: str | None) -> tuple[Path, int] | None:
    """The run and the number of updates of a LoRA in the folder of a checkpoint; None of any other."""
    if lora is None:
        return None
    path = Path(lora)
    folder = path.parent if path.suffix == ".safetensors" else path
    number = folder.name.removeprefix(CHECKPOINT)
    ours = folder.name.startswith(CHECKPOINT) and number.isascii() and number.isdigit() and len(number) < 16
    return (folder.parent, int(number)) if ours else None


def _finished(lora: str | None, runs: set[Path]) -> tuple[Path, int] | None:
    """The same of a run's own LoRA, if checkpoints of this run are arms too. The log has the last update."""
    if lora is None:
        return None
    path = Path(lora)
    folder = path.parent if path.suffix == ".safetensors" else path
    steps = [row["step"] for row in charts.read_metrics(folder)] if folder in runs else []
    return (folder, int(max(steps))) if steps else None


def _key(how: Generation, without: Sequence[str], like: tuple | None = None) -> tuple:
    """What arms on one chart share. ``like``: the key of a tuned arm, whose strength a base arm does not have."""
    shared = {key: value for key, value in how.recorded().items() if key not in (*without, "model", "lora_weight")}
    weight = how.lora_weight if like is None else like[-1]
    return (*(shared.get(key) for key in RECORDED if key in shared), weight)


def _panels(evaluation: Evaluation, places: Places, xlabel: str) -> str:
    """A panel for every score: the difference to the first arm, with its interval."""
    if not places:
        return ""
    first, panels = evaluation.arms[0], []
    whole = [row.scorer for row in evaluation.rows if section(row.scorer)[1] != "parts" or "." not in row.scorer]
    for score in [*dict.fromkeys([evaluation.primary, *whole])][:PANELS]:
        rows = {row.arm: row.difference for row in evaluation.rows if row.scorer == score}
        by_arm: dict[str, tuple[float, ...]] = {first: (0.0,)}
        by_arm |= {arm: (each.value, each.low, each.high) for arm, each in rows.items()}
        lines = []
        for k, (name, line) in enumerate(places.items()):
            points = [(float(x), *by_arm[arm]) for x, arm in line if arm in by_arm]
            if points:
                lines.append(Line(plain(name, 40), points, PALETTE[k % len(PALETTE)], DASHES[k % len(DASHES)]))
        if lines:
            panels.append(charts.panel(f"{plain(score, 40)}, difference to {first}", lines, xlabel, 0.0))
    return "".join(panels)
