"""The section `objective:` of a config: the choices that make a method, laid over the preset of a published one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from .. import links, methods
from .section import Section

REWARDS = {"chosen", "rejected", "reward", "rewards"}  # what links call rewards
OF_REFERENCE = {"chosen_reference_error", "rejected_reference_error", "chosen_drift", "rejected_drift"}
OF_REFERENCE |= {"reference_error", "drift"}
TRANSITIONS = ("trajectory", "pool")  # sources whose problems are steps of a sampler


class ForwardSettings(Section):
    """Noise added to the images of the data."""

    shared_noise: bool = True  # one noise and one timestep for all members of a group
    timesteps: list[int] | None = Field(None, min_length=1)  # draw from these, e.g. a distilled model's; null: all


class InversionSettings(Section):
    """DDIM inversion by the reference onto levels of its own grid."""

    steps: int = Field(10, gt=0)  # of the inversion: levels that t is drawn from
    eta: float = Field(0.0, ge=0, le=1)  # noise added in each step, as a share of the step's own
    average: bool = False  # ReNoise's: the prediction is averaged with the one at the point it leads to
    # invert all images to all levels first and keep that in data.cache: worth it where a run sees its data often
    cache: bool = False


class RolloutSettings(Section):
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
    """A preset of diffpo/methods/, and what replaces its choices."""

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
    forward: ForwardSettings = ForwardSettings()
    inversion: InversionSettings = InversionSettings()
    rollout: RolloutSettings = RolloutSettings()
    reference: ReferenceSettings = ReferenceSettings()

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("name"), str):
            return given
        preset = dict(methods.load(given["name"]).settings)
        if given.get("link", preset.get("link")) != preset.get("link"):
            preset.pop("link_options", None)  # they were the other link's
        return methods.merge(preset, given)

    @model_validator(mode="after")
    def _makes_sense(self) -> ObjectiveSettings:
        if reason := _problem(self):
            raise ValueError(reason)
        return self

    @property
    def on_policy(self) -> bool:
        return self.source in ("trajectory", "pool", "samples", "self_play")


# ---- which choices go together


def _problem(objective: ObjectiveSettings) -> str | None:
    """Why the settings of `objective:` make no sense together; None if they do."""
    return _link(objective) or _reference(objective) or _terms(objective) or _source(objective)


def _link(objective: ObjectiveSettings) -> str | None:
    try:
        links.check(objective.link, objective.link_options)
    except ValueError as error:
        return str(error)
    return None


def _reference(objective: ObjectiveSettings) -> str | None:
    needs, free = set(links.needs(objective.link)), objective.reference.policy == "none"
    if free and needs & OF_REFERENCE:
        return f"link {objective.link} compares with the reference, and reference.policy is none"
    if free and objective.source in TRANSITIONS:
        return (
            f"source {objective.source} compares likelihoods of transitions with the reference's, and reference.policy "
            f"is none"
        )
    if free and objective.divergence != "reverse_kl":
        return f"divergence {objective.divergence} is one between policy and reference, and reference.policy is none"
    if not free and not needs & (REWARDS | OF_REFERENCE):
        return (
            f"link {objective.link} reads no reference, which would be evaluated for nothing: set reference.policy=none"
        )
    return None


def _terms(objective: ObjectiveSettings) -> str | None:
    kind, needs = links.kind(objective.link), set(links.needs(objective.link))
    if objective.users and objective.on_policy:
        return "users are known by their pairs in the data, and this objective samples its own: set users=false"
    if objective.users and kind != "pair":
        return f"users are known by pairs, and link {objective.link} takes no pairs: set users=false"
    if not needs & REWARDS:
        for key, default in {"clip": None, "divergence": "reverse_kl", "weighting": "uniform"}.items():
            if getattr(objective, key) != default:
                return f"{key} changes rewards, and link {objective.link} reads errors"
    if objective.clip is not None and objective.source not in TRANSITIONS:
        return (
            f"clip bounds the likelihood ratio of a transition, and source {objective.source} has none (only "
            f"{' and '.join(TRANSITIONS)} do)"
        )
    if objective.weighting == "measured" and objective.on_policy:
        return "weighting=measured is measured on data, and this objective samples its own; use uniform or min_snr"
    if objective.winner_safeguard is not None:
        if kind != "pair":
            return f"winner_safeguard protects the chosen image of a pair, and link {objective.link} takes no pairs"
        if objective.error != "squared":
            return "winner_safeguard uses the gradient of the squared error; set error=squared"
    if objective.error == "perceptual" and objective.source in TRANSITIONS:
        return f"source {objective.source} needs error=squared: the log-likelihood of a transition is a squared error"
    if objective.error == "perceptual" and needs & {"drift", "chosen_drift", "rejected_drift"}:
        return f"link {objective.link} needs error=squared: it sets errors against distances of predictions"
    return None


def _source(objective: ObjectiveSettings) -> str | None:
    kind, needs, rollout = links.kind(objective.link), set(links.needs(objective.link)), objective.rollout
    source = objective.source
    policy = objective.reference.policy
    if source == "inversion" and objective.inversion.cache and policy not in ("adapter_off", "none"):
        return f"inversion.cache keeps what the base inverted, and reference {policy} moves: set inversion.cache=false"
    if not objective.on_policy:
        return None
    if kind == "list" and source != "samples":
        return f"source {source} makes pairs, and link {objective.link} takes ranked lists (source samples makes those)"
    if source == "self_play":
        if needs & {"gap", "scores"}:
            return f"link {objective.link} needs scores, and self_play has none: the data's image is chosen"
        return None
    if source in TRANSITIONS and rollout.step == "ddim" and rollout.eta == 0:
        return "rollout.eta=0 leaves no noise in a DDIM step, so that a transition has no likelihood; the papers use 1"
    if source == "pool":
        if rollout.step_scorer is None:
            return (
                "source pool needs rollout.step_scorer: a folder of `diffpo train-scorer`, or the number of a scorer "
                "such as shapes.total"
            )
        if rollout.start >= rollout.steps - 1:
            return f"rollout.start={rollout.start} leaves no step for a pool: rollout.steps is {rollout.steps}"
        return None
    if rollout.labels is not None and source != "trajectory":
        return "rollout.labels are preferences between whole trajectories: set source=trajectory"
    if not rollout.scorers and rollout.labels is None:
        return "rollout.scorers names no score that judges the images, e.g. [pickscore], or [shapes.total] (embedded)"
    if needs & {"gap", "scores"} and len(rollout.scorers) != 1:
        return f"link {objective.link} needs one score, and rollout.scorers names {len(rollout.scorers)}"
    return None
