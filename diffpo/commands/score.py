"""Numbers for pictures from anywhere.

OUT/scores.parquet   key, prompt, scorer, value, state; one row for each picture and number
OUT/summary.json     what was scored by which scorers, the table, and the pictures that could not be read
OUT/parts/           what is finished while a run goes on: the same command continues from it
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .. import scorers
from ..common import lock, processes
from ..common.errors import DiffpoError
from ..common.files import writing
from ..common.images import BadRow, remarks
from ..common.text import plain, whole
from ..common.worker import Worker
from ..scorers.careful import Careful
from ..scorers.pictures import SCORES, Listed, Pictures, Where, find, texts
from .score_results import PARTS, Gaps, Known, Scores, check_target, known, merge

AHEAD = 3  # batches that are decoded while one is scored
WORDS = "no prompt"
FAILED = "a scorer fails"


@dataclass(frozen=True)
class ScoreRun:
    """What is scored, and how.

    Attributes:
        source: a folder of pictures, a table, shards, or a data set of the hub (`diffpo.scorers.pictures`).
        out: folder of the results. One that holds results of the same source is continued.
        scorers: as for `diffpo.scorers.load`; at least one.
        where: columns, split, and how many.
        batch_size: pictures at a time; it does not change the numbers.
        device: None is each scorer's own default.
    """

    source: str
    out: Path
    scorers: tuple[str, ...] = ()
    where: Where = field(default_factory=Where)
    batch_size: int = 16
    device: str | None = None


def run(scoring: ScoreRun) -> Scores:
    """Score every picture by every scorer. Under `accelerate launch` each process takes its share.

    Pictures that were scored before are not scored again, unless they have changed. Raises DiffpoError for a source
    without pictures, missing weights, a scorer that needs prompts where there are none, and a folder ``out`` of another
    source.
    """
    ours = processes.here()
    worker, wait = ours.worker(), ours.wait
    out = Path(scoring.out)
    if worker.index:
        wait()  # the first process checks everything, and copies what must be copied
        return _share(scoring, worker, wait, Checked({}, {}))
    checked = _checked(scoring, find(scoring.source, scoring.where, worker.quiet))
    with lock.held(out):
        check_target(out, scoring.source, checked.specs)
        with writing(out):
            (out / PARTS).mkdir(parents=True, exist_ok=True)
        return _share(scoring, worker, wait, checked)


@dataclass(frozen=True)
class Checked:
    """``specs``: {number: the scorer that gives it, with a hash of its settings' file}. ``loaded``: {spec: the scorer},
    if there is only one; of several, each is loaded when its turn comes."""

    specs: dict[str, str]
    loaded: dict[str, Any]


def _checked(scoring: ScoreRun, pictures: Pictures) -> Checked:
    """Loads each scorer once, so that missing weights and prompts are reported before the first picture is scored."""
    if not scoring.scorers:
        raise DiffpoError("no scorer named; for example --scorers aesthetic")
    specs: dict[str, str] = {}
    loaded = {}
    for spec in scoring.scorers:
        scorer = _loaded(scoring, spec)
        if getattr(scorer, "reads_prompt", True) and not pictures.has_prompts:
            name = plain(spec.partition("=")[0], 60)
            raise DiffpoError(f"the scorer {name} needs prompts. {pictures.lacking}, or leave out this scorer")
        for number in scorer.names:
            if number in specs:
                raise DiffpoError(f"two of the scorers give the number {number!r}; use two folders (--out)")
            specs[number] = _identity(spec)
        loaded = {spec: scorer} if len(scoring.scorers) == 1 else {}
    return Checked(specs, loaded)


def _loaded(scoring: ScoreRun, spec: str) -> scorers.Scorer:
    return scorers.load(spec, scoring.device or scorers.default_device(spec))


def _share(scoring: ScoreRun, worker: Worker, wait: Any, checked: Checked) -> Scores:
    """The work of one process; the first one merges, and has the result."""
    out, pictures = Path(scoring.out), find(scoring.source, scoring.where, worker.quiet)
    earlier, bad, notes = known(out), dict[str, str](), Counter[str]()
    if not worker.index:
        wait()
    stopped: dict[str, str] = {}
    with open(out / PARTS / f"{worker.index}.jsonl", "ab") as file:
        file.write(b"\n")  # a killed run may have left half a line
        for spec in scoring.scorers:
            scorer = checked.loaded.get(spec) or _loaded(scoring, spec)
            try:
                bad |= _by_one(scorer, spec, Share(pictures, scoring.batch_size, worker, earlier, file, notes))
            except DiffpoError as error:  # of a server or of a class of the user's: the other scorers go on
                stopped[spec] = str(error)
    unreadable = dict(worker.gather(list(bad.items())))
    stopped = dict(worker.gather(list(stopped.items())))
    if len(stopped) == len(scoring.scorers):
        wait()
        raise DiffpoError(next(iter(stopped.values())))
    wait()
    if worker.index:
        wait()
        return Scores([], len(pictures), unreadable, out / SCORES, stopped)
    for line in remarks(notes):
        print(line)
    result = merge(out, pictures, checked.specs, Gaps(unreadable, stopped), scoring.where.part)
    wait()
    return result


@dataclass
class Share:
    """What one process works on. ``known``: numbers of earlier runs; ``file``: where new ones go; ``notes``: what was
    converted in the pictures."""

    pictures: Pictures
    batch_size: int
    worker: Worker
    known: Known
    file: Any
    notes: Counter[str]


def _identity(spec: str) -> str:
    source = Path(spec.partition("=")[2])
    if source.suffix in (".yaml", ".yml") and source.is_file():
        return f"{spec} {blake2b(source.read_bytes(), digest_size=8).hexdigest()}"
    return spec


def _by_one(scorer: scorers.Scorer, spec: str, share: Share) -> dict[str, str]:
    """Score this process's pictures by one scorer, and append the numbers to the file. Returns {key: reason} of those
    that were left out."""
    from tqdm.auto import tqdm

    needs, careful = getattr(scorer, "reads_prompt", True), Careful(scorer)
    first, bad, worker = not share.notes, dict[str, str](), share.worker
    total = len(range(worker.index, len(share.pictures), worker.count))

    def left() -> Iterator[Listed]:
        for item in share.pictures.items(worker.index, worker.count):
            if all((name, item.key, item.state) in share.known for name in scorer.names):
                bar.update()
            else:
                yield item

    description = f"scoring by {plain(spec.partition('=')[0], 60)}"
    with tqdm(total=total, desc=description, unit="image", delay=1, disable=worker.quiet) as bar:
        for batch in _decoded(share.pictures, left(), share.batch_size):
            good = []
            for item, read in batch:
                if isinstance(read, BadRow):
                    bad[item.key] = plain(read, 300)
                elif needs and not read[1]:
                    bad[item.key] = WORDS
                else:
                    good.append((item, *read))
                    share.notes.update(read[0].info.get("notes", ()) if first else ())
            bad |= _append(careful, good, share.file)
            bar.update(len(batch))
    return bad


def _append(careful: Careful, good: list[tuple[Listed, Any, str | None]], file: Any) -> dict[str, str]:
    """Score pictures and write their numbers, null for NaN. Returns {key: reason} of those that the scorer fails on,
    which are tried again the next time."""
    if not good:
        return {}
    found = careful.score([image for _, image, _ in good], texts([prompt for *_, prompt in good]))
    lines = []
    for name, values in found.numbers.items():
        for place, ((item, _, prompt), value) in enumerate(zip(good, values, strict=True)):
            row = (name, item.key, item.state, prompt and whole(prompt), float(value) if np.isfinite(value) else None)
            if place not in found.failed:
                lines.append(json.dumps(row).encode() + b"\n")
    with writing(file.name):
        file.write(b"".join(lines))
        file.flush()
    return {good[place][0].key: f"{FAILED}: {plain(reason, 300)}" for place, reason in found.failed.items()}


def _decoded(pictures: Pictures, items: Iterable[Listed], size: int) -> Iterator[list[tuple[Listed, Any]]]:
    """Batches of items and what was read of each (picture and prompt, or the BadRow), decoded ahead in threads."""

    def read(item: Listed) -> Any:
        try:
            return pictures.read(item)
        except BadRow as problem:
            return problem

    source = iter(items)
    with ThreadPoolExecutor(4) as pool:
        waiting: list[list[tuple[Listed, Future]]] = []
        while True:
            while len(waiting) < AHEAD and (chunk := list(islice(source, size))):
                waiting.append([(item, pool.submit(read, item)) for item in chunk])
            if not waiting:
                return
            yield [(item, future.result()) for item, future in waiting.pop(0)]
