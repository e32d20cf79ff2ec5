"""What is trained and how: the sections `lora:` and `train:` of a config."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from .reader import numbers
from .section import Section

Output = Annotated[Path, AfterValidator(Path.expanduser)]


class Lora(Section):
    """The LoRA that is trained."""

    kind: Literal["lora", "dora", "lokr"] = "lora"
    """How weights are adapted. docs/export.md says which programs read which kind."""

    rank: int = Field(8, gt=0)
    """Rank of the update of each layer. Size and memory grow with it."""

    alpha: float | None = Field(None, gt=0)
    """The update is scaled by alpha / rank. null: alpha is the rank, so the scale is 1."""

    targets: list[str] | None = Field(None, min_length=1)
    """Names of the layers to adapt, e.g. [to_q, to_v]. null: the attention projections of the model's family."""

    rank_pattern: dict[str, Annotated[int, Field(gt=0)]] = Field(default_factory=dict)
    """Ranks of single layers by name or by the end of their names, e.g. {conv1: 4}; the first that fits counts. Others
    have lora.rank."""

    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """The same for alpha. Where it says nothing, alpha is lora.alpha, or without that the layer's rank."""

    b_lr_ratio: float = Field(1.0, ge=1)
    """LoRA+ (arXiv 2402.12354): the learning rate of B is so many times train.lr. The paper uses 16."""

    text_encoders: bool = False
    """Adapt the attention of the CLIP text encoders too. They then compute in each step, because their embeddings
    cannot be cached (docs/train.md)."""

    start: str | None = None
    """A LoRA to continue from: a file or the folder of a run. It is also the reference. null: start from zero."""

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _names_of_layers(cls, patterns: dict[str, Any]) -> dict[str, Any]:
        for name in patterns:
            if not re.fullmatch(r"\w+(\.\w+)*", name):
                raise ValueError(f"{name!r} is not the name of a layer, such as conv1 or ff.net.2")
        return patterns

    @model_validator(mode="after")
    def _b_has_a_rate(self) -> Lora:
        if self.kind == "lokr" and self.b_lr_ratio != 1:
            raise ValueError("lora.b_lr_ratio is about LoRA's B, which a LoKr lacks: leave it out, or set lora.kind")
        return self

    @property
    def scale_alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def whole_alpha(self) -> float:
        """`scale_alpha` without a decimal point where it has no decimals, as files have it."""
        return self.scale_alpha if self.scale_alpha % 1 else int(self.scale_alpha)

    @property
    def alphas(self) -> dict[str, float]:
        """`alpha_pattern`, and of what else has a rank of its own: that, unless `alpha` is set."""
        own = self.rank_pattern if self.alpha is None else {}
        return self.alpha_pattern | {name: float(rank) for name, rank in own.items() if name not in self.alpha_pattern}


class Optimisation(Section):
    """How anything is trained here: a LoRA (`Train`) or a scorer (step_scorer.py)."""

    steps: int = Field(gt=0)
    """Number of optimiser updates."""

    batch_size: int = Field(gt=0)
    """Pairs (or lists, or images) per device and forward pass. An update sees batch_size x accumulation x devices."""

    accumulation: int = Field(1, gt=0)
    """Batches whose gradients are added up for an update. Memory stays that of one batch."""

    lr: float = Field(gt=0)
    """Learning rate, after the warm-up."""

    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling to 0 at the last step."""

    warmup: int = Field(0, ge=0)
    """Updates in which the learning rate rises linearly from 0."""

    optimizer: str = "torch.optim.AdamW"
    """A class derived from torch.optim.Optimizer, as package.module.Class or package.module:Class. Its module is
    imported, which runs its code."""

    optimizer_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the optimiser, e.g. {weight_decay: 1e-4}."""

    max_grad_norm: float | None = Field(1.0, gt=0)
    """Gradients are scaled down to this norm. null: never."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of noise, timesteps, order and initial weights."""

    precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the base model: float32 (no), bfloat16 or float16. What is trained is float32 in any case."""

    checkpoint_every: int = Field(500, gt=0)
    """Updates between two checkpoints."""

    @field_validator("optimizer_args", mode="after")
    @classmethod
    def _numbers_in_args(cls, args: dict[str, Any]) -> dict[str, Any]:
        return numbers(args)  # no field says that eps is a number, and plain YAML reads `eps: 1e-8` as text

    @model_validator(mode="after")
    def _warmup_fits(self) -> Optimisation:
        if self.warmup > self.steps:
            raise ValueError(f"train.warmup ({self.warmup}) is longer than train.steps ({self.steps})")
        return self


class StopSettings(Section):
    """When training ends early, by the pictures of `log.samples` (docs/statistics.md): when they show that the score
    that is trained on is being gamed, or when they get no better. The best look is what is written."""

    train_scorer: str | None = None
    """The score that is trained on, e.g. pickscore, as `log.samples.scorers` names it. null: the first of
    objective.rollout.scorers."""

    patience: int = Field(3, gt=0)
    """Stop after so many looks in a row of which none is shown to be better than the best before."""

    false_alarms: float = Field(0.05, gt=0, lt=1)
    """The probability of stopping for hacking where there is none, over all looks of the run together."""


class Train(Optimisation):
    """How the policy is trained."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""

    compile: bool = False
    """torch.compile of the network's repeated blocks. The first update is slow, so it pays off in long runs."""

    checkpoint_keep: int = Field(2, gt=0)
    """Checkpoints to keep, the latest ones."""

    eval_every: int = Field(100, gt=0)
    """Updates between two measurements on data.validation."""

    eval_pairs: int = Field(256, gt=0)
    """Pairs of data.validation to measure on."""

    stop_when: StopSettings | None = None
    """Stop early. null: never."""
