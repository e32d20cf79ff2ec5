"""The section `objective:` of a config: the choices that make a method, laid over the preset of a published one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator


class Section(BaseModel):
    # plain YAML reads `1e-4` as text: pydantic's lax mode turns it into the float that the field asks for
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _booleans_are_no_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name].annotation
        if value is False and "no" in get_args(annotation):
            return "no"  # YAML reads the bare word as false
        if isinstance(value, bool) and annotation is not bool:
            raise ValueError("expected a number or text, not true or false")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError("expected a number below 2**63")
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (reason := _no_name(text)):
                raise ValueError(reason)
        return value


def _no_name(text: str) -> str | None:
    """Why ``text`` can name nothing: all text of a config names something, mostly files."""
    try:
        too_long = any(len(part) > 255 for part in text.encode().split(b"/"))
        if too_long or len(text) > 4000:
            return "longer than any file's name"
        Path(text).expanduser()
    except UnicodeEncodeError:
        return "holds half a character (a lone surrogate)"
    except RuntimeError:
        if text.partition("/")[0] == "~":
            return "the home folder is not known: set HOME, or write the whole path"
        return f"there is no user {text.partition('/')[0][1:]} here whose folder ~ could mean"
    return "holds the character NUL" if "\0" in text else None


class Forward(Section):
    """Noise added to the images of the data."""

    shared_noise: bool = True  # one noise and one timestep for all members of a group
    timesteps: list[int] | None = Field(None, min_length=1)  # draw from these, e.g. a distilled model's; null: all


class Inversion(Section):
    """DDIM inversion by the reference onto levels of its own grid."""

    steps: int = Field(10, gt=0)  # of the inversion: levels that t is drawn from
    eta: float = Field(0.0, ge=0, le=1)  # noise added in each step, as a share of the step's own
    average: bool = False  # ReNoise's: the prediction is averaged with the one at the point it leads to
    # invert all images to all levels first and keep that in data.cache: worth it where a run sees its data often
    cache: bool = False


class Rollout(Section):
    """On-policy sampling: a round of ``prompts`` is sampled, judged and trained on for ``updates`` updates."""

    prompts: int = Field(8, gt=0)  # of a round, over all processes
    updates: int = Field(1, gt=0)  # optimiser steps on the samples of one round
    steps: int = Field(20, gt=0)  # model calls for an image
    eta: float = Field(1.0, ge=0, le=1)  # DDIM's noise; a transition without noise cannot be trained on
    guidance: float = 5.0  # classifier-free guidance within the policy; 1: none
    step: Literal["ddim", "renoise"] = "ddim"  # renoise: x_0 estimate, then fresh noise, as distilled models sample
    sampler: Literal["policy", "reference"] = "policy"  # who samples; self_play: always the reference
    samples: int = Field(2, gt=1)  # images for a prompt; all their pairs are compared
    same_noise: bool = True  # the images of a prompt start from one noise
    transitions: int | None = Field(None, gt=0)  # train on the first of a trajectory only; null: on all with noise
    scorers: list[str] = []  # numbers that judge the images, e.g. shapes.total; several: Pareto dominance
    labels: Path | None = None  # a file of human preferences (of `diffpo collect`) instead of scorers
    step_scorer: str | None = None  # judges x_0 estimates: a folder of `diffpo train-scorer`, or a scorer's number
    pool: int = Field(4, gt=1)  # candidates for the next state
    threshold: float = Field(0.3, ge=0, lt=1)  # a pool's best and worst make a pair if p(best) - p(worst) is above it
    start: int = Field(4, ge=0)  # the first step with a pool


class ReferenceSettings(Section):
    """What the policy is compared with, and how that follows it."""

    policy: Literal["adapter_off", "ema", "sync", "accelerated", "fast_slow", "none"] = "adapter_off"
    every: int = Field(1, gt=0)  # updates between two steps of the reference (ema, sync, accelerated, fast_slow)
    decay: float = Field(0.99, ge=0, lt=1)  # ema: what stays of the reference; fast_slow: of the slow adapter
    strength: float = Field(0.5, ge=0)  # accelerated: how far beyond the new iterate


class ObjectiveSettings(Section):
    """A preset of diffpo/objectives/, and what replaces its choices."""

    name: str
    # the project's beta: r = beta/2 * (reference error - policy error), errors are means over the dimensions
    beta: float = Field(gt=0)
    source: Literal["forward", "inversion", "trajectory", "pool", "samples", "self_play"] = "forward"
    error: Literal["squared", "perceptual"] = "squared"
    link: str = "sigmoid"  # a function of diffpo/links
    link_options: dict[str, float] = {}  # its keyword arguments
    link_weight: float = Field(1.0, gt=0)
    sft: float = Field(0.0, ge=0)  # weight of the chosen (liked, best) images' own error, added to the link
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"  # f-divergence that rewards stand for
    divergence_alpha: float = Field(0.5, gt=0, lt=1)
    weighting: Literal["uniform", "min_snr", "measured"] = "uniform"  # of timesteps
    clip: float | None = Field(None, gt=0, lt=1)  # of the likelihood ratio of a transition, to 1 - clip .. 1 + clip
    winner_safeguard: float | None = Field(None, ge=0, le=1)  # Diffusion-SDPO's mu
    users: bool = False  # the policy also sees whose preference it is (data.columns.user)
    forward: Forward = Forward()
    inversion: Inversion = Inversion()
    rollout: Rollout = Rollout()
    reference: ReferenceSettings = ReferenceSettings()

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("name"), str):
            return given
        from . import objectives

        preset = dict(objectives.load(given["name"]).settings)
        if given.get("link", preset.get("link")) != preset.get("link"):
            preset.pop("link_options", None)  # they were the other link's
        return objectives.merge(preset, given)

    @model_validator(mode="after")
    def _makes_sense(self) -> ObjectiveSettings:
        from .compose import problem

        if reason := problem(self):
            raise ValueError(reason)
        return self

    @property
    def on_policy(self) -> bool:
        return self.source in ("trajectory", "pool", "samples", "self_play")
