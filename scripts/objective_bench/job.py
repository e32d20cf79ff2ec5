"""One training under the budget, measured on the way: win rates over the base model, calls, seconds, memory."""

from __future__ import annotations

import functools
import json
import math
import resource
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from diffpo.commands.quickstart import ROOT
from diffpo.config import Config, load_config
from diffpo.evaluation import signals, statistics
from diffpo.evaluation.generation import Generation

from .data import MODEL, PAIRS, VALIDATION
from .methods import Method

SCORES = ("shapes.total", "shapes.following", "shapes.appearance", "shapes.all_right")
# how the pictures that are compared are made
GENERATION = Generation(MODEL, steps=6, guidance=3.0, batch_size=64, device="cpu")
PARTS = 3  # measurements, the last one at the end
DIVERSE_PROMPTS, DIVERSE_SEEDS = 16, 4


@dataclass(frozen=True)
class Setting:
    """What all jobs share. ``budget``: forward calls + 2 x backward calls, in samples; ``n`` held-out prompts at the
    end, the first ``n_curve`` of them on the way."""

    folder: Path
    budget: int
    n: int
    n_curve: int


def cost(forward: float, backward: float) -> float:
    """A backward pass costs about two forward ones."""
    return forward + 2 * backward


def run(method: Method, seed: int, setting: Setting) -> dict[str, Any]:
    """Train ``method`` with ``seed`` until the budget is used and measure it; the result is kept as JSON."""
    file = setting.folder / "results" / f"{method.name}-{seed}.json"
    if file.exists():
        return json.loads(file.read_text())
    output = setting.folder / "runs" / f"{method.name}-{seed}"
    shutil.rmtree(output, ignore_errors=True)
    steps = affordable(method, seed, setting, output)
    every = math.ceil(steps / PARTS)
    config = configure(method, seed, setting, output, steps, every)
    started = time.perf_counter()
    from diffpo.train.loop import train

    train(config)
    seconds = time.perf_counter() - started
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    base = json.loads((setting.folder / "base.json").read_text())
    curve = []
    for step in [*range(every, steps, every), steps]:
        n = setting.n if step == steps else setting.n_curve
        tuned = draw(output / f"checkpoint-{step:06d}", range(n))
        calls = {name: rows[step - 1][f"calls/{name}"] for name in ("forward", "backward")}
        curve.append({"step": step, **calls, "n": n, **compare(base["scores"], tuned["scores"], n)})
    result = {
        "method": method.name,
        "seed": seed,
        "steps": steps,
        "seconds": seconds,
        "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "curve": curve,
        "diversity": diversity(output / f"checkpoint-{steps:06d}"),
        "log": tail(rows),
        "scores": {name: [round(value, 5) for value in values] for name, values in tuned["scores"].items()},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1))
    shutil.rmtree(output)
    return result


def configure(method: Method, seed: int, setting: Setting, output: Path, steps: int, every: int) -> Config:
    places = {f"${name.upper()}": str(setting.folder / name) for name in ("data", "scorers")}
    overrides = [functools.reduce(lambda s, name: s.replace(name, places[name]), places, o) for o in method.overrides]
    return load_config(
        ROOT / "configs" / "quickstart.yaml",
        [
            f"model.path={MODEL}",
            f"data.train={PAIRS}",
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


def affordable(method: Method, seed: int, setting: Setting, output: Path) -> int:
    """How many updates the budget pays for, from the cost of the first few."""
    if method.updates:
        return method.updates
    config = configure(method, seed, setting, output, 1, 1)
    trial = config.objective.rollout.updates if config.objective.on_policy else 1
    from diffpo.train.loop import train

    train(configure(method, seed, setting, output, trial, trial))
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    shutil.rmtree(output)
    return max(1, int(setting.budget / (cost(last["calls/forward"], last["calls/backward"]) / trial)))


def tail(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the log says at the end: means over the last quarter of the updates, and the last held-out accuracy."""
    last = rows[-max(1, len(rows) // 4) :]
    names = ("rewards/accuracies", "rewards/margins", "error/chosen_delta", "error/rejected_delta")
    means = {name: [row[name] for row in last if row.get(name) is not None] for name in names}
    found = {name: float(np.mean(values)) for name, values in means.items() if values}
    held_out = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    return {**found, **({"eval/accuracy": held_out[-1]} if held_out else {})}


def draw(lora: Path | None, indices: Iterable[int], seed: int = 0) -> dict[str, Any]:
    """Pictures of held-out prompts, (n, H, W, 3) in 0..1, and their scores by name."""
    from diffpo.evaluation import generate
    from diffpo.scorers.shapes import ShapesScorer
    from diffpo.shapes import heldout_captions
    from diffpo.weights import trained

    pipe = generate.load(GENERATION)
    if lora is not None:
        trained.load_into(pipe, lora)
    captions, scorer = heldout_captions(), ShapesScorer()
    scores: dict[str, list[float]] = {name: [] for name in SCORES}
    pictures: list[np.ndarray] = []
    rest = iter(indices)
    while part := list(islice(rest, GENERATION.batch_size)):
        images = generate.paint(pipe, GENERATION, [generate.Picture(i, seed, captions[i]) for i in part])
        for name, values in scorer.score(images, [captions[i] for i in part]).items():
            if name in scores:
                scores[name] += values.tolist()
        pictures += [np.asarray(image) / 255 for image in images]
    return {"scores": scores, "pictures": np.stack(pictures)}


def diversity(lora: Path | None) -> float:
    """Mean distance between the pictures of one prompt from several seeds."""
    pictures = [draw(lora, range(DIVERSE_PROMPTS), seed)["pictures"] for seed in range(1, 1 + DIVERSE_SEEDS)]
    flat = np.concatenate(pictures).reshape(DIVERSE_PROMPTS * DIVERSE_SEEDS, -1)
    features = flat / np.sqrt(flat.shape[1])  # their distance is the root-mean-square distance of the pictures
    return float(signals.diversity(features, np.tile(np.arange(DIVERSE_PROMPTS), DIVERSE_SEEDS)).mean())


def compare(base: dict[str, list[float]], tuned: dict[str, list[float]], n: int) -> dict[str, Any]:
    """Win rate and mean difference of every score, with intervals, over the first ``n`` prompts."""
    result = {}
    for name in SCORES:
        ours, theirs = np.array(base[name][:n]), np.array(tuned[name])
        rate = statistics.win_rate(ours, theirs, np.arange(n))
        difference = statistics.mean_difference(ours, theirs, np.arange(n), resamples=2000)
        result[name.removeprefix("shapes.")] = {
            "win": [rate.value, rate.low, rate.high],
            "difference": [difference.value, difference.low, difference.high],
        }
    return result
