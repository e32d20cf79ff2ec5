"""What the official scorers of GenEval, DPG-Bench, T2I-CompBench++ and GenAI-Bench wrote, as a table with intervals."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common import tables
from ..common.errors import DiffpoError
from ..common.text import plain, read_text
from ..data import prompt_sets
from .distributions.sample import Labels, Z, error_of_mean, share
from .manifest import json_bytes, save


@dataclass(frozen=True)
class Score:
    """A number of a benchmark with its 95 % interval, and of how many pictures (DPG-Bench: prompts) it is. The interval
    and n are None where the scorer's files do not give them."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Results:
    """``scores``: in the official order, the overall one last; ``notes``: sentences on what to mind."""

    benchmark: str
    scores: tuple[Score, ...]
    notes: tuple[str, ...] = ()


def read(benchmark: str, results: str | Path, skills: str | Path | None = None) -> Results:
    """The results of ``benchmark`` (geneval, dpg, t2i-compbench, genai-bench) in a file, or in the folder that holds
    it. ``skills``: genai_skills.json. DiffpoError names the file and the line that is not what the scorer writes."""
    path = Path(results).expanduser()
    if not path.exists():
        raise DiffpoError(f"there is no {path}; give what the official scorer of {benchmark} wrote")
    if benchmark == "genai-bench":
        return _genai(_one(path, "*_prompts.pt"), skills)
    return {"geneval": _geneval, "dpg": _dpg, "t2i-compbench": _compbench}[benchmark](path)


def _one(path: Path, pattern: str) -> Path:
    """The file itself, or the newest of that name in the folder."""
    if path.is_file():
        return path
    found = sorted(path.rglob(pattern), key=lambda each: each.stat().st_mtime)
    if not found:
        raise DiffpoError(f"{path} holds no {pattern}")
    return found[-1]


def _mean(name: str, values: Sequence[float], groups: Sequence[Any] | None = None) -> Score:
    """The mean with a normal interval, clustered by ``groups``."""
    found = np.asarray(values, float)
    if len(found) < 2:
        return Score(name, float(found.mean()), n=len(found))
    error = error_of_mean(found, Labels.of(len(found), 0, groups).mine)
    mean = float(found.mean())
    return Score(name, mean, mean - Z * error, mean + Z * error, len(found))


def _share(name: str, hits: Sequence[bool], groups: Sequence[Any] | None = None) -> Score:
    found = share(np.array(hits), Labels.of(len(hits), 0, groups).mine)
    return Score(name, found.value, found.low, found.high, len(hits))


# ---- GenEval


def _geneval(path: Path) -> Results:
    path = _one(path, "*results*.jsonl")
    tasks: dict[str, list[tuple[bool, str]]] = {}
    for place, row in _lines(path):
        correct, tag = row.get("correct"), row.get("tag")
        if not isinstance(correct, bool) or not isinstance(tag, str):
            raise DiffpoError(f"{place}: expected tag and correct, as GenEval's evaluate_images.py writes them")
        tasks.setdefault(tag, []).append((correct, str(row.get("metadata", row.get("prompt")))))
    if not tasks:
        raise DiffpoError(f"{path} has no results")
    scores = [_share(tag, *zip(*rows, strict=True)) for tag, rows in tasks.items()]
    every = [row for rows in tasks.values() for row in rows]
    prompts: dict[str, bool] = {}
    for correct, prompt in every:
        prompts[prompt] = prompts.get(prompt, False) or correct
    scores.append(_share("pictures", *zip(*every, strict=True)))
    scores.append(_share("prompts with a correct picture", list(prompts.values())))
    overall = float(np.mean([np.mean([correct for correct, _ in rows]) for rows in tasks.values()]))
    errors = [
        error_of_mean(np.array([float(hit) for hit, _ in rows]), Labels.of(len(rows), 0, [g for _, g in rows]).mine)
        for rows in tasks.values()
        if len(rows) > 1
    ]
    half = Z * float(np.sqrt(np.sum(np.square(errors)))) / len(tasks)
    ends = max(0.0, overall - half), min(1.0, overall + half)
    scores.append(Score("overall (mean over tasks)", overall, *ends, len(every)))
    return Results("geneval", tuple(scores))


def _lines(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise DiffpoError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DiffpoError(f"{path}:{number} is not JSON: {plain(error, 200)}") from None
        if not isinstance(row, dict):
            raise DiffpoError(f"{path}:{number}: expected an object, not {plain(repr(row), 80)}")
        yield f"{path}:{number}", row


# ---- DPG-Bench

_PROMPT = re.compile(r"(.+\.\w+), ((?:[0-9.eE+-]+, )*)([0-9.eE+-]+)")  # image, a score for each picture, their mean
_CATEGORY = re.compile(r"\t(.+): ([0-9.eE+-]+)")


def _dpg(path: Path) -> Results:
    path = _one(path, "dpg-bench*_results.txt")
    means, categories = [], []
    try:
        for line in read_text(path).split("\n"):
            if found := _CATEGORY.fullmatch(line):
                categories.append(Score(found[1], float(found[2])))
            elif found := _PROMPT.fullmatch(line):
                means.append(100 * float(found[3]))
    except (OSError, ValueError) as error:
        raise DiffpoError(f"cannot read {path}: {getattr(error, 'strerror', None) or plain(error, 200)}") from None
    if not means:
        raise DiffpoError(f"{path} has no lines of an image and its scores, as compute_dpg_bench.py writes them")
    note = "The scorer's file has no counts for categories, so they have no interval; n is of prompts."
    return Results("dpg", (*categories, _mean("DPG-Bench score", means)), (note,) * bool(categories))


# ---- T2I-CompBench++


def _compbench(path: Path) -> Results:
    # each scorer writes annotation_NAME/vqa_result.json; BLIP-VQA's intermediate files lie deeper
    files = [path] if path.is_file() else sorted(path.rglob("annotation*/vqa_result.json"))
    if not files:
        raise DiffpoError(f"{path} holds no annotation_.../vqa_result.json")
    scores, alone = [], False
    for file in files:
        answers = _answers(file)
        prompts = _prompts_beside(file)
        groups = [prompts[number] for number in answers] if prompts.keys() >= answers.keys() else None
        alone |= groups is None
        name = file.parent.name.removeprefix("annotation_")
        if not path.is_file():
            folder = next(each for each in file.parents[1:] if each.name != "labels")
            name = f"{folder.relative_to(path).as_posix()} {name}".removeprefix(". ")
        scores.append(_mean(name, list(answers.values()), groups))
    note = "There is no folder samples beside the results, so pictures of one prompt count as independent."
    return Results("t2i-compbench", tuple(scores), (note,) * alone)


def _answers(path: Path) -> dict[int, float]:
    """{question_id: answer}, where an answer may be a text as BLIP-VQA's."""
    try:
        found = json.loads(read_text(path))
        answers = {int(each["question_id"]): float(each["answer"]) for each in found}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DiffpoError(f"{path} is not a list of question_id and answer: {plain(error, 200)}") from None
    if not answers or not np.isfinite(list(answers.values())).all():
        raise DiffpoError(f"{path} has no answers, or one that is not finite")
    return answers


def _prompts_beside(path: Path) -> dict[int, str]:
    """{question_id: prompt} from the names of the scored pictures."""
    for folder in path.parents[1:4]:
        if (folder / "samples").is_dir():
            parts = [each.stem.rpartition("_") for each in (folder / "samples").iterdir()]
            return {int(number): prompt for prompt, _, number in parts if number.isdigit()}
    return {}


# ---- GenAI-Bench

_SKILLS: tuple[str, ...] = ("attribute", "scene", "spatial relation", "action relation", "part relation", "basic")
_SKILLS += ("counting", "comparison", "differentiation", "negation", "universal", "advanced")


def _genai(path: Path, skills: str | Path | None) -> Results:
    import torch

    file = Path(skills) if skills else prompt_sets.fetch_file("genai-bench", "genai_skills.json")
    try:
        scores = torch.load(path, map_location="cpu", weights_only=True).double().flatten(1).mean(1).numpy()
    except Exception as error:  # torch raises a dozen types for a file that is none of its own
        raise DiffpoError(f"cannot read {path} as the scores of t2v_metrics: {plain(error, 200)}") from None
    try:
        tags: Mapping[str, list[int]] = json.loads(read_text(file))
        wanted = {tag: [int(number) for number in tags[tag]] for tag in (*_SKILLS, *sorted(set(tags) - set(_SKILLS)))}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = plain(error, 200)
        raise DiffpoError(f"{file} is not genai_skills.json, {{skill: [numbers of prompts]}}: {reason}") from None
    every = sorted({number for numbers in wanted.values() for number in numbers})
    if every and every[-1] >= len(scores):
        raise DiffpoError(
            f"{path} has the scores of {len(scores)} prompts, and {file} names prompt {every[-1]}: only results of all "
            "1600 prompts can be read"
        )
    found = [_mean(tag, scores[numbers]) for tag, numbers in wanted.items() if numbers]
    return Results("genai-bench", (*found, _mean("all", scores[every])))


# ---- shown


def show(results: Results) -> None:
    """The table and the notes, to the terminal."""
    console = tables.console()
    rows: list[Sequence[object]] = []
    for each in results.scores:
        rows.append((plain(each.name, 80), _interval(each), "" if each.n is None else str(each.n)))
    console.print(tables.Table((results.benchmark, "value [95 %]", "n"), rows).terminal())
    for note in results.notes:
        console.print(note)


def _interval(score: Score) -> str:
    if score.low is None or score.high is None:
        return f"{score.value:.4g}"
    return f"{score.value:.4g} [{score.low:.4g}, {score.high:.4g}]"


def write(results: Results, out: str | Path) -> None:
    """The numbers as JSON."""
    save(Path(out), json_bytes(asdict(results), indent=1) + b"\n")
