"""The sections inside `objective:`: where training states come from, and the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from .section import Section


class ForwardSettings(Section):
    """Noise added to the images of the data."""

    shared_noise: bool = True
    """All members of a pair or list get the same noise and the same timestep. false: each its own."""

    timesteps: list[int] | None = Field(None, min_length=1)
    """Timesteps to draw from, such as those of a distilled model. null: all."""


class InversionSettings(Section):
    """DDIM inversion of the images by the reference (source `inversion`), onto the levels of a grid of its own."""

    steps: int = Field(10, gt=0)
    """Steps of the inversion. The timestep is drawn from the same number of levels."""

    eta: float = Field(0.0, ge=0, le=1)
    """Noise added in each step, as a share of the step's own noise. 0: none."""

    average: bool = False
    """Average the predictions at both ends of each step, as ReNoise does. Doubles the model calls."""

    cache: bool = False
    """Invert all images to all levels before training and keep the result in data.cache. An image takes
    2 * steps * C * h * w bytes (SDXL at 1024 px, 10 steps: 1.3 MB). It pays off if pairs are used several times."""


class RolloutSettings(Section):
    """On-policy sampling (sources trajectory, pool, samples and self_play). A round samples images for `prompts`
    prompts, judges them and trains on them for `updates` updates."""

    prompts: int = Field(8, gt=0)
    """Prompts of a round, over all processes."""

    updates: int = Field(1, gt=0)
    """Optimiser steps on the samples of a round."""

    steps: int = Field(20, gt=0)
    """Model calls for an image."""

    eta: float = Field(1.0, ge=0, le=1)
    """Noise in a DDIM step, as a share of the step's own noise. A transition without noise cannot be trained on."""

    guidance: float = 5.0
    """Scale of classifier-free guidance while sampling, which is part of the policy. 1: none."""

    step: Literal["ddim", "renoise"] = "ddim"
    """How a step is made. renoise: an x_0 estimate, then fresh noise, as distilled models sample."""

    sampler: Literal["policy", "reference"] = "policy"
    """Which model samples. Source self_play always samples with the reference."""

    samples: int = Field(2, gt=1)
    """Images for each prompt. All their pairs are compared."""

    same_noise: bool = True
    """The images of a prompt start from the same noise."""

    end: Literal["clean", "lowest"] = "clean"
    """Where sampling ends. clean: at sigma = 0, by a step without noise, which cannot be trained on. lowest: at the
    lowest level that the model was trained at, so that the last step is trained on too (SPO, D3PO as released)."""

    transitions: int | None = Field(None, gt=0)
    """Train on this many steps from the start of a trajectory. null: on all steps with noise."""

    scorers: list[str] = Field(default_factory=list)
    """Numbers that judge the images: shapes.total, pickscore=FOLDER, http://HOST:PORT/NUMBER or package.module:Class
    (its module is imported). With several, an image wins if no score is lower and at least one is higher."""

    labels: Path | None = None
    """A file of human preferences between trajectories of `diffpo collect`, instead of scorers. null: none."""

    step_scorer: str | None = None
    """Judges the candidates of source pool: a folder of `diffpo train-scorer`, or a scorer as in `scorers`. null: for
    other sources."""

    pool: int = Field(4, gt=1)
    """Candidates for the next state (source pool)."""

    threshold: float = Field(0.3, ge=0, lt=1)
    """Best and worst candidate make a pair if p(best) - p(worst) is above this; p is the softmax of the scores."""

    start: int = Field(4, ge=0)
    """The first sampling step with a pool, counted from 0."""

    inner: int = Field(0, ge=0)
    """Each candidate of a pool goes on by so many steps of its own before it is judged, and all of these steps are
    trained on (SPO for SDXL: 3)."""


class DirectSettings(Section):
    """Reward fine-tuning (source reward): the loss is minus the score of the policy's own images, and its gradient goes
    through the scorer, the VAE and the sampler into what is trained."""

    calls: int | None = Field(None, gt=0)
    """The gradient goes through the last so many model calls of the sampler. null: all. Memory does not depend on it,
    time does."""

    truncation: Literal["fixed", "random", "one_step"] = "fixed"
    """fixed: `calls` in each update (DRaFT-K). random: a number from 1 to `calls`, drawn for each update (AlignProp).
    one_step: sampling stops at one of the last `calls` steps, drawn for each update, and the x_0 that is predicted
    there is judged (ReFL)."""

    copies: int = Field(1, gt=0)
    """Of the finished image, noised to the last step's level anew, so many x_0 predictions are judged (DRaFT-LV, with
    calls 1). 1: the image itself."""

    ceiling: float | None = None
    """Scores above this give no gradient (ReFL uses 2 with ImageReward). null: none."""


class ReferenceSettings(Section):
    """The model that the policy is compared with, and how it follows the policy."""

    policy: Literal["adapter_off", "ema", "sync", "accelerated", "fast_slow", "none"] = "adapter_off"
    """adapter_off: the model that training starts from. ema: a moving average of the policy. sync: a copy of it.
    accelerated: the policy extrapolated along its last move; the policy continues from there. fast_slow: a copy that
    makes a fraction of each step of the policy. none: no reference."""

    every: int = Field(1, gt=0)
    """Updates between two steps of a reference that moves."""

    decay: float = Field(0.99, ge=0, lt=1)
    """ema: the share of the reference that stays in each step. fast_slow: the copy moves by 1 - decay times the
    policy's step."""

    strength: float = Field(0.5, ge=0)
    """accelerated: how far beyond the policy, as a multiple of its move since the last step of the reference."""
