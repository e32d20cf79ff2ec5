"""The section `objective:` of a config: the choices that make a method, laid over the preset of a published one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, model_validator

from .. import links, methods
from ..common.errors import DiffpoError
from .presets import find
from .reader import explain
from .section import Section, may_import

REWARDS = {"chosen", "rejected", "reward", "rewards"}  # what links call rewards
OF_REFERENCE = {"chosen_reference_error", "rejected_reference_error", "chosen_drift", "rejected_drift"}
OF_REFERENCE |= {"reference_error", "drift"}
TRANSITIONS = ("trajectory", "pool")  # sources whose problems are steps of a sampler


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


class ObjectiveSettings(Section):
    """A preset, and the settings that replace its choices."""

    name: str
    """The preset: a method of docs/papers.md, a YAML file (from the working directory) or package.module:attribute
    (its module is imported)."""

    beta: float = Field(gt=0)
    """Strength of the implicit reward r = beta/2 (reference error - policy error), with errors as means over the
    dimensions. Larger values keep the policy nearer to the reference. Each preset has its own."""

    source: Literal["forward", "inversion", "trajectory", "pool", "samples", "self_play", "reward"] = "forward"
    """Where training states come from. forward: noised images of the data; inversion: inverted images of the data;
    trajectory, pool: steps of the sampler; samples: the policy's images, noised; self_play: the data's image against
    the reference's. reward: no regression; the gradient of a score goes through the sampler (`direct`)."""

    error: Literal["squared", "perceptual"] = "squared"
    """squared: of the network's output. perceptual: of features of the base UNet's encoder."""

    link: str = "sigmoid"
    """The loss of a pair, an image or a list: a function of diffpo/links or package.module:function (its module is
    imported)."""

    link_options: dict[str, float] = Field(default_factory=dict)
    """The link's keyword arguments, e.g. {smoothing: 0.1}."""

    link_weight: float = Field(1.0, gt=0)
    """Factor of the link's loss; of source reward, of the score."""

    sft: float = Field(0.0, ge=0)
    """Weight of fine-tuning on the chosen (liked, best) images, added to the link. 0: none."""

    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """The f-divergence between policy and reference that defines the rewards (f-DPO). reverse_kl is DPO's."""

    divergence_alpha: float = Field(0.5, gt=0, lt=1)
    """Order of divergence alpha: near 0 as reverse_kl, near 1 as forward_kl."""

    weighting: Literal["uniform", "min_snr", "measured"] = "uniform"
    """Weights of timesteps. min_snr: min(SNR, 5). measured: inverse to the base model's error on the data, which is
    measured before training."""

    clip: float | None = Field(None, gt=0, lt=1)
    """Keeps the likelihood ratio of a transition within 1 - clip and 1 + clip (sources trajectory and pool). null: no
    bounds."""

    winner_safeguard: float | None = Field(None, ge=0, le=1)
    """Diffusion-SDPO's mu: scales the rejected image's gradient down where it would raise the chosen one's error. null:
    off."""

    users: bool = False
    """Condition the policy on the user of each pair, named in data.columns.user (docs/users.md)."""

    forward: ForwardSettings = ForwardSettings()
    """Settings of source forward, and of samples and self_play, which noise their images in the same way."""

    inversion: InversionSettings = InversionSettings()
    """Settings of source inversion."""

    rollout: RolloutSettings = RolloutSettings()
    """Settings of the sources that sample: trajectory, pool, samples, self_play, reward."""

    direct: DirectSettings = DirectSettings()
    """Settings of source reward."""

    reference: ReferenceSettings = ReferenceSettings()
    """The model that the policy is compared with."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any, info: ValidationInfo) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("name"), str):
            return given
        if methods.is_outside(given["name"]) and not may_import(info):
            return given
        try:
            preset = dict(find(given["name"], _faults).settings)
        except DiffpoError as error:
            raise ValueError(str(error)) from None
        if given.get("link", preset.get("link")) != preset.get("link"):
            preset.pop("link_options", None)  # they were the other link's
        return methods.merge(preset, given)

    @model_validator(mode="after")
    def _makes_sense(self, info: ValidationInfo) -> ObjectiveSettings:
        if ":" in self.link and not may_import(info):
            return self
        if reason := _problem(self):
            raise ValueError(reason)
        return self

    @property
    def on_policy(self) -> bool:
        return self.source in ("trajectory", "pool", "samples", "self_play", "reward")


def _faults(settings: dict[str, Any]) -> list[str]:
    """What is wrong with the settings of a preset by themselves, a line each."""
    if "name" in settings:
        return ["name: a preset cannot name another preset; leave it out"]
    try:
        ObjectiveSettings.model_validate({"beta": 1.0, **settings})
    except ValidationError as error:  # one fault at least: without a name, choices are not compared with each other
        faults = error.errors(include_url=False, include_context=False)
        return [explain(fault, ObjectiveSettings) for fault in faults if fault["loc"] != ("name",)]
    return []


# ---- which choices go together


def _problem(objective: ObjectiveSettings) -> str | None:
    """Why the settings of `objective:` make no sense together; None if they do."""
    return _link(objective) or _reference(objective) or _terms(objective) or _source(objective)


def _link(objective: ObjectiveSettings) -> str | None:
    try:
        links.check(objective.link, objective.link_options)
    except DiffpoError as error:
        return str(error)
    return None


def _reference(objective: ObjectiveSettings) -> str | None:
    needs, free = set(links.needs(objective.link)), objective.reference.policy == "none"
    if free and needs & OF_REFERENCE:
        return f"link {objective.link} compares with the reference: set reference.policy=adapter_off, not none"
    if free and objective.source in TRANSITIONS:
        return (
            f"source {objective.source} compares likelihoods of transitions with the reference's: set "
            f"reference.policy=adapter_off, not none"
        )
    if free and objective.divergence != "reverse_kl":
        return (
            f"divergence {objective.divergence} is measured between policy and reference: set "
            f"reference.policy=adapter_off, not none"
        )
    if not free and not needs & (REWARDS | OF_REFERENCE):
        return (
            f"link {objective.link} does not use the reference, which would cost time for nothing: set "
            f"reference.policy=none"
        )
    return None


def _terms(objective: ObjectiveSettings) -> str | None:
    kind, needs = links.kind(objective.link), set(links.needs(objective.link))
    if objective.users and objective.on_policy:
        return "users=true takes users' pairs from the data, but this objective samples its own: set users=false"
    if objective.users and kind != "pair":
        return f"users=true describes users by pairs, but link {objective.link} takes no pairs: set users=false"
    if not needs & REWARDS:
        for key, default in {"clip": None, "divergence": "reverse_kl", "weighting": "uniform"}.items():
            if getattr(objective, key) != default:
                return f"{key} changes rewards, but link {objective.link} uses errors: leave {key} out"
    if objective.clip is not None and objective.source not in TRANSITIONS:
        return (
            f"clip bounds the likelihood ratio of a transition, but source {objective.source} has no transitions (only "
            f"{' and '.join(TRANSITIONS)} have): set clip=null"
        )
    if objective.weighting == "measured" and objective.on_policy:
        return "weighting=measured is measured on data, but this objective samples its own: use uniform or min_snr"
    if objective.winner_safeguard is not None:
        if kind != "pair":
            return (
                f"winner_safeguard protects the chosen image of a pair, but link {objective.link} takes no pairs: set "
                f"winner_safeguard=null"
            )
        if objective.error != "squared":
            return "winner_safeguard uses the gradient of the squared error: set error=squared"
    if objective.error == "perceptual" and objective.source in TRANSITIONS:
        return f"source {objective.source} needs error=squared: the log-likelihood of a transition is a squared error"
    if objective.error == "perceptual" and needs & {"drift", "chosen_drift", "rejected_drift"}:
        return f"link {objective.link} needs error=squared: it compares errors with distances between predictions"
    return None


def _source(objective: ObjectiveSettings) -> str | None:
    kind, needs, rollout = links.kind(objective.link), set(links.needs(objective.link)), objective.rollout
    source = objective.source
    policy = objective.reference.policy
    if source == "inversion" and objective.inversion.cache and policy not in ("adapter_off", "none"):
        return (
            f"inversion.cache keeps inversions by the base model, but reference {policy} moves: set "
            f"inversion.cache=false"
        )
    if not objective.on_policy:
        return None
    if source == "reward":
        return _direct(objective)
    if kind == "list" and source != "samples":
        return f"source {source} makes pairs, but link {objective.link} takes ranked lists: set source=samples"
    if source == "self_play":
        if needs & {"gap", "scores"}:
            return (
                f"link {objective.link} needs scores, but source self_play has none (the data's image is chosen): use "
                f"another link, such as sigmoid"
            )
        return None
    if source in TRANSITIONS and rollout.step == "ddim" and rollout.eta == 0:
        return "rollout.eta=0 leaves no noise in a DDIM step, so transitions have no likelihood: set rollout.eta=1"
    if source == "pool":
        if rollout.step_scorer is None:
            return (
                "source pool needs rollout.step_scorer: a folder of `diffpo train-scorer`, or the number of a scorer "
                "such as shapes.total"
            )
        if rollout.start >= rollout.steps - 1:
            return (
                f"rollout.start={rollout.start} leaves no step for a pool: choose less than "
                f"{rollout.steps - 1} with rollout.steps={rollout.steps}"
            )
        return None
    if rollout.labels is not None and source != "trajectory":
        return "rollout.labels are preferences between whole trajectories: set source=trajectory"
    if not rollout.scorers and rollout.labels is None:
        return (
            "rollout.scorers is empty: name a score that judges the images, e.g. [pickscore], or [shapes.total] for "
            "the embedded model"
        )
    if needs & {"gap", "scores"} and len(rollout.scorers) != 1:
        return f"link {objective.link} needs one score, but rollout.scorers names {len(rollout.scorers)}: keep one"
    return None


def _direct(objective: ObjectiveSettings) -> str | None:
    """Of source reward, which has neither a link nor a reference."""
    rollout, direct = objective.rollout, objective.direct
    for key, default in {"link": "sigmoid", "clip": None, "divergence": "reverse_kl", "weighting": "uniform"}.items():
        if getattr(objective, key) != default:
            return f"{key} belongs to losses of errors, and source reward has none: leave {key} out"
    if objective.winner_safeguard is not None or objective.error != "squared":
        return "winner_safeguard and error belong to losses of errors, and source reward has none: leave them out"
    if objective.reference.policy != "none":
        return "source reward compares with no reference, which would be kept for nothing: set reference.policy=none"
    if len(rollout.scorers) + (rollout.step_scorer is not None) != 1:
        return (
            "source reward follows one score: name it in rollout.scorers, e.g. [pickscore], or name a folder of "
            "`diffpo train-scorer` in rollout.step_scorer"
        )
    if rollout.labels is not None:
        return "rollout.labels are preferences between whole trajectories: set source=trajectory"
    if direct.calls is not None and direct.calls > rollout.steps:
        return f"direct.calls={direct.calls} is more than rollout.steps={rollout.steps}"
    if direct.copies > 1 and (direct.truncation != "fixed" or direct.calls != 1):
        return "direct.copies are noised to the level of the last call: set direct.calls=1 and direct.truncation=fixed"
    return None
