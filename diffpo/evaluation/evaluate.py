"""Arms against the first of them, image by image: scores, paired statistics, one table, one picture and one report.

OUT/images/..., manifest.jsonl   pictures that were made for it (see `diffpo.evaluation.generate`)
OUT/scores.parquet               prompt_id, seed, arm, scorer, value
OUT/summary.json                 the table, diversity, worst and best prompts
OUT/grid.png, report.html        to look at
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path

from .. import scorers
from ..common import processes
from ..common.errors import DiffpoError
from ..common.text import plain
from ..scorers import features
from . import charts, generate, items, people, picture, report, verdict
from .arms import Source
from .compare import Evaluation, summarise
from .generation import Generation
from .items import Found, Item
from .manifest import check_arm, check_comparable, json_bytes, read_manifest, save
from .scoring import Scores, Scoring, check_scoring, forget_parts, score_items
from .traits import Traits, measure

FILES = ("scores.parquet", "summary.json", "grid.png", "report.html")
COLUMNS = ["prompt_id", "seed", "arm", "scorer", "value"]  # of scores.parquet
BY_SHAPES = Scoring()


def run(
    out: str | Path,
    arms: Mapping[str, Source] | Generation | str | Path,
    prompts: str | Path | Sequence[str] | None = None,
    n: int | None = None,
    scoring: Scoring = BY_SHAPES,
    run_folder: Path | None = None,
) -> Evaluation:
    """Compare the pictures of several arms with those of the first, and write the files above into ``out``.

    ``arms``: by name, how to make the pictures or the folder that they are in (`arms.read_arms`). One `Generation` with
    a LoRA means the arms base and tuned, and one folder those that it holds: of ``diffpo generate``, or as
    images/ARM/<prompt index>_<seed>.png. ``prompts``: needed to make pictures, and for pictures without texts; the
    first ``n`` count. ``run_folder``: see `training_run`.

    Under `accelerate launch` each process makes and scores its share, and the main process writes the files.

    What cannot be compared (a picture that an arm lacks, that cannot be read, or whose score is NaN; an arm without
    pictures; a scorer that gives up) is counted, said, and left out of the rows that it belongs to. Raises DiffpoError
    if nothing is left to compare with the first arm.
    """
    out = Path(out)
    named = _named(arms)
    texts = items.prompts_of(prompts)
    check_scoring(scoring, texts[:n] if texts else None)
    made = {name: each for name, each in named.items() if isinstance(each, Generation)}
    if made and prompts is None:
        raise DiffpoError("eval needs --prompts to make the images, or --images with a folder of them")
    loras = [each.lora for each in made.values() if each.lora is not None]
    run_folder = run_folder or (training_run(None, loras[0]) if len(loras) == 1 else None)
    files = {name: out / name for name in FILES}
    _check_target(files)
    ours = processes.here()
    with ours.lock(out):
        found: dict[str, list[Found]] = {}
        gaps: list[str] = []
        rows = generate.run(made, prompts, out, n) if made and prompts is not None else []
        for name, each in named.items():
            if isinstance(each, Path):
                found[name] = items.of_folder(each, texts, gaps)
            else:
                found[name] = items.of_rows(out, (row for row in rows if row["arm"] == name))
        compared = items.joined(found, texts, n, gaps)
        if ours.main:
            _say(gaps)
        there = [name for name in named if any(name in item.pictures for item in compared)]
        scores = score_items(compared, there, scoring, out)
        if ours.main:
            _say(scores.gaps())
        there = [name for name in there if any(name in by_arm for by_arm in scores.values.values())]
        if len({item.index for item in compared}) == 1:
            gaps.append("there is only one prompt: differences have no interval, and nothing is known of other prompts")
        traits = _traits(compared, there, scoring)
        evaluation = summarise(compared, scores.values, scoring.train_scorer, traits)
        words = verdict.without(evaluation.verdict, list(scores.stopped))
        evaluation = replace(evaluation, verdict=words, files=files, left_out=[*gaps, *scores.gaps()])
        ours.wait()  # until all have read the others' scores
        if not ours.main:
            return evaluation
        save(files["scores.parquet"], _parquet(compared, scores))
        save(files["summary.json"], _json(evaluation))
        save(files["grid.png"], picture.grid_png(evaluation))
        folders = {name: each for name, each in named.items() if isinstance(each, Path)}
        manifest = [*rows, *(row for name, each in folders.items() for row in items.settings_rows(each, name))]
        manifest = [row for row in manifest if row["arm"] in evaluation.arms]
        metrics = charts.read_metrics(run_folder)
        save(files["report.html"], report.html(evaluation, manifest, metrics).encode())
        if not scores.stopped:
            forget_parts(out)
    return evaluation


def _say(lines: Sequence[str]) -> None:
    for line in lines:
        print(line)


def _named(arms: Mapping[str, Source] | Generation | str | Path) -> dict[str, Source]:
    """The arms by name. DiffpoError for fewer than two."""
    if isinstance(arms, Generation):
        if arms.lora is None:
            raise DiffpoError("eval needs --lora to make the images, or --arm twice, or --images with a folder of them")
        named: dict[str, Source] = {**arms.arms()}
    elif isinstance(arms, Mapping):
        named = dict(arms)
        for name in named:
            check_arm(name)
    else:
        folder = Path(arms)
        named = {**items.in_folder(folder)}
        check_comparable(folder, read_manifest(folder))
    if len(named) < 2:
        raise DiffpoError(
            f"there is only one arm, {', '.join(named) or 'none'}: name at least two, such as --arm base --arm "
            "mine=runs/mine"
        )
    return named


def _traits(compared: Sequence[Item], arms: Sequence[str], scoring: Scoring) -> Traits:
    if scoring.features is None:
        return measure(compared, arms)
    made = features.load(scoring.features, scoring.device or scorers.default_device(scoring.features))
    return measure(compared, arms, made.embed, made.name)


def training_run(folder: str | Path | None, lora: str | None) -> Path | None:
    """The folder of the training run whose curves to show: the given one, else that of the LoRA. DiffpoError if the
    given one is not of a training run."""
    if folder and not (Path(folder) / "metrics.jsonl").is_file():
        raise DiffpoError(f"{folder} is not the folder of a training run: it holds no metrics.jsonl")
    if folder or lora is None:
        return Path(folder) if folder else None
    return Path(lora) if Path(lora).is_dir() else Path(lora).parent


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


def _parquet(compared: Sequence[Item], scores: Scores) -> bytes:
    """A row for every picture that an arm has; null where it has no score."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list] = {name: [] for name in COLUMNS}
    for scorer, by_arm in scores.values.items():
        for arm, values in by_arm.items():
            there = [k for k, item in enumerate(compared) if arm in item.pictures]
            columns["prompt_id"] += [compared[k].index for k in there]
            columns["seed"] += [compared[k].seed for k in there]
            columns["arm"] += [arm] * len(there)
            columns["scorer"] += [scorer] * len(there)
            columns["value"] += values[there].tolist()
    buffer = BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def _adjusted(evaluation: Evaluation) -> list[dict]:
    return [{"arms": list(pair), "p": p} for pair, p in evaluation.verdict.adjusted.items()]


def _json(evaluation: Evaluation) -> bytes:
    first, *others = evaluation.arms
    best = next(iter(evaluation.by_prompt.values()))
    summary = {
        "arms": [first, *others],
        "rows": [asdict(row) for row in evaluation.rows],
        "primary": evaluation.primary,
        "verdict": asdict(replace(evaluation.verdict, adjusted={})) | {"p": _adjusted(evaluation)},
        "strengths": {
            name: {arm: asdict(each) for arm, each in by_arm.items()} for name, by_arm in evaluation.strengths.items()
        },
        "diversity": evaluation.diversity,
        "people": {
            "needed": [asdict(each) for each in people.needed(evaluation)],
            "agreements": [asdict(each) for each in people.agreements(evaluation)],
        },
        "best": best[:5],
        "worst": best[::-1][:5],
        "by_arm": {
            arm: {"best": ranked[:5], "worst": ranked[::-1][:5]} for arm, ranked in evaluation.by_prompt.items()
        },
        "left_out": [plain(line, 2000) for line in evaluation.left_out],
        "pairs": len(evaluation.items),
        "prompts": evaluation.prompts,
    }
    return json_bytes(summary, indent=2) + b"\n"
