"""The settings of `diffpo train-scorer`: model and data as for `diffpo train`, which scorer, how it is trained."""

from __future__ import annotations

from typing import Literal

import yaml
from pydantic import Field, model_validator

from .section import Section
from .settings import PLACES, Data, Model, Optimisation, Output


class StepScorerSettings(Section):
    kind: Literal["pixel", "latent"]
    clip: str | None = None  # pixel: a CLIPModel with tokenizer and image processor to start from, a folder or hub id
    processor: str | None = None  # its tokenizer and image processor, where they are elsewhere (PickScore_v1's are)
    time_aware: bool = True  # false: the same network, told t = 0 whatever the time is
    times: Literal["all", "clean"] = "all"  # clean: trained at t = 0 on finished pictures alone
    guidance: float = Field(1.0, ge=1)  # pixel: classifier-free guidance of the one model call that gives x_0
    compare: list[str] = Field(default_factory=list)  # scorers to compare with in the end: folders, or shapes.total

    @model_validator(mode="after")
    def _parts_fit(self) -> StepScorerSettings:
        if (self.kind == "pixel") != (self.clip is not None):
            raise ValueError("kind pixel needs scorer.clip, the CLIP to start from, and kind latent has none")
        if self.kind == "latent" and self.guidance != 1:
            raise ValueError("guidance is of the x_0 estimate, which a latent scorer does not look at")
        if self.kind == "latent" and not self.time_aware:
            raise ValueError("a latent scorer's features know the time: time_aware=false is for kind pixel")
        return self


class ScorerTrain(Optimisation):
    eval_pairs: int = Field(1024, gt=0)
    eval_draws: int = Field(1, gt=0)  # of noise, for each pair and part of the times


class ScorerConfig(Section):
    model: Model
    data: Data
    scorer: StepScorerSettings
    train: ScorerTrain
    output: Output

    @model_validator(mode="after")
    def _data_serves(self) -> ScorerConfig:
        if self.data.train is None or self.data.validation is None:
            raise ValueError("a scorer needs data.train and data.validation: pairs to learn from, and others")
        if self.model.base_weights != "full":
            raise ValueError("a scorer reads the network as it is: set model.base_weights to full")
        if self.data.buckets:
            raise ValueError("a scorer is trained on pictures of one size: set data.buckets to false")
        if self.data.caption_dropout:
            raise ValueError("data.caption_dropout would hide from the scorer what it should judge by: set it to 0")
        if self.train.warmup > self.train.steps:
            raise ValueError(f"train.warmup ({self.train.warmup}) is longer than train.steps ({self.train.steps})")
        return self

    def to_yaml(self) -> str:
        """The resolved settings; the text is a config file of its own."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def identity(self) -> dict:
        """The settings that decide what is computed: a run is only resumed with equal ones. Data may lie elsewhere:
        what it holds is compared when a run is resumed."""
        settings = self.model_dump(mode="json", exclude={"output"})
        free = {
            "data": (*PLACES, "cache"),
            "train": ("checkpoint_every", "eval_pairs", "eval_draws"),
            "scorer": ("compare",),
        }
        for section, keys in free.items():
            for key in keys:
                del settings[section][key]
        return settings
