"""The sections inside `objective:`: where training states come from, and the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from .reader import numbers
from .section import Section


class ForwardSettings(Section):
    """Noise added to the images of the data."""

    shared_noise: bool = True
    """All members of a pair or list get the same noise and the same timestep. false: each its own."""

    timesteps: list[int] | None = Field(None, min_length=1)
    """Timesteps to draw from, such as those of a distilled model. null: all."""

    draws: int | None = Field(None, gt=0)
    """A pair has so many draws of noise and timestep, which come again and again (source forward). The reference's
    errors are kept, so from its visit number draws + 1 on a pair costs no pass of the reference. One draw learns
    less (docs/performance.md). null: new draws at each visit."""


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


class AdvantageSettings(Section):
    """How the scores of a prompt's images become advantages, for links that take them: (score - mean) / spread. With
    several scorers each is standardised, then they are averaged."""

    mean: Literal["prompt", "round"] = "prompt"
    """What counts as 0: the mean of the prompt's images (GRPO), or of all images of the round."""

    spread: Literal["prompt", "round", "none"] = "prompt"
    """The standard deviation that is the unit: of the prompt's images, of all images of the round, or none (scores
    keep their own unit)."""

    limit: float = Field(5.0, gt=0)
    """Advantages are cut to -limit and limit. A liking in 0..1 is 1/2 + advantage / (2 limit)."""


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

    step_options: dict[str, Any] = Field(default_factory=dict)
    """Options of another solver that is named in `step`, e.g. {amount: 0.7} of flow_sde."""

    window: int | None = Field(None, gt=0)
    """Noise in so many neighbouring steps only, and the ODE in the others (MixGRPO). Only steps with noise are trained
    on. null: noise in all steps."""

    window_rounds: int = Field(25, gt=0)
    """Rounds until the window moves on by one step. It begins at the first step, and again after the last."""

    guidance: float = 5.0
    """Scale of classifier-free guidance while sampling, which is part of the policy. 1: none."""

    step: str = "ddim"
    """How a step is made: ddim; renoise (an x_0 estimate, then fresh noise, as distilled models sample); or another
    solver of `samplers` with one call per step, such as flow_sde, dpmpp, sa_solver or euler_ancestral."""

    sampler: Literal["policy", "reference", "behaviour"] = "policy"
    """Which model samples. Source self_play always samples with the reference."""

    samples: int = Field(2, gt=1)
    """Images for each prompt. All their pairs are compared."""

    same_noise: bool = True
    """The images of a prompt start from the same noise."""

    end: Literal["clean", "lowest"] = "clean"
    """Where sampling ends. clean: at sigma = 0, by a step without noise, which cannot be trained on. lowest: at the
    lowest level that the model was trained at, so that the last step is trained on too (SPO, D3PO as released)."""

    keep: int | None = Field(None, gt=1)
    """Train on so many of a prompt's images, in pairs or by themselves: half of them the best, the others the worst.
    null: on all."""

    min_spread: float = Field(0.0, ge=0)
    """Prompts whose scores have no larger standard deviation than this are left out, in links that take advantages or
    likings. 0: those with equal scores."""

    advantages: AdvantageSettings = AdvantageSettings()
    """How scores become advantages."""

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

    @field_validator("step_options", mode="after")
    @classmethod
    def _numbers_in_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        return numbers(options)


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

    ramp: float = Field(0.0, ge=0)
    """ema: the decay begins at 0 and rises by this at each step of the reference, up to `decay`. 0: constant."""

    strength: float = Field(0.5, ge=0)
    """accelerated: how far beyond the policy, as a multiple of its move since the last step of the reference."""


class BehaviourSettings(Section):
    """The behaviour policy (pi_old): the second model that the policy is compared with, for likelihood ratios."""

    policy: Literal["none", "sync", "ema"] = "none"
    """none: no link asks for it. sync: the policy that sampled the round. ema: a moving average of the policy, which
    moves at the end of each round; it can sample the rounds (rollout.sampler=behaviour)."""

    decay: float = Field(0.5, ge=0, lt=1)
    """ema: the share that stays at the end of each round."""

    ramp: float = Field(0.0, ge=0)
    """ema: the decay begins at 0 and rises by this each round, up to `decay`. 0: constant."""

    kl: float = Field(0.0, ge=0)
    """Weight of the KL divergence from the policy to it, a trust region. It is measured as `objective.kl` is."""
