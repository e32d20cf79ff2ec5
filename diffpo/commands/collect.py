"""`diffpo collect`: pictures for people to compare, with the trajectories that a training on their verdicts needs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from .. import models
from ..common import lock
from ..common.errors import DiffpoError
from ..common.files import whole_file, write_atomic, writing
from ..common.text import plain, read_text
from ..common.worker import Worker
from ..config import Config
from ..data.prompts import load_prompts
from ..models.identity import base_identity
from ..objective.reference import Reference
from ..problems.policy import Policy
from ..rollout.labelled import kept, trajectory_file
from ..rollout.labels import image_name
from ..rollout.prompts import PromptConditions
from ..rollout.round import ImageRounds
from ..scorers.step.base import pictures
from ..train import build
from ..weights import trained


def collect(config: Config, out: Path | None = None) -> Path:
    """Sample every prompt of ``data.prompts`` ``rollout.samples`` times with the base model, or with the LoRA that
    ``lora.start`` names, and write, into ``out`` (default: the folder of ``rollout.labels``),

        images/00003-1.png                  prompt 3, image 1
        trajectories/00003.safetensors      states (samples, steps + 1, C, h, w) of prompt 3, float32
        labels.jsonl                        a line for each pair: {"prompt", "image_0", "image_1", "label_0": null}

    and return the labels' path. label_0 is for people to fill in: 1 if image_0 is better, 0 if image_1 is, 0.5 for a
    tie; null means not judged. The same command continues where it stopped, and labels are never overwritten.
    """
    labels = _checked(config, out)
    accelerator = build.make_accelerator(config.train)
    if accelerator.num_processes > 1:
        raise DiffpoError("collect runs in one process; start it without `accelerate launch`")
    with lock.held(labels.parent):
        return _collect(config, labels, accelerator)


def _collect(config: Config, labels: Path, accelerator: Any) -> Path:
    folder, rollout, seed = labels.parent, config.objective.rollout, config.train.seed
    assert config.data.prompts is not None  # noqa: S101 (see `_checked`)
    prompts = load_prompts(config.data.prompts)
    _check_target(labels)
    family = models.load(config.model, config.train.precision, config.data.resolution)
    family.load_encoders(accelerator.device)
    conditions = PromptConditions(prompts, config.data, family, Worker.of(accelerator))
    family.free_encoders(keep_vae=True)
    weights = trained.load(config, family, accelerator.device)
    start = config.lora.start if config.lora else None
    if start is not None:
        weights.begin(config, family)
    network = weights.network
    # there are no preferences yet
    objective = config.objective.model_copy(update={"rollout": rollout.model_copy(update={"scorers": []})})
    policy = Policy(family, network, accelerator.autocast)
    rounds = ImageRounds(objective, conditions, policy, Reference(policy), seed)
    made = {"base": base_identity(network)["hash"], "seed": seed, "samples": rollout.samples}
    made["resolution"] = config.data.resolution
    if start is not None:
        made["lora"] = trained.file_hash(start)
    about = {"rollout": json.dumps(kept(rollout)), "made": json.dumps(made)}
    names = [f"{number:05d}" for number in range(len(prompts))]
    done = {number for number, name in enumerate(names) if trajectory_file(folder, name).exists()}
    for number in sorted(done):
        _check_same(trajectory_file(folder, names[number]), about)
    with writing(labels):
        _write_labels(labels, prompts, rollout.samples)
        with tqdm(total=len(names), initial=len(done), desc="sampling", unit="prompt", delay=1) as bar:
            for part in rounds.portions([number for number in range(len(names)) if number not in done]):
                states = rounds.trajectories(0, part, part)
                for number, own in zip(part, states, strict=True):
                    for sample, picture in enumerate(pictures(family.decode(own[:, -1]))):
                        with whole_file(folder / image_name(number, sample)) as file:
                            picture.save(file, "PNG")
                    content = save({"states": own.contiguous()}, about)
                    write_atomic(trajectory_file(folder, names[number]), content)
                    bar.update()
    return labels


def _check_target(labels: Path) -> None:
    """DiffpoError if there are pictures without labels. This verb writes the labels first, so they are not its own."""
    if not labels.exists() and any(any((labels.parent / name).glob("*")) for name in ("images", "trajectories")):
        raise DiffpoError(
            f"{labels.parent} holds images or trajectories but no {labels.name}; choose another folder with --out"
        )


def _check_same(path: Path, about: dict[str, str]) -> None:
    """DiffpoError if the trajectories in ``path`` were sampled with other settings, which must not be mixed."""
    try:
        with safe_open(path, "pt") as file:
            there = {key: json.loads((file.metadata() or {}).get(key, ours)) for key, ours in about.items()}
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise DiffpoError(
            f"cannot read {path}: {plain(error, 200)}. Delete it and run the same command again"
        ) from None
    for key, ours in about.items():
        if there[key] != json.loads(ours):
            raise DiffpoError(
                f"{path} was sampled with {plain(there[key], 300)}, but the run now has {ours}; choose another folder "
                f"with --out"
            )


def _checked(config: Config, out: Path | None) -> Path:
    """Where the labels go."""
    objective = config.objective
    if objective.source != "trajectory":
        raise DiffpoError(
            f"collect samples trajectories for people to compare, but objective {objective.name} trains on the source "
            f"{objective.source}; use objective.name=d3po"
        )
    if objective.rollout.window is not None:
        raise DiffpoError(
            f"collect samples trajectories with noise in all steps, but objective.rollout.window is "
            f"{objective.rollout.window}; set objective.rollout.window=null"
        )
    if config.data.columns.source or models.family_class(config.model).needs_source:
        raise DiffpoError(
            f"collect shows people no pictures to edit: use a model and prompts without them, not {config.model.path} "
            f"with data.columns.source={config.data.columns.source or 'null'}. For edits, `diffpo label` takes --source"
        )
    if config.data.prompts is None:
        raise DiffpoError("collect needs prompts: set data.prompts to a text file with one prompt per line")
    if out is not None:
        return Path(out).expanduser() / "labels.jsonl"
    if objective.rollout.labels is None:
        raise DiffpoError(
            "collect needs a folder: pass --out FOLDER or set objective.rollout.labels=FOLDER/labels.jsonl"
        )
    return objective.rollout.labels.expanduser()


def _write_labels(path: Path, prompts: Sequence[str], samples: int) -> None:
    """Write the file that people fill in, unless it exists; DiffpoError if it belongs to other pictures."""
    rows = [
        {"prompt": prompt, "image_0": image_name(number, first), "image_1": image_name(number, second), "label_0": None}
        for number, prompt in enumerate(prompts)
        for first, second in itertools.combinations(range(samples), 2)
    ]
    if not path.exists():
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        return
    try:
        there = [json.loads(line) for line in read_text(path).split("\n") if line.strip()]
        found = {_pair(row) for row in there}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DiffpoError(
            f"cannot read the labels {path}: {type(error).__name__} {plain(error, 200)}. Correct it, or choose another "
            f"folder with --out"
        ) from None
    if found - {_pair(row) for row in rows}:
        raise DiffpoError(f"{path} holds labels of other prompts or images; choose another folder with --out")


def _pair(row: dict) -> tuple:
    return row.get("prompt"), row.get("image_0"), row.get("image_1")
