"""The settings of `diffpo train-scorer`: model and data as for `diffpo train`, the kind of scorer and its training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .data import PLACES, Data
from .section import Section
from .settings import Model
from .training import Optimisation, Output


class StepScorerSettings(Section):
    """A scorer of states during sampling (step-aware)."""

    kind: Literal["pixel", "latent"]
    """pixel: a CLIP on the decoded x_0 estimate. latent: a head on features of the diffusion network."""

    clip: str | None = None
    """pixel: the CLIPModel to start from, with tokenizer and image processor: a folder or hub id. latent: null."""

    processor: str | None = None
    """pixel: folder or hub id of the tokenizer and image processor, if the CLIP comes without them (PickScore_v1).
    null: those of the CLIP."""

    time_aware: bool = True
    """false: the scorer gets t = 0 at all times, for comparison. Only for kind pixel."""

    times: Literal["all", "clean"] = "all"
    """all: trained at all timesteps. clean: at t = 0 only, on finished images."""

    guidance: float = Field(1.0, ge=1)
    """pixel: scale of classifier-free guidance of the model call that estimates x_0. 1: none."""

    labels: str | None = None
    """A score of the finished images that labels the training pairs instead of people, as in objective.rollout.scorers
    (SPO for SDXL: pickscore). null: the data's own labels."""

    labels_margin: float = Field(0.1, ge=0, lt=1)
    """labels: pairs with p(better) - p(worse) up to this are ties; p is the softmax of the two scores."""

    compare: list[str] = Field(default_factory=list)
    """Scorers to compare with when training ends: folders of `diffpo train-scorer`, or names such as shapes.total."""

    @model_validator(mode="after")
    def _parts_fit(self) -> StepScorerSettings:
        if (self.kind == "pixel") != (self.clip is not None):
            raise ValueError("scorer.clip is the CLIP that kind pixel starts from: set it for pixel, not for latent")
        if self.kind == "latent" and self.guidance != 1:
            raise ValueError("scorer.guidance is only for kind pixel, which estimates x_0: set scorer.guidance=1")
        if self.kind == "latent" and not self.time_aware:
            raise ValueError("scorer.time_aware=false is only for kind pixel: set scorer.time_aware=true")
        return self


class ScorerTrain(Optimisation):
    """How the scorer is trained."""

    eval_pairs: int = Field(1024, gt=0)
    """Pairs of data.validation to measure on when training ends."""

    eval_draws: int = Field(1, gt=0)
    """Draws of noise for each pair and each range of timesteps."""


class ScorerConfig(Section):
    """The settings of `diffpo train-scorer`."""

    model: Model
    """The diffusion model whose states are scored."""

    data: Data
    """Pairs to train on, and others to measure on."""

    scorer: StepScorerSettings
    """The kind of scorer."""

    train: ScorerTrain
    """How it is trained."""

    output: Output
    """Folder of the scorer, with its metrics and the resolved config. The same command resumes the run."""

    @model_validator(mode="after")
    def _data_serves(self) -> ScorerConfig:
        if self.data.train is None or self.data.validation is None:
            raise ValueError("a scorer needs data.train and data.validation: pairs to train on and to measure on")
        if self.model.base_weights != "full":
            raise ValueError("a scorer needs the network's full weights: set model.base_weights to full")
        if self.model.offload:
            raise ValueError("a scorer trains its network: set model.offload to false")
        if self.data.buckets:
            raise ValueError("a scorer is trained on images of one size: set data.buckets to false")
        if self.data.caption_dropout:
            raise ValueError("a scorer judges by the caption: set data.caption_dropout to 0")
        return self

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
