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
from dataclasses import asdict
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
from .manifest import ARMS, check_comparable, image_path, json_bytes, open_image, read_manifest, save

FILES = ("scores.parquet", "summary.json", "grid.png", "report.html")
COLUMNS = ["prompt_id", "seed", "arm", "scorer", "value"]  # of scores.parquet


def run(
    out: str | Path,
    *,
    model: str | Path | None = None,
    lora: str | Path | None = None,
    prompts: str | Path | Sequence[str] | None = None,
    images: str | Path | None = None,
    scorer_names: Sequence[str] = ("shapes",),
    train_scorer: str | None = None,
    run_folder: str | Path | None = None,
    n: int | None = None,
    device: str | None = None,
    show: bool = True,
    **generation,
) -> Evaluation:
    """Compare ``model`` with and without ``lora`` and write the files above into ``out``.

    Either generates the images (``model``, ``lora``, ``prompts``; ``generation`` goes to `diffpo.evaluate.generate.run`) or
    takes them from the folder ``images``: one made by ``diffpo generate``, or any with
    images/base/<prompt index>_<seed>.png and images/tuned/..., to which ``prompts`` gives the texts (any suffix of a
    picture).
    ``scorer_names``: see `diffpo.scorers.load`.
    ``train_scorer`` names the score that labelled the training pairs. ``run_folder`` holds metrics.jsonl for the
    training curves; by default the folder of the LoRA. Raises DiffpoError for missing images, unknown names and NaN.
    """
    out = Path(out)
    if run_folder and not (Path(run_folder) / "metrics.jsonl").is_file():
        raise DiffpoError(f"{run_folder} is not the folder of a training run: it holds no metrics.jsonl")
    if not scorer_names:
        raise DiffpoError("no scorer named; for example --scorers shapes")
    # every scorer is loaded once before the first picture is made: missing weights should not show hours later
    names = [name for spec in scorer_names for name in scorers.load(spec).names]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DiffpoError(f"two of the scorers give the number {twice[0]!r}; compare them in two folders (--out)")
    _check_train_scorer(train_scorer, names)
    if images is None:
        for name, value in {"model": model, "lora": lora, "prompts": prompts}.items():
            if value is None:
                raise DiffpoError(f"eval needs --{name} to make the images, or --images with a folder of them")
    elif not Path(images).is_dir():
        raise DiffpoError(f"there is no folder {images} with images to compare")
    run_folder = Path(run_folder) if run_folder else (_folder_of(lora) if lora else None)
    files = {name: out / name for name in FILES}
    _check_target(files)
    with lock.held(out):
        if images is None:
            images, manifest = out, generate.run(model, prompts, out, lora=lora, n=n, device=device, **generation)
            prompts = None  # the manifest has them
        else:
            manifest = read_manifest(images)
            check_comparable(Path(images), [row for row in manifest if n is None or row["index"] < n])
        pairs = find_pairs(Path(images), manifest, prompts, n)
        scores = score_pairs(pairs, scorer_names, device)
        evaluation = summarise(pairs, scores, train_scorer)
        evaluation = Evaluation(**{**vars(evaluation), "files": files})
        save(files["scores.parquet"], _parquet(pairs, scores))
        save(files["summary.json"], _json(evaluation))
        save(files["grid.png"], report.grid_png(evaluation))
        save(files["report.html"], report.html(evaluation, manifest, charts.read_metrics(run_folder)).encode())
    if show:
        report.print_table(evaluation)
    return evaluation


def _check_target(files: dict[str, Path]) -> None:
    """DiffpoError if one of ``files`` is there and not of an evaluation: it would be overwritten."""
    import pyarrow.parquet as pq

    there, table = [path for path in files.values() if os.path.lexists(path)], files["scores.parquet"]
    try:  # the table is the first to be written
        ours = not there or (table.is_file() and pq.read_schema(table).names == COLUMNS)
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise DiffpoError(f"{there[0]} is of no evaluation, and would be overwritten; choose another folder with --out")


def _folder_of(lora: str | Path) -> Path:
    return Path(lora) if Path(lora).is_dir() else Path(lora).parent


def find_pairs(folder: Path, manifest: list[dict], prompts=None, n: int | None = None) -> list[Pair]:
    """The pairs that ``manifest`` lists, or that lie in ``folder`` when it is empty, of the first ``n`` prompts.

    Both arms must hold the same images, under whatever suffixes; files that are no pictures are counted and named.
    """
    if manifest and prompts is not None:
        raise DiffpoError(f"{folder}/manifest.jsonl already says the prompts; leave out --prompts")
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
                raise DiffpoError(f"{path}: expected images/base or images/tuned/<prompt index>_<seed>.png")
            index, seed = int(digits[1]), int(digits[2] or 0)
            if index >= len(texts):
                raise DiffpoError(f"{path} has no prompt: {prompts} holds {len(texts)}, counted from 0")
            twin = found.setdefault((path.parent.name, index, seed), (texts[index], path))[1]
            if twin != path:
                raise DiffpoError(f"{twin} and {path} are the same prompt and seed: which of them is it?")
        if others:
            print(f"{folder}: passed over {passed_over(others)}")
    keys = {arm: {(i, s) for a, i, s in found if a == arm and (n is None or i < n)} for arm in ARMS}
    for arm, other in (ARMS, ARMS[::-1]):
        if lacking := sorted(keys[other] - keys[arm]):
            path = image_path(folder, arm, *lacking[0])
            advice = "run the same `diffpo generate` again to fill in"
            if not manifest:
                advice = f"its counterpart is {found[other, *lacking[0]][1]}"
            raise DiffpoError(f"{path} is missing, {len(lacking)} in all; {advice}")
    if not keys["base"]:
        raise DiffpoError(f"{folder} holds no images in images/base and images/tuned")
    return [
        Pair(index, seed, found["base", index, seed][0], found["base", index, seed][1], found["tuned", index, seed][1])
        for index, seed in sorted(keys["base"])
    ]


def score_pairs(
    pairs: Sequence[Pair], scorer_names: Sequence[str], device: str | None = None, batch_size: int = 16
) -> dict[str, dict[str, np.ndarray]]:
    """``{scorer: {arm: float64 array of shape (n,)}}``, one model in memory at a time."""
    from rich.markup import escape
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    scores: dict[str, dict[str, np.ndarray]] = {}
    notes: dict[str, Counter] = {}
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        for spec in scorer_names:
            scorer = scorers.load(spec, device or scorers.default_device(spec))
            task = progress.add_task(f"{escape(plain(spec.partition('=')[0], 60))} scores", total=2 * len(pairs))
            for arm in ARMS:
                parts: dict[str, list[np.ndarray]] = {}
                for start in range(0, len(pairs), batch_size):
                    batch = pairs[start : start + batch_size]
                    images, prompts = (
                        [open_image(getattr(pair, arm)) for pair in batch],
                        [whole(pair.prompt) for pair in batch],
                    )
                    notes.setdefault(spec, Counter()).update(note for image in images for note in image.info["notes"])
                    for name, values in scorer.score(images, prompts).items():
                        _check(name, values, batch, arm, name in scorer.optional)
                        parts.setdefault(name, []).append(values)
                    progress.advance(task, len(batch))
                for name, values in parts.items():
                    scores.setdefault(name, {})[arm] = np.concatenate(values)
    for remark in remarks(next(iter(notes.values()), Counter())):
        print(remark)
    return scores


def _check(name: str, values: np.ndarray, batch: Sequence[Pair], arm: str, optional: bool) -> None:
    bad = np.isinf(values) if optional else ~np.isfinite(values)
    if bad.any():
        pair = batch[int(bad.argmax())]
        raise DiffpoError(
            f"the scorer {name} gave {values[int(bad.argmax())]} for prompt {pair.index} "
            f"({plain(pair.prompt, 200)!r}), {getattr(pair, arm)}; look at the picture, or leave this scorer out"
        )


def _check_train_scorer(train_scorer: str | None, names: list[str]) -> None:
    """The training scorer need not be measured here, but a misspelt name is an error."""
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
