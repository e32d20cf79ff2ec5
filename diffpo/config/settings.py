"""A run's settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, Field, field_validator, model_validator

from .objective import ObjectiveSettings
from .reader import numbers, read
from .section import Section


class Model(Section):
    """A diffusers pipeline, a local folder or a hub id; or one file, .safetensors (docs/models.md)."""

    path: str
    family: str | None = None  # of a pipeline that diffpo has no family for: package.module:Class (docs/extending.md)
    config: str | None = None  # of one file: whose configs it has; a folder, a hub id, sd1, sd2, sd2-v, sdxl or sdxl-v
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
    train_split: str = "train"  # of a hub id, or of a folder that holds several
    validation_split: str = "validation"
    roots: list[str] = Field(
        default_factory=list
    )  # further folders whose files rows may name; without, only the data's own
    columns: Columns = Columns()
    limit: int | None = Field(None, gt=0)  # only the first rows of each source
    streaming: bool = False  # copy only the rows and columns that are needed, of a hub id or parquet: docs/data.md
    resolution: int = Field(gt=0, multiple_of=8)
    background: str = "white"  # behind transparent pixels: a colour's name or #rrggbb
    buckets: bool = False  # aspect ratios are kept, sizes within a group may differ: docs/data.md
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    caption_dropout: float = Field(0.0, ge=0, lt=1)
    ties: Literal["drop", "soft"] = "drop"  # drop: hard labels, ties left out; soft: labels are probabilities
    bad_rows: Literal["error", "skip"] = "error"
    list_size: int = Field(4, gt=1)  # images of a ranked list that a list link sees
    curriculum: int = Field(1, gt=0)  # groups of pairs by score gap, easiest first; 1: all at once
    curriculum_updates: int = Field(500, gt=0)  # updates until the next group is added
    cache: str = Field("~/.cache/diffpo", validate_default=True)  # latents and text embeddings, shared by all runs
    cache_latents: bool = True

    @field_validator("background", mode="after")
    @classmethod
    def _colour(cls, background: str) -> str:
        from PIL import ImageColor

        if len(ImageColor.getrgb(background)) != 3:
            raise ValueError("expected a colour that lets nothing through, e.g. white or #808080")
        return background


# where the data are, which may change: a checkpoint knows a hash of what is learnt from
PLACES = ("train", "validation", "prompts", "train_split", "validation_split", "roots")
Output = Annotated[Path, AfterValidator(Path.expanduser)]


class Lora(Section):
    kind: Literal["lora", "dora", "lokr"] = "lora"  # docs/export.md says what reads them
    rank: int = Field(8, gt=0)
    alpha: float | None = Field(None, gt=0)  # null: equal to the rank
    targets: list[str] | None = Field(None, min_length=1)  # null: the attention projections of the model's family
    start: str | None = None  # train on from this LoRA, a file or folder; it is the reference too

    @property
    def scale_alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)


class Optimisation(Section):
    """How anything is trained here: a LoRA (`Train`) or a scorer (step_scorer.py)."""

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
        return numbers(args)  # no field says that eps is a number, and plain YAML reads `eps: 1e-8` as text


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
    output: Output

    @model_validator(mode="after")
    def _makes_sense(self) -> Config:
        if reason := _problem(self):
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
        rate does not depend on the number of steps a run may be made longer. Data may lie elsewhere: what it holds is
        compared when a checkpoint is read.
        """
        settings = self.model_dump(mode="json")
        for key in ("log", "output"):
            del settings[key]
        for key in (*PLACES, "cache", "cache_latents", "streaming"):
            del settings["data"][key]
        del settings["objective"]["rollout"]["labels"]
        del settings["model"]["attention"]
        free = ["compile", "gradient_checkpointing", "checkpoint_every", "checkpoint_keep", "eval_every", "eval_pairs"]
        if self.train.lr_schedule == "constant":
            free.append("steps")
        for key in [*free, "batch_size", "accumulation"]:  # their product is compared when a checkpoint is read
            del settings["train"][key]
        return settings


def load_config(path: str | Path, overrides: Sequence[str] = (), kind: type[BaseModel] = Config) -> Any:
    """Read a YAML file, apply ``overrides`` such as ``train.lr=1e-5`` and validate it as ``kind``.

    Raises DiffpoError that names the file and the key: unreadable file, unknown key, wrong type.
    """
    return read(path, overrides, kind)


def _problem(config: Config) -> str | None:
    """Why the objective and the rest of the config make no sense together; None if they do."""
    objective, data = config.objective, config.data
    from_data = not objective.on_policy or objective.source == "self_play"
    if from_data and data.train is None:
        return f"objective {objective.name} learns from data: set data.train"
    if not from_data and data.prompts is None and objective.rollout.labels is None:
        return (
            f"objective {objective.name} (source {objective.source}) samples for prompts of its own: set data.prompts, "
            f"e.g. to a text file with one prompt in a line"
        )
    if config.lora is None and config.model.base_weights != "full":
        return f"model.base_weights={config.model.base_weights} cannot be trained, only a LoRA on them: set lora.rank=8"
    if config.lora is not None and config.lora.kind != "lora" and config.model.base_weights != "full":
        return (
            f"lora.kind={config.lora.kind} needs the base's weights as they are: set model.base_weights=full, or "
            f"lora.kind=lora"
        )
    if config.train.compile and config.model.base_weights == "fp8":
        return "train.compile would break off at each layer that is kept as fp8: set train.compile=false"
    if objective.users and config.lora is None:
        return "objective.users trains tokens beside a LoRA, and lora=null trains the whole network: set lora.rank=8"
    if objective.users and data.columns.user is None:
        return "objective.users needs to know whose preference a pair is: name the column with data.columns.user=NAME"
    if objective.users and not (data.cache_latents and data.crop == "center" and not data.flip):
        return (
            "objective.users reads tastes from cached latents: set data.cache_latents=true, data.crop=center and "
            "data.flip=false"
        )
    if data.buckets and (data.curriculum > 1 or objective.on_policy or objective.users):
        other = "data.curriculum" if data.curriculum > 1 else "objective.users" if objective.users else objective.name
        return f"data.buckets gives each update pictures of one size, which {other} does not go with"
    if data.buckets and (
        objective.weighting == "measured" or (objective.source == "inversion" and objective.inversion.cache)
    ):
        other = "objective.weighting=measured" if objective.weighting == "measured" else "objective.inversion.cache"
        return f"data.buckets gives pictures of several sizes, and {other} mixes them in a batch"
    if data.curriculum > 1 and objective.on_policy:
        return "data.curriculum orders the pairs of data.train, and this objective samples its own"
    return None
