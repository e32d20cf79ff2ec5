"""Base against tuned, image by image: scores, paired statistics, one table, one picture and one report.

OUT/images/..., manifest.jsonl   what was compared (see `diffpo.evaluate.generate`)
OUT/scores.parquet               prompt_id, seed, arm, scorer, value
OUT/summary.json                 the table, diversity, worst and best prompts
OUT/grid.png, report.html        to look at
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np

from .. import scorers
from ..common import lock
from ..common.errors import DiffpoError
from ..common.images import is_picture, passed_over, remarks
from ..common.names import hint
from ..common.text import plain, whole
from ..data.prompts import load_prompts
from . import charts, generate, report
from .compare import Evaluation, Pair, summarise
from .generation import ARMS, Generation
from .manifest import check_comparable, image_path, json_bytes, open_image, read_manifest, save

FILES = ("scores.parquet", "summary.json", "grid.png", "report.html")
COLUMNS = ["prompt_id", "seed", "arm", "scorer", "value"]  # of scores.parquet


@dataclass(frozen=True)
class Scoring:
    """How pictures are scored.

    Attributes:
        scorers: as for `diffpo.scorers.load`.
        train_scorer: the score that labelled the training pairs, if it is known.
        device: None is each scorer's own default.
    """

    scorers: tuple[str, ...] = ("shapes",)
    train_scorer: str | None = None
    device: str | None = None


BY_SHAPES = Scoring()


def run(
    out: str | Path,
    pictures: Generation | str | Path,
    prompts: str | Path | Sequence[str] | None = None,
    n: int | None = None,
    scoring: Scoring = BY_SHAPES,
    run_folder: Path | None = None,
) -> Evaluation:
    """Compare base and tuned pictures and write the files above into ``out``.

    ``pictures``: how to make them, with a LoRA; or a folder that holds them. The folder is of ``diffpo generate``, or
    has images/base/<prompt index>_<seed>.png and the same names in images/tuned, with any suffix of a picture;
    ``prompts`` then gives the texts. The first ``n`` prompts count. ``run_folder``: see `training_run`. Raises
    DiffpoError for missing images, unknown names and NaN.
    """
    out = Path(out)
    _check_scoring(scoring)
    if isinstance(pictures, Generation):
        for name, value in {"lora": pictures.lora, "prompts": prompts}.items():
            if value is None:
                raise DiffpoError(f"eval needs --{name} to make the images, or --images with a folder of them")
        run_folder = run_folder or training_run(None, pictures.lora)
    elif not Path(pictures).is_dir():
        raise DiffpoError(f"there is no folder {pictures} with images to compare")
    files = {name: out / name for name in FILES}
    _check_target(files)
    with lock.held(out):
        if isinstance(pictures, Generation):
            assert prompts is not None  # noqa: S101 (refused above)
            folder, manifest = out, generate.run(pictures.arms(), prompts, out, n)
            prompts = None  # the manifest has them
        else:
            folder, manifest = Path(pictures), read_manifest(Path(pictures))
            check_comparable(folder, [row for row in manifest if n is None or row["index"] < n])
        pairs = find_pairs(folder, manifest, prompts, n)
        scores = score_pairs(pairs, scoring.scorers, scoring.device)
        evaluation = replace(summarise(pairs, scores, scoring.train_scorer), files=files)
        save(files["scores.parquet"], _parquet(pairs, scores))
        save(files["summary.json"], _json(evaluation))
        save(files["grid.png"], report.grid_png(evaluation))
        save(files["report.html"], report.html(evaluation, manifest, charts.read_metrics(run_folder)).encode())
    return evaluation


def training_run(folder: str | Path | None, lora: str | None) -> Path | None:
    """The folder of the training run whose curves to show: the given one, else that of the LoRA. DiffpoError if the
    given one is not of a training run."""
    if folder and not (Path(folder) / "metrics.jsonl").is_file():
        raise DiffpoError(f"{folder} is not the folder of a training run: it holds no metrics.jsonl")
    if folder or lora is None:
        return Path(folder) if folder else None
    return Path(lora) if Path(lora).is_dir() else Path(lora).parent


def _check_scoring(scoring: Scoring) -> None:
    """Load every scorer once before the first picture is made, so that missing weights are reported at once."""
    if not scoring.scorers:
        raise DiffpoError("no scorer named; for example --scorers shapes")
    names = [name for spec in scoring.scorers for name in scorers.load(spec).names]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DiffpoError(f"two of the scorers give the number {twice[0]!r}; compare them in two folders (--out)")
    _check_train_scorer(scoring.train_scorer, names)


def _check_target(files: dict[str, Path]) -> None:
    """DiffpoError if one of ``files`` exists and is not from an evaluation: it would be overwritten."""
    import pyarrow.parquet as pq

    there, table = [path for path in files.values() if os.path.lexists(path)], files["scores.parquet"]
    try:  # the table is written first
        ours = not there or (table.is_file() and pq.read_schema(table).names == COLUMNS)
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise DiffpoError(
            f"{there[0]} was not written by `diffpo eval` and would be overwritten; choose another folder with --out"
        )


def find_pairs(folder: Path, manifest: list[dict], prompts=None, n: int | None = None) -> list[Pair]:
    """The pairs that ``manifest`` lists, or that lie in ``folder`` when it is empty, of the first ``n`` prompts.

    Both arms must hold the same images, under whatever suffixes; other files are counted and named.
    """
    if manifest and prompts is not None:
        raise DiffpoError(f"{folder}/manifest.jsonl holds the prompts already; leave out --prompts")
    if manifest:
        found = {(r["arm"], r["index"], r["seed"]): (r["prompt"], folder / r["file"]) for r in manifest}
    else:
        if prompts is None:
            raise DiffpoError(f"{folder} holds no manifest.jsonl; give the texts of its images with --prompts")
        texts, found = load_prompts(prompts), {}
        others = []
        for path in sorted(folder.glob("images/*/*")):
            if path.name.startswith(".") or not is_picture(path.name):
                others.append(path.relative_to(folder).as_posix())
                continue
            digits = re.fullmatch(r"([0-9]{1,9})(?:_([0-9]{1,18}))?", path.stem)
            if path.parent.name not in ARMS or not digits:
                raise DiffpoError(
                    f"cannot use {path}: name it images/base/<prompt index>_<seed>.png, or the same in images/tuned"
                )
            index, seed = int(digits[1]), int(digits[2] or 0)
            if index >= len(texts):
                raise DiffpoError(
                    f"{path} has no prompt: {prompts} holds {len(texts)} prompts, counted from 0. Give all prompts "
                    f"with --prompts"
                )
            twin = found.setdefault((path.parent.name, index, seed), (texts[index], path))[1]
            if twin != path:
                raise DiffpoError(f"{twin} and {path} are the same prompt and seed; delete one of them")
        if others:
            print(f"{folder}: passed over {passed_over(others)}")
    keys = {arm: {(i, s) for a, i, s in found if a == arm and (n is None or i < n)} for arm in ARMS}
    for arm, other in (ARMS, ARMS[::-1]):
        if lacking := sorted(keys[other] - keys[arm]):
            path = image_path(folder, arm, *lacking[0])
            advice = "run the same `diffpo generate` again to make what is missing"
            if not manifest:
                advice = f"its counterpart is {found[other, *lacking[0]][1]}"
            raise DiffpoError(f"{path} is missing, {len(lacking)} in all; {advice}")
    if not keys["base"]:
        raise DiffpoError(f"{folder} holds no images: put them into images/base and images/tuned")
    return [
        Pair(index, seed, found["base", index, seed][0], found["base", index, seed][1], found["tuned", index, seed][1])
        for index, seed in sorted(keys["base"])
    ]


def score_pairs(
    pairs: Sequence[Pair], scorer_names: Sequence[str], device: str | None = None, batch_size: int = 16
) -> dict[str, dict[str, np.ndarray]]:
    """``{scorer: {arm: float64 array of shape (n,)}}``, one model in memory at a time."""
    from tqdm.auto import tqdm

    scores: dict[str, dict[str, np.ndarray]] = {}
    notes: dict[str, Counter] = {}
    for spec in scorer_names:
        scorer = scorers.load(spec, device or scorers.default_device(spec))
        name = plain(spec.partition("=")[0], 60)
        with tqdm(total=2 * len(pairs), desc=f"scoring by {name}", unit="image", delay=1) as bar:
            for arm in ARMS:
                parts: dict[str, list[np.ndarray]] = {}
                for start in range(0, len(pairs), batch_size):
                    batch = pairs[start : start + batch_size]
                    images = [open_image(getattr(pair, arm)) for pair in batch]
                    prompts = [whole(pair.prompt) for pair in batch]
                    notes.setdefault(spec, Counter()).update(note for image in images for note in image.info["notes"])
                    for name, values in scorer.score(images, prompts).items():
                        _check(name, values, batch, arm, name in scorer.optional)
                        parts.setdefault(name, []).append(values)
                    bar.update(len(batch))
                for name, batches in parts.items():
                    scores.setdefault(name, {})[arm] = np.concatenate(batches)
    for remark in remarks(next(iter(notes.values()), Counter())):
        print(remark)
    return scores


def _check(name: str, values: np.ndarray, batch: Sequence[Pair], arm: str, optional: bool) -> None:
    bad = np.isinf(values) if optional else ~np.isfinite(values)
    if bad.any():
        pair = batch[int(bad.argmax())]
        raise DiffpoError(
            f"the scorer {name} gave {values[int(bad.argmax())]} for prompt {pair.index} "
            f"({plain(pair.prompt, 200)!r}), {getattr(pair, arm)}; check the picture, or leave this scorer out"
        )


def _check_train_scorer(train_scorer: str | None, names: list[str]) -> None:
    """The training scorer need not be among the scorers, but a misspelt name is an error."""
    if train_scorer is None or train_scorer in names:
        return
    name = scorers.parse(train_scorer).name
    if parts := [known for known in names if known.partition(".")[0] == name]:
        raise DiffpoError(f"unknown training scorer {train_scorer!r}: {hint(train_scorer, parts)}")


def _parquet(pairs: Sequence[Pair], scores: dict[str, dict[str, np.ndarray]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list] = {name: [] for name in COLUMNS}
    for scorer, arms in scores.items():
        for arm, values in arms.items():
            columns["prompt_id"] += [pair.index for pair in pairs]
            columns["seed"] += [pair.seed for pair in pairs]
            columns["arm"] += [arm] * len(pairs)
            columns["scorer"] += [scorer] * len(pairs)
            columns["value"] += values.tolist()
    buffer = BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def _json(evaluation: Evaluation) -> bytes:
    summary = {
        "rows": [asdict(row) for row in evaluation.rows],
        "primary": evaluation.primary,
        "diversity": evaluation.diversity,
        "best": evaluation.by_prompt[:5],
        "worst": evaluation.by_prompt[::-1][:5],
        "pairs": len(evaluation.pairs),
        "prompts": len(evaluation.by_prompt),
    }
    return json_bytes(summary, indent=2) + b"\n"
