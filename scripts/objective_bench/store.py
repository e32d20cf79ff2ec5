"""What the bench keeps: a small committed file for each job, and one line for every setting that was tried.

A result belongs to its *content*: the settings of the method (those of its preset too), the seed, the regime's data,
the model's weights and what all jobs share. If any of them changes, the job is run again.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffpo.common.files import write_atomic

from . import data

if TYPE_CHECKING:
    from diffpo.evaluation.generation import Generation

    from .job import Setting
    from .methods import Method
    from .recipes import Recipe

RESULTS = Path(__file__).resolve().parent / "results"
TRIED = RESULTS / "tried.jsonl"
EARLIER = RESULTS / "earlier.json"  # rows that were measured before results were kept one by one
PLACES = ("output", "data.cache", "data.train", "data.validation", "model.path")
TUNING = 100  # the seed of trials, which is no seed of a comparison
LEVELS = 2**16 - 1  # scores lie in 0..1 and are kept in 16 bits


def digest(*parts: object) -> str:
    """16 characters that depend on every part."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@functools.cache
def of_folder(folder: Path) -> str:
    """The content of all files of a model."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json", ".txt"))
    return digest(*((path.relative_to(folder).as_posix(), _sha256(path)) for path in files))


@functools.cache
def of_regime(regime: str) -> str:
    """What the data of a regime are made from, with all numbers of its maker."""
    parts: list[object] = [regime, _sha256(data.PAIRS), data.FLIPS]
    if regime != "own":
        parts += [data.SEED, data.TIE]
    if regime == "others":
        parts += [data.CAPTIONS, data.EACH, *(_drawing(one) for one in data.OTHERS)]
        parts += [of_folder(data.ASSETS / name) for name in ("tiny-sdxl", "tiny-dit", "tiny-turbo")]
    return digest(*parts)


def _drawing(generation: Generation) -> list[Any]:
    """How pictures are made, without the place of the model."""
    names = [Path(path).name for path in (generation.model, generation.lora) if path is not None]
    return [*names, generation.steps, generation.solver, generation.guidance]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def key(method: Method, seed: int, setting: Setting) -> str:
    """The content of a job: settings that are not the defaults (so that new options leave it alone), data, model."""
    from .job import configure, generation

    config = configure(method, seed, setting, Path("output"), 1, 1).model_dump(mode="json", exclude_defaults=True)
    for place in PLACES:
        section, _, name = place.rpartition(".")
        (config[section] if section else config).pop(name, None)
    named = json.dumps(config, sort_keys=True).replace(str(setting.folder), "$OUT")
    given = [text for text in method.overrides if text.startswith("data.")]
    shared = [of_folder(data.ASSETS / setting.model), of_regime(setting.regime), _drawing(generation(setting.model))]
    own = [named, given, seed, *shared, setting.budget, setting.n, setting.n_curve, method.updates]
    return digest(*own, *([] if method.then is None else [key(method.then, seed, setting)]))


def file(name: str, seed: int, setting: Setting, root: Path = RESULTS) -> Path:
    """Where a job's result is kept: REGIME/METHOD-SEED.json, or REGIME-MODEL/METHOD-SEED.json."""
    return root / setting.label / f"{name}-{seed}.json"


def read(path: Path) -> dict[str, Any]:
    """A result as it was written; its scores of `total` as an array."""
    result = json.loads(path.read_text())
    return {**result, "total": unpacked(result["total"])} if "total" in result else result


def kept(method: Method, seed: int, setting: Setting, root: Path = RESULTS) -> dict[str, Any] | None:
    """The result of a job, or None if there is none of this content."""
    path = file(method.name, seed, setting, root)
    if not path.exists():
        return None
    result = read(path)
    return result if result["key"] == key(method, seed, setting) else None


def keep(result: dict[str, Any], path: Path) -> None:
    """Write a result; ``total`` is its scores of single prompts."""
    content = {**result, "total": packed(result["total"])}
    write_atomic(path, (json.dumps(rounded(content), indent=None) + "\n").encode())


def packed(scores: Iterable[float]) -> str:
    """Scores in 0..1 as text, two bytes each before base64."""
    levels = np.rint(np.clip(np.asarray(list(scores), float), 0, 1) * LEVELS).astype("<u2")
    return base64.b64encode(levels.tobytes()).decode()


def unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<u2") / LEVELS


def rounded(value: Any) -> Any:
    """Numbers with four digits that count, so that files stay small."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, (list, tuple)) else value


# ---- tuning


def tried(path: Path = TRIED) -> list[dict[str, Any]]:
    """Every setting that was tried, a line each."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add(line: dict[str, Any], path: Path = TRIED) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as handle:
        handle.write(json.dumps(rounded(line)) + "\n")


def chosen(method: str, regime: str, model: str, lines: Iterable[dict[str, Any]]) -> tuple[str, ...] | None:
    """The settings of ``method`` with the highest win rate of those tried on the seed for tuning, the first of equals;
    None if none were tried."""
    wanted = (method, regime, model, TUNING)
    own = [line for line in lines if tuple(line[name] for name in ("method", "regime", "model", "seed")) == wanted]
    best = max(own, key=lambda line: line["win"][0], default=None)
    return None if best is None else tuple(best["settings"])


def line_of(recipe: Recipe, tried: Method, result: dict[str, Any]) -> dict[str, Any]:
    """A trial of ``recipe`` as a line of tried.jsonl."""
    last = result["curve"][-1]
    names = ("regime", "model", "key", "seed", "steps", "seconds")
    calls = {"calls": round(last["forward"] + 2 * last["backward"])}
    wins = {"win": last["total"]["win"], "following": last["following"]["win"], "n": last["n"]}
    settings = list(tried.overrides[recipe.common :])
    return {"method": recipe.tuned, "settings": settings, **{name: result[name] for name in names}, **calls, **wins}
