"""The results of `diffpo score`: one table of all numbers, a summary, and what is finished while a run goes on."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np

from ..common.errors import DiffpoError
from ..common.files import write_atomic, writing
from ..common.tables import Table, console
from ..common.text import plain, read_text
from ..scorers.pictures import SCORES, Pictures

COLUMNS = ("key", "prompt", "scorer", "value", "state")
SUMMARY = "summary.json"
PARTS = "parts"
SHOWN = 20  # pictures without numbers that the summary names
Known = dict[tuple[str, str, str], tuple[str | None, float]]  # (number, key, state): (prompt, value)


@dataclass(frozen=True)
class Row:
    """The distribution of one number. ``missing``: pictures without it, as they are unreadable, lack a prompt, or the
    scorer failed on them or gave NaN. ``nan``: those of NaN."""

    scorer: str
    mean: float
    low: float  # 5 %
    median: float
    high: float  # 95 %
    n: int
    missing: int
    nan: int = 0


@dataclass(frozen=True)
class Gaps:
    """``unreadable``: {key of a picture: why it has no number}; ``stopped``: {scorer: why it gave up}."""

    unreadable: dict[str, str]
    stopped: dict[str, str]


@dataclass(frozen=True)
class Scores:
    """``rows``: one for each number; ``unreadable`` and ``stopped``: see `Gaps`; ``file``: the table of all values."""

    rows: list[Row]
    pictures: int
    unreadable: dict[str, str]
    file: Path
    stopped: dict[str, str] = field(default_factory=dict)

    def table(self) -> Any:
        """All values as a pyarrow table; ``.to_pandas()`` makes a data frame of it."""
        import pyarrow.parquet as pq

        return pq.read_table(self.file)


def check_target(out: Path, source: str, specs: dict[str, str]) -> None:
    """DiffpoError if ``out`` holds results of something else: they would be mixed."""
    if (out / SCORES).exists() and not (out / SUMMARY).is_file():
        raise DiffpoError(f"{out / SCORES} was not written by `diffpo score`; choose another folder with --out")
    about = _about(out)
    if about and about.get("source") != _resolved(source):
        raise DiffpoError(f"{out} holds the scores of {plain(about.get('source'), 300)}; choose another --out")
    for name, spec in (about.get("scorers") or {}).items():
        if name in specs and specs[name] != spec:
            raise DiffpoError(
                f"{out} holds {name} of the scorer {plain(spec, 200)}, and {plain(specs[name], 200)} may give other "
                "numbers; choose another --out"
            )
    with writing(out):
        write_atomic(out / SUMMARY, _json(about | {"source": _resolved(source), "scorers": _both(about, specs)}))


def _both(about: dict, specs: dict[str, str]) -> dict[str, str]:
    return {**(about.get("scorers") or {}), **specs}


def _resolved(source: str) -> str:
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def _about(out: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(out / SUMMARY))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DiffpoError(f"cannot read {out / SUMMARY}: {plain(error, 200)}; choose another --out") from None
    if not isinstance(found, dict) or "source" not in found:
        raise DiffpoError(f"{out / SUMMARY} was not written by `diffpo score`; choose another folder with --out")
    return found


def known(out: Path) -> Known:
    """{(number, key, state): (prompt, value)} of earlier runs."""
    found: Known = {}
    if (out / SCORES).is_file():
        import pyarrow.parquet as pq

        columns = pq.read_table(out / SCORES).to_pydict()
        rows = zip(*(columns[name] for name in ("scorer", "key", "state", "prompt", "value")), strict=True)
        found |= {(name, key, state): (prompt, value) for name, key, state, prompt, value in rows}
    for path in sorted((out / PARTS).glob("*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            try:
                name, key, state, prompt, value = json.loads(line)
                found[name, key, state] = prompt, math.nan if value is None else float(value)
            except (ValueError, TypeError):  # half a line of a run that was killed, or is writing now
                continue
    return found


def merge(out: Path, pictures: Pictures, specs: dict[str, str], gaps: Gaps, part: bool) -> Scores:
    """All numbers of ``pictures``, in one file, and their table. Numbers of other pictures are kept if ``part`` of the
    source was asked for, and else dropped: those pictures are gone."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers, about = known(out), _about(out)
    names = list(about["scorers"])
    present = {item.key: item.state for item in pictures.items(0, 1)}
    ours = [(name, key, state) for name in names for key, state in present.items() if (name, key, state) in numbers]
    others = [each for each in numbers if part and each[0] in about["scorers"] and each[1] not in present]
    rows = [
        (key, numbers[name, key, state][0], name, numbers[name, key, state][1], state)
        for name, key, state in ours + others
    ]
    types = [pa.float64() if name == "value" else pa.string() for name in COLUMNS]
    arrays = [pa.array([row[place] for row in rows], kind) for place, kind in enumerate(types)]
    buffer = BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, list(COLUMNS)), buffer)
    with writing(out):
        write_atomic(out / SCORES, buffer.getvalue())
    values: dict[str, list[float]] = {name: [] for name in names if name in specs}
    for name, key, state in ours:
        if name in values:
            values[name].append(numbers[name, key, state][1])
    table = [_row(name, np.array(found, np.float64), len(pictures)) for name, found in values.items()]
    summary = {"source": about["source"], "scorers": about["scorers"], "pictures": len(pictures)}
    shown = [{key: None if value != value else value for key, value in asdict(row).items()} for row in table]
    summary |= {"rows": shown, "left_out": len(gaps.unreadable)}
    summary |= {"first_left_out": dict(list(gaps.unreadable.items())[:SHOWN]), "stopped": gaps.stopped}
    with writing(out):
        write_atomic(out / SUMMARY, _json(summary))
    rmtree(out / PARTS, ignore_errors=True)
    return Scores(table, len(pictures), gaps.unreadable, out / SCORES, gaps.stopped)


def _row(name: str, values: np.ndarray, pictures: int) -> Row:
    found = values[np.isfinite(values)]
    low, median, high = np.percentile(found, (5, 50, 95)) if len(found) else (math.nan,) * 3
    mean = float(found.mean()) if len(found) else math.nan
    missing, nan = pictures - len(found), len(values) - len(found)
    return Row(name, mean, float(low), float(median), float(high), len(found), missing, nan)


def _json(value: dict) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2).encode(errors="backslashreplace") + b"\n"


def report(scores: Scores) -> None:
    """Print the table, and what was left out."""
    table = Table(["score", "mean", "5 %", "50 %", "95 %", "n", "without"])
    for row in scores.rows:
        numbers = (f"{value:.4g}" for value in (row.mean, row.low, row.median, row.high))
        table.rows.append([row.scorer, *numbers, row.n, row.missing])
    console().print(table.terminal())
    for line in left_out(scores):
        print(line)
    print(f"all {scores.pictures} pictures: {scores.file}")


def left_out(scores: Scores) -> list[str]:
    """Lines on what lacks numbers: how many pictures for each reason, and the first of them; scorers that gave up."""
    reasons: dict[str, list[str]] = {}
    for key, reason in scores.unreadable.items():
        kind, _, detail = reason.partition(": ")
        reasons.setdefault(kind, []).append(f"{key}: {detail}" if detail else key)
    lines = [f"{len(keys)} left out ({kind}), the first: {plain(keys[0], 300)}" for kind, keys in reasons.items()]
    lines += [f"{row.scorer} is NaN for {row.nan} pictures" for row in scores.rows if row.nan]
    advice = "its numbers are not complete; the same command tries the others again"
    return lines + [f"{plain(spec, 200)} gave up: {plain(why, 600)}; {advice}" for spec, why in scores.stopped.items()]
