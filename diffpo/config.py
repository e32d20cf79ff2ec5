"""A run's settings: a YAML file and `a.b=c` overrides, checked by pydantic; an unknown key names the nearest one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from .config_objective import Forward, Inversion, ObjectiveSettings, ReferenceSettings, Rollout, Section
from .errors import DiffpoError

__all__ = [
    "Config",
    "Forward",
    "Inversion",
    "ObjectiveSettings",
    "ReferenceSettings",
    "Rollout",
    "load_config",
]


class Model(Section):
    """A diffusers pipeline: a local folder or a hub id."""

    path: str
    revision: str | None = None
    variant: str | None = None  # e.g. fp16: which weight files are read, not the precision of the training
    vae: str | None = None  # a folder or hub id that replaces the pipeline's VAE, e.g. madebyollin/sdxl-vae-fp16-fix
    guidance: float = Field(3.5, ge=0)  # what a network with guidance as an input (FLUX.1-dev) is told in training
    base_weights: Literal["full", "fp8", "nf4"] = "full"  # how the frozen network is kept: docs/scale.md
    attention: str | None = None  # diffusers' attention backend, e.g. flash or xformers; null: its default


class Columns(Section):
    """Which columns hold what; null looks for the usual names (docs/data.md lists them)."""

    caption: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    image_0: str | None = None
    image_1: str | None = None
    label_0: str | None = None
    label_1: str | None = None
    has_label: str | None = None  # rows where it is false were judged by nobody and are left out
    score_0: str | None = None  # scores of image_0/image_1 (or of chosen/rejected), for links that ask for a gap
    score_1: str | None = None
    caption_chosen: str | None = None  # a caption for each image of a pair (DCPO)
    caption_rejected: str | None = None
    image: str | None = None  # single images with a like (1) or dislike (0)
    liked: str | None = None
    images: str | None = None  # ranked lists: images with scores (higher is better) or ranks (1 is best)
    scores: str | None = None
    ranks: str | None = None
    user: str | None = None  # whose preference it is


class Data(Section):
    """Pairs, ranked lists or single images, from files, folders or the hub: docs/data.md. Objectives that sample for
    themselves take prompts instead."""

    train: str | None = None
    validation: str | None = None  # pairs, for held-out accuracy
    prompts: str | None = None  # what on-policy objectives sample for: see `diffpo generate --prompts`
    train_split: str = "train"  # the splits of a hub id
    validation_split: str = "validation"
    columns: Columns = Columns()
    limit: int | None = Field(None, gt=0)  # only the first rows of each source
    streaming: bool = False  # copy only the rows and columns that are needed, of a hub id or parquet: docs/data.md
    resolution: int = Field(gt=0, multiple_of=8)
    buckets: bool = False  # aspect ratios are kept, sizes within a group may differ: docs/data.md
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    caption_dropout: float = Field(0.0, ge=0, lt=1)
    ties: Literal["drop", "soft"] = "drop"  # drop: hard labels, ties left out; soft: labels are probabilities
    bad_rows: Literal["error", "skip"] = "error"
    list_size: int = Field(4, gt=1)  # images of a ranked list that a list link sees
    curriculum: int = Field(1, gt=0)  # groups of pairs by score gap, easiest first; 1: all at once
    curriculum_updates: int = Field(500, gt=0)  # updates until the next group is added
    cache: str = "~/.cache/diffpo"  # latents and text embeddings, shared by all runs
    cache_latents: bool = True


class Lora(Section):
    rank: int = Field(8, gt=0)
    alpha: float | None = Field(None, gt=0)  # null: equal to the rank
    targets: list[str] | None = Field(None, min_length=1)  # null: the attention projections of the model's family
    start: str | None = None  # train on from this LoRA, a file or folder in diffusers' format; it is the reference too

    @property
    def scale_alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)


class Optimisation(Section):
    """How anything is trained here: a LoRA (`Train`) or a scorer (scorers/config.py)."""

    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)  # pairs (or lists, images, transitions' pairs) per device and forward pass
    accumulation: int = Field(1, gt=0)
    lr: float = Field(gt=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = Field(0, ge=0)
    optimizer: str = "torch.optim.AdamW"
    optimizer_args: dict[str, Any] = Field(default_factory=dict)
    max_grad_norm: float | None = Field(1.0, gt=0)
    seed: int = Field(0, ge=0, lt=2**63)
    precision: Literal["no", "bf16", "fp16"] = "no"  # of the base model; what is trained is float32
    checkpoint_every: int = Field(500, gt=0)

    @field_validator("optimizer_args", mode="after")
    @classmethod
    def _numbers_in_args(cls, args: dict[str, Any]) -> dict[str, Any]:
        return _numbers(args)  # no field says that eps is a number, and plain YAML reads `eps: 1e-8` as text


class Train(Optimisation):
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile of the network's repeated blocks
    checkpoint_keep: int = Field(2, gt=0)
    eval_every: int = Field(100, gt=0)
    eval_pairs: int = Field(256, gt=0)


class Log(Section):
    tensorboard: bool = False


class Config(Section):
    model: Model
    data: Data
    lora: Lora | None = Lora()  # null: the whole network is trained (docs/export.md)
    objective: ObjectiveSettings
    train: Train
    log: Log = Log()
    output: Path

    @field_validator("output", mode="after")
    @classmethod
    def _home(cls, output: Path) -> Path:
        return output.expanduser()

    @model_validator(mode="after")
    def _makes_sense(self) -> Config:
        from .compose import run_problem

        if reason := run_problem(self):
            raise ValueError(reason)
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> Config:
        if self.train.warmup > self.train.steps:
            raise ValueError(f"train.warmup ({self.train.warmup}) is longer than train.steps ({self.train.steps})")
        return self

    def to_yaml(self) -> str:
        """The resolved settings; the text is a config file of its own."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def identity(self) -> dict:
        """The settings that decide what a run computes: two configs with equal identity may share an output folder.

        How often things are saved or measured may change, the batch may be cut up otherwise, and where the learning
        rate does not depend on the number of steps a run may be made longer.
        """
        settings = self.model_dump(mode="json")
        for key in ("log", "output"):
            del settings[key]
        for key in ("cache", "cache_latents", "streaming"):
            del settings["data"][key]
        del settings["model"]["attention"]
        free = ["compile", "gradient_checkpointing", "checkpoint_every", "checkpoint_keep", "eval_every", "eval_pairs"]
        if self.train.lr_schedule == "constant":
            free.append("steps")
        for key in [*free, "batch_size", "accumulation"]:  # their product is compared when a checkpoint is read
            del settings["train"][key]
        return settings


class Loader(yaml.SafeLoader):
    """Plain YAML lets the second of two equal keys win without a word; here they are an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key {key.value!r} is there twice,{key.start_mark}"
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parsed(text: str) -> Any:
    """ValueError if it is no YAML."""
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # what Python says of a 13th month, of `!!int` without digits, of endless brackets
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _numbers(value: Any) -> Any:
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: _numbers(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_numbers(each) for each in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)e[-+]?\d+", value, re.IGNORECASE):
        return float(value)
    if value is None or (isinstance(value, (str, int, float)) and value == value):
        return value
    raise ValueError(f"expected numbers and text, not {_shown(value)}")  # also nan, which equals nothing on resuming


def load_config(path: str | Path, overrides: Sequence[str] = (), kind: type[BaseModel] = Config) -> Any:
    """Read a YAML file, apply ``overrides`` such as ``train.lr=1e-5`` and validate it as ``kind``.

    Raises DiffpoError that names the file and the key: unreadable file, unknown key, wrong type.
    """
    path = Path(path)
    try:
        settings = _parsed(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DiffpoError(
            f"cannot read the config {path}: {error.strerror}; recipes to start from are in configs/"
        ) from None
    except ValueError as error:
        raise DiffpoError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise DiffpoError(f"{path} holds no settings: expected sections such as `model:` and `train:`")
    for override in overrides:
        _apply(settings, override)
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(problem, kind)}" for problem in error.errors())
        raise DiffpoError(f"{path}:\n{problems}") from None
    except RecursionError:
        raise DiffpoError(f"{path}: an alias (*name) stands within what it names") from None


def _apply(settings: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise DiffpoError(f"cannot read the override {override!r}: write section.key=value, e.g. train.lr=1e-5")
    try:
        value = _parsed(text)
    except ValueError:
        raise DiffpoError(f"cannot read the value of the override {override!r}: it is not valid YAML") from None
    *sections, last = key.split(".")
    for section in sections:
        if settings.get(section) is None:
            settings[section] = {}
        settings = settings[section]
        if not isinstance(settings, dict):
            raise DiffpoError(f"cannot apply the override {override!r}: {section} is a value, not a section")
    settings[last] = value


def _explain(problem: dict, kind: type[BaseModel]) -> str:
    """One line on one pydantic error: the key as the user writes it, what is wrong, what to write instead."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        *parents, wrong = problem["loc"]
        known = list(_fields(kind, parents))
        near = difflib.get_close_matches(str(wrong), known, n=1, cutoff=0.6)
        last = {name.rsplit(".")[-1]: name for name in reversed(_all_keys(kind))}
        everywhere = difflib.get_close_matches(str(wrong), last, n=1, cutoff=0.8)
        if near and str(wrong) not in last:  # a key that belongs into another section is nearer than any misspelling
            hint = f"did you mean {'.'.join([*map(str, parents), near[0]])}?"
        elif everywhere:
            hint = f"did you mean {last[everywhere[0]]}?"
        else:
            hint = f"known keys: {', '.join(known)}"
        return f"unknown key {key}: {hint}"
    if problem["type"] == "missing":
        return f"missing key {key}"
    text = problem["msg"].removeprefix("Value error, ")
    if not key:
        return text
    if isinstance(problem["input"], (dict, BaseModel)):  # settings that do not go together, not one value
        return f"{key}: {text}"
    return f"{key}: {text[0].lower()}{text[1:]} (got {_shown(problem['input'])})"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "a very long number"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _fields(model: type[BaseModel], sections: Sequence) -> dict:
    for name in sections:
        model = _section(model.model_fields[name].annotation)
    return model.model_fields


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field's type names, also one that may be null."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if section := _section(field.annotation):
            keys += _all_keys(section, f"{prefix}{name}.")
    return keys
