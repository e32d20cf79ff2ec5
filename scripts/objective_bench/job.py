"""One training under the budget, measured on the way: win rates over the base model, calls, seconds, memory."""

from __future__ import annotations

import functools
import json
import math
import resource
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffpo.common.carried import HOME as ROOT
from diffpo.config import Config, load_config
from diffpo.evaluation import signals, statistics

from . import store
from .data import ASSETS, VALIDATION, drawing
from .methods import Method

if TYPE_CHECKING:
    from diffpo.evaluation.generation import Generation

SCORES = ("shapes.total", "shapes.following", "shapes.appearance")
MODELS = {"tiny-sdxl": ("quickstart", 500), "tiny-dit": ("quickstart_dit", 100)}  # the config and its beta, $BETA
PARTS = 3  # measurements, the last one at the end
DIVERSE_PROMPTS, DIVERSE_SEEDS = 16, 4


@dataclass(frozen=True)
class Setting:
    """What all jobs share. ``budget``: forward calls + 2 x backward calls, in samples; ``n`` held-out prompts at the
    end, the first ``n_curve`` of them on the way; ``regime``: what the data are (data.py)."""

    folder: Path
    budget: int
    n: int
    n_curve: int
    model: str = "tiny-sdxl"
    regime: str = "own"

    @property
    def label(self) -> str:
        return self.regime if self.model == "tiny-sdxl" else f"{self.regime}-{self.model}"

    @property
    def data(self) -> Path:
        return self.folder / f"data-{self.regime}"

    @property
    def base(self) -> Path:
        """The base model's scores, which do not depend on the regime."""
        return self.folder / f"base-{self.model}-{self.n}.json"


def generation(model: str) -> Generation:
    """How the pictures that are compared are made."""
    return drawing(model, 6, 3.0)


def cost(forward: float, backward: float) -> float:
    """A backward pass costs about two forward ones."""
    return forward + 2 * backward


def run(method: Method, seed: int, setting: Setting) -> dict[str, Any]:
    """The result of `measure`, from the committed files if it is there."""
    if (found := store.kept(method, seed, setting)) is not None:
        return found
    result = measure(method, seed, setting, PARTS)
    store.keep(result, store.file(method.name, seed, setting))
    return result


def measure(method: Method, seed: int, setting: Setting, parts: int = 1) -> dict[str, Any]:
    """Train ``method`` with ``seed`` until the budget is used, and measure every stage ``parts`` times, the last time
    at its end."""
    output = setting.folder / "runs" / f"{setting.label}-{method.name}-{seed}"
    shutil.rmtree(output, ignore_errors=True)
    base = json.loads(setting.base.read_text())
    curve: list[dict[str, Any]] = []
    seconds, start, spent = 0.0, None, {"step": 0, "forward": 0, "backward": 0}
    for place, (stage, share) in enumerate(stages(method, setting)):
        folder = output / f"stage-{place}"
        steps = affordable(stage, share, folder)
        every = math.ceil(steps / parts)
        if start is not None:
            stage = replace(stage, overrides=(*stage.overrides, f"lora.start={start}"))
        began = time.process_time()
        rows = logged(configure(stage, seed, share, folder, steps, every))
        seconds += time.process_time() - began  # of the CPU: a loaded machine does not change them
        for step in [*range(every, steps, every), steps]:
            start = folder / f"checkpoint-{step:06d}"
            n = setting.n if step == steps else setting.n_curve
            tuned = draw(setting.model, start, range(n))
            now = {"step": step} | {name: rows[step - 1][f"calls/{name}"] for name in ("forward", "backward")}
            now = {name: value + spent[name] for name, value in now.items()}
            curve.append({**now, "n": n, **compare(base["scores"], tuned["scores"], n)})
        spent = now
    result = {
        "method": method.name,
        "seed": seed,
        "regime": setting.regime,
        "model": setting.model,
        "key": store.key(method, seed, setting),
        "settings": list(method.overrides),
        "budget": setting.budget,
        "steps": spent["step"],
        "seconds": round(seconds, 1),
        "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "curve": curve,
        "log": tail(rows),
        "total": np.array(tuned["scores"]["shapes.total"]),
    }
    if parts > 1:
        result["diversity"] = diversity(setting.model, start)
    shutil.rmtree(output)
    return result


def stages(method: Method, setting: Setting) -> list[tuple[Method, Setting]]:
    """The method with the whole budget, or with half of it and `Method.then` with the other half."""
    if method.then is None:
        return [(method, setting)]
    half = replace(setting, budget=setting.budget // 2)
    return [(replace(method, then=None), half), (method.then, half)]


def logged(config: Config) -> list[dict[str, Any]]:
    """Train; the lines of the log, one for each update."""
    from diffpo.train.loop import train

    train(config)
    return [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]


def configure(method: Method, seed: int, setting: Setting, output: Path, steps: int, every: int) -> Config:
    name, beta = MODELS[setting.model]
    places = {"$DATA": str(setting.data), "$SCORERS": str(setting.folder / "scorers"), "$BETA": str(beta)}
    overrides = [functools.reduce(lambda s, name: s.replace(name, places[name]), places, o) for o in method.overrides]
    return load_config(
        ROOT / "configs" / f"{name}.yaml",
        [
            f"model.path={ASSETS / setting.model}",
            f"data.train={setting.data / 'pairs.parquet'}",
            f"data.validation={VALIDATION}",
            f"data.cache={setting.folder / 'cache'}",
            f"objective.name={method.preset}",
            *overrides,
            f"train.seed={seed}",
            f"train.steps={steps}",
            f"train.checkpoint_every={every}",
            f"train.checkpoint_keep={PARTS + 1}",
            f"train.eval_every={steps}",
            "train.eval_pairs=64",
            f"output={output}",
        ],
    )


def affordable(method: Method, setting: Setting, output: Path) -> int:
    """How many updates the budget pays for, from the cost of the first few, which is measured once for all seeds. What
    is spent before the first update (`weighting=measured`) is paid once."""
    if method.updates:
        return method.updates
    file = setting.folder / "costs" / f"{store.key(method, 0, setting)}.json"
    if not file.exists():
        once, updates, first = 0.0, 1, configure(method, 0, setting, output, 1, 1)
        if first.objective.on_policy:
            updates = first.objective.rollout.updates
        spent = calls(method, setting, output, updates)
        if first.objective.weighting == "measured":
            plain = replace(method, overrides=(*method.overrides, "objective.weighting=uniform"))
            once = spent - calls(plain, setting, output, updates)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"once": once, "update": (spent - once) / updates}))
    price = json.loads(file.read_text())
    return max(1, int((setting.budget - price["once"]) / price["update"]))


def calls(method: Method, setting: Setting, output: Path, updates: int) -> float:
    """What the first ``updates`` cost, with all that comes before them."""
    last = logged(configure(method, 0, setting, output, updates, updates))[-1]
    shutil.rmtree(output)
    return cost(last["calls/forward"], last["calls/backward"])


def tail(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the log says at the end: means over the last quarter of the updates, and the last held-out accuracy."""
    last = rows[-max(1, len(rows) // 4) :]
    names = ("rewards/accuracies", "rewards/margins", "error/chosen_delta", "error/rejected_delta")
    means = {name: [row[name] for row in last if row.get(name) is not None] for name in names}
    found = {name: float(np.mean(values)) for name, values in means.items() if values}
    held_out = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    return {**found, **({"eval/accuracy": held_out[-1]} if held_out else {})}


def draw(model: str, lora: Path | None, indices: Iterable[int], seed: int = 0) -> dict[str, Any]:
    """Pictures of held-out prompts, (n, H, W, 3) in 0..1, and their scores by name."""
    from diffpo.evaluation import generate
    from diffpo.scorers.shapes import ShapesScorer
    from diffpo.shapes import heldout_captions
    from diffpo.weights import trained

    way = generation(model)
    pipe = generate.load(way)
    if lora is not None:
        trained.load_into(pipe, lora)
    captions, scorer = heldout_captions(), ShapesScorer()
    scores: dict[str, list[float]] = {name: [] for name in SCORES}
    pictures: list[np.ndarray] = []
    rest = iter(indices)
    while part := list(islice(rest, way.batch_size)):
        images = generate.paint(pipe, way, [generate.Picture(i, seed, captions[i]) for i in part])
        for name, values in scorer.score(images, [captions[i] for i in part]).items():
            if name in scores:
                scores[name] += values.tolist()
        pictures += [np.asarray(image) / 255 for image in images]
    return {"scores": scores, "pictures": np.stack(pictures)}


def diversity(model: str, lora: Path | None) -> float:
    """Mean distance between the pictures of one prompt from several seeds."""
    pictures = [draw(model, lora, range(DIVERSE_PROMPTS), seed)["pictures"] for seed in range(1, 1 + DIVERSE_SEEDS)]
    flat = np.concatenate(pictures).reshape(DIVERSE_PROMPTS * DIVERSE_SEEDS, -1)
    features = flat / np.sqrt(flat.shape[1])  # their distance is the root-mean-square distance of the pictures
    return float(signals.diversity(features, np.tile(np.arange(DIVERSE_PROMPTS), DIVERSE_SEEDS)).mean())


def measure_base(setting: Setting) -> None:
    """Keep the base model's scores, which all jobs are compared with."""
    drawn = draw(setting.model, None, range(setting.n))
    setting.folder.mkdir(parents=True, exist_ok=True)
    setting.base.write_text(json.dumps({"scores": drawn["scores"]}))


def compare(base: dict[str, list[float]], tuned: dict[str, list[float]], n: int) -> dict[str, Any]:
    """Win rate of every score, with its interval, over the first ``n`` prompts."""
    found = {}
    for name in SCORES:
        rate = statistics.win_rate(np.array(base[name][:n]), np.array(tuned[name][:n]), np.arange(n))
        found[name.removeprefix("shapes.")] = {"win": [rate.value, rate.low, rate.high]}
    return found
