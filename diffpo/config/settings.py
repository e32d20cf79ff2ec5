"""A run's settings: the sections together, and what must hold between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

from pydantic import BaseModel, Field, model_validator

from .data import PLACES, Data
from .objective import ObjectiveSettings
from .reader import read
from .section import Section
from .training import Lora, Output, Train

Kind = TypeVar("Kind", bound=BaseModel)


class Model(Section):
    """The model to train: a diffusers pipeline as a local folder or a hub id, or one .safetensors file
    (docs/models.md)."""

    path: str
    """A folder, a hub id, or one .safetensors file."""

    family: str | None = None
    """A model family of your own, package.module:Class (its module is imported; docs/extending.md). null: diffpo's
    family for the pipeline."""

    config: str | None = None
    """For one file: where the configs of its pipeline are. A folder, a hub id, sd1, sd2, sd2-v, sdxl or sdxl-v. null:
    those of the released model that the weights belong to."""

    revision: str | None = None
    """Branch, tag or commit of a hub id. null: the latest."""

    variant: str | None = None
    """Variant of the weight files, e.g. fp16. null: files without a variant. For the precision of training see
    train.precision."""

    vae: str | None = None
    """Another VAE, e.g. madebyollin/sdxl-vae-fp16-fix: a folder, a hub id or one file. null: the pipeline's own."""

    guidance: float = Field(3.5, ge=0)
    """The guidance input in training, for networks that have one (FLUX.1-dev). Others ignore it."""

    base_weights: Literal["full", "fp8", "nf4"] = "full"
    """How the frozen network is kept in memory: as it is, or in 8 or 4 bits (docs/scale.md)."""

    offload: bool = False
    """Keep the frozen network and the text encoders in the CPU's memory. Each layer's weights go to the GPU while it
    computes, and each text encoder while it encodes (docs/scale.md). Less GPU memory, more time."""

    vae_tile: int | None = Field(None, ge=64, multiple_of=64)
    """Encode and decode images in overlapping tiles of so many pixels, e.g. 512. null: whole images. Latents and
    pictures differ a little (docs/scale.md)."""

    attention: str | None = None
    """diffusers' attention backend, e.g. flash or xformers. null: its default."""


class SampleSettings(Section):
    """Pictures that are sampled while training, always for the same prompts and noise, into OUTPUT/samples."""

    prompts: str
    """Prompts that are not trained on: a file as for data.prompts, or shapes:heldout."""

    n: int = Field(16, gt=0)
    """The first so many prompts. The stop rule needs more (docs/statistics.md)."""

    every: int = Field(100, gt=0)
    """Updates between two looks. There is one before the first update and one after the last."""

    steps: int = Field(20, gt=0)
    """Model calls for a picture, by the default solver."""

    guidance: float = 5.0
    """Scale of classifier-free guidance. 1: none."""

    scorers: list[str] = Field(default_factory=list)
    """Scorers as in `diffpo eval`, e.g. [pickscore, hps]. They stay in memory. Their means and their win rates over the
    first look go into the metrics."""


class Log(Section):
    """Where metrics go, beside metrics.jsonl in the output folder."""

    tensorboard: bool = False
    """The same as tensorboard in log.trackers."""

    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow", "swanlab", "aim"]] = Field(default_factory=list)
    """Also send the settings, metrics and pictures there. Each needs the extra of its name, and all but TensorBoard
    (OUTPUT/tensorboard) have their own settings in the environment."""

    samples: SampleSettings | None = None
    """Sample pictures while training. null: none."""


class Config(Section):
    """The settings of `diffpo train`."""

    model: Model
    """The model to train."""

    data: Data
    """What it is trained on."""

    lora: Lora | None = Lora()
    """The LoRA. null: all weights of the network are trained (docs/export.md)."""

    objective: ObjectiveSettings
    """The method."""

    train: Train
    """How it is trained."""

    log: Log = Log()
    """Where metrics go."""

    output: Output
    """Folder of the run: the LoRA, checkpoints, metrics and the resolved config. The same command resumes the run."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Config:
        if reason := _problem(self):
            raise ValueError(reason)
        return self

    def identity(self) -> dict:
        """The settings that decide what a run computes: two configs with equal identity may share an output folder.

        How often things are saved or measured may change, and so may the division of a batch. A run may be made longer
        if its learning rate does not depend on the number of steps. Data may lie elsewhere: their content is compared
        when a checkpoint is read.
        """
        settings = self.model_dump(mode="json")
        for key in ("log", "output"):
            del settings[key]
        for key in (*PLACES, "cache", "cache_latents", "streaming"):
            del settings["data"][key]
        del settings["objective"]["rollout"]["labels"]
        for key in ("attention", "offload"):
            del settings["model"][key]
        free = ["compile", "gradient_checkpointing", "checkpoint_every", "checkpoint_keep", "eval_every", "eval_pairs"]
        free.append("stop_when")
        if self.train.lr_schedule == "constant":
            free.append("steps")
        for key in [*free, "batch_size", "accumulation"]:  # their product is compared when a checkpoint is read
            del settings["train"][key]
        return settings


@overload
def load_config(path: str | Path, overrides: Sequence[str] = (), *, imports: bool = True) -> Config: ...
@overload
def load_config(path: str | Path, overrides: Sequence[str], kind: type[Kind], imports: bool = True) -> Kind: ...
def load_config(
    path: str | Path, overrides: Sequence[str] = (), kind: type[BaseModel] = Config, imports: bool = True
) -> Any:
    """Read a YAML file, apply ``overrides`` such as ``train.lr=1e-5`` and validate it as ``kind``.

    A link or preset of the user's is imported, which runs its module. ``imports`` False: not, see `stored_identity`.
    Raises DiffpoError that names the file and the key: unreadable file, unknown key, wrong type.
    """
    return read(path, overrides, kind, imports)


def stored_identity(settings: Mapping[str, Any], kind: Any = Config) -> dict:
    """`Config.identity` of the settings in a checkpoint. Somebody else may have written them, so the modules that they
    name are not imported, and what needs these is not checked."""
    return kind.model_validate(settings, context={"imports": False}).identity()


def _problem(config: Config) -> str | None:
    """Why the objective and the rest of the config make no sense together; None if they do."""
    objective, data = config.objective, config.data
    from_data = not objective.on_policy or objective.source == "self_play"
    if objective.beta == "auto" and data.validation is None:
        return (
            "objective.beta=auto is chosen on pairs that are not trained on: name them in data.validation, or write a "
            "number"
        )
    if from_data and data.train is None:
        return f"objective {objective.name} trains on data: set data.train"
    if objective.source == "reward" and objective.sft and data.train is None:
        return f"objective {objective.name} with objective.sft also trains on images of data: set data.train"
    if not from_data and data.prompts is None and objective.rollout.labels is None:
        return (
            f"objective {objective.name} (source {objective.source}) samples images for prompts: set data.prompts to a "
            f"text file with one prompt per line"
        )
    if objective.rollout.labels is not None and data.columns.source is not None:
        return "data.columns.source has no effect with objective.rollout.labels, whose prompts are texts: leave one out"
    if data.curriculum == 1 and (data.curriculum_updates != 500 or not data.curriculum_keeps):
        return "data.curriculum_updates and data.curriculum_keeps have no effect with data.curriculum=1: set it too"
    if config.lora is None and config.model.base_weights != "full":
        return f"{config.model.base_weights} weights cannot be trained: set model.base_weights=full, or train a LoRA"
    if config.lora is not None and config.lora.text_encoders and (other := _needs_fixed_text(config)):
        return f"lora.text_encoders does not work with {other}: set lora.text_encoders=false, or change that"
    if config.model.offload:
        if config.lora is None:
            return "model.offload keeps frozen weights, but lora=null trains all: set model.offload=false, or a LoRA"
        if config.lora.kind == "dora":
            return "a DoRA computes with the base's weights in each pass: set model.offload=false or lora.kind=lora"
        if config.model.base_weights == "nf4":
            return "model.offload does not work with nf4: set model.offload=false, or model.base_weights=fp8"
        if config.train.compile:
            return "train.compile does not work with model.offload: set train.compile=false"
    if config.lora is not None and config.lora.kind != "lora" and config.model.base_weights != "full":
        return (
            f"lora.kind={config.lora.kind} needs the base model's full weights: set model.base_weights=full or "
            f"lora.kind=lora"
        )
    if (stop := config.train.stop_when) is not None:
        if config.log.samples is None or not config.log.samples.scorers:
            return "train.stop_when judges pictures: set log.samples.prompts and log.samples.scorers"
        if stop.train_scorer is None and not (objective.on_policy and objective.rollout.scorers):
            return "train.stop_when must know which score is trained on: set train.stop_when.train_scorer=NAME"
    if config.train.compile and config.model.base_weights == "fp8":
        return "train.compile does not work with model.base_weights=fp8: set train.compile=false"
    conditioned = "objective.users" if objective.users else "objective.steered" if objective.steered else None
    if conditioned and config.lora is None:
        return f"{conditioned} needs a LoRA, but lora=null trains all weights: set lora.rank=8"
    if conditioned and config.train.compile:
        return f"train.compile does not work with {conditioned}: set train.compile=false"
    if objective.steered != bool(data.columns.rewards):
        return "objective.steered and data.columns.rewards belong together: set both, or neither"
    if objective.users and data.columns.user is None:
        return "objective.users needs the user of each pair: name the column with data.columns.user=NAME"
    if objective.users and not (data.cache_latents and data.crop == "center" and not data.flip):
        return "objective.users needs cached latents: set data.cache_latents=true, data.crop=center and data.flip=false"
    if data.columns.mask is not None:
        if objective.on_policy:
            return f"data.columns.mask is of the data's images, but {objective.name} samples its own: leave it out"
        if objective.error != "squared" or objective.winner_safeguard is not None:
            key = "error=perceptual" if objective.error != "squared" else "winner_safeguard"
            return f"data.columns.mask weighs squared errors, which {key} does not use alone: leave one of them out"
    if (data.columns.t_low or data.columns.t_high) and objective.source != "forward":
        return f"data.columns.t_low and t_high limit the noise of source forward, not of {objective.source}"
    if (data.columns.t_low or data.columns.t_high) and objective.forward.timesteps:
        return "data.columns.t_low and t_high draw from their own range: leave out objective.forward.timesteps"
    if data.buckets and (data.curriculum > 1 or objective.on_policy or objective.users):
        other = "data.curriculum" if data.curriculum > 1 else "objective.users" if objective.users else objective.name
        return f"data.buckets does not work with {other}: set data.buckets=false"
    if data.buckets and (
        objective.weighting == "measured" or (objective.source == "inversion" and objective.inversion.cache)
    ):
        other = "objective.weighting=measured" if objective.weighting == "measured" else "objective.inversion.cache"
        return f"data.buckets does not work with {other}, which mixes sizes in a batch: set data.buckets=false"
    if data.curriculum > 1 and objective.on_policy:
        return (
            "data.curriculum orders the pairs of data.train, but this objective samples its own: set data.curriculum=1"
        )
    return None


def _needs_fixed_text(config: Config) -> str | None:
    """What of the config uses text embeddings elsewhere than in the policy and its reference, or copies of adapters."""
    objective, lora = config.objective, config.lora
    assert lora is not None  # noqa: S101 (called for text encoders that are adapted)
    found = {
        f"lora.kind={lora.kind}": lora.kind != "lora",
        "lora.start": lora.start is not None,
        "model.offload": config.model.offload,
        f"objective.reference.policy={objective.reference.policy}": objective.reference.policy
        not in ("adapter_off", "none"),
        f"objective.behaviour.policy={objective.behaviour.policy}": objective.behaviour.policy != "none",
        "objective.error=perceptual": objective.error != "squared",
        "objective.source=inversion": objective.source == "inversion",
        "objective.rollout.step_scorer": objective.rollout.step_scorer is not None,
        "objective.users": bool(objective.users),
        "objective.steered": objective.steered,
    }
    return next((name for name, there in found.items() if there), None)
