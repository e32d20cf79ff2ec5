"""The section `objective:` of a config: the choices that make a method, laid over the preset of a published one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import (
    Field,
    PositiveFloat,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from .. import links, methods
from ..common.errors import DiffpoError
from . import choices, unused
from .presets import find
from .reader import explain
from .section import Section, may_import
from .sources import (
    BehaviourSettings,
    DirectSettings,
    ForwardSettings,
    InversionSettings,
    ReferenceSettings,
    RolloutSettings,
)


class ObjectiveSettings(Section):
    """A preset, and the settings that replace its choices."""

    name: str
    """The preset: a method of docs/papers.md, a YAML file (from the working directory) or package.module:attribute
    (its module is imported)."""

    beta: PositiveFloat | Literal["auto"]
    """Strength of the implicit reward r = beta/2 (reference error - policy error), with errors as means over the
    dimensions. Larger values keep the policy nearer to the reference. Each preset has its own. auto: the best of
    several on data.validation (docs/train.md)."""

    source: Literal["forward", "inversion", "trajectory", "pool", "samples", "self_play", "reward"] = "forward"
    """Where training states come from. forward: noised images of the data; inversion: inverted images of the data;
    trajectory, pool: steps of the sampler; samples: the policy's images, noised; self_play: the data's image against
    the reference's. reward: no regression; the gradient of a score goes through the sampler (`direct`)."""

    error: Literal["squared", "perceptual"] = "squared"
    """squared: of the network's output. perceptual: of features of the base UNet's encoder."""

    features: Literal["encoder", "middle"] = "encoder"
    """Of error perceptual. encoder: up to the last down block. middle: up to the UNet's middle block, as NCP-DPO's
    launchers for SD1.5."""

    link: str = "sigmoid"
    """The loss of a pair, an image or a list: a function of diffpo/links or package.module:function (its module is
    imported)."""

    link_options: dict[str, float] = Field(default_factory=dict)
    """The link's keyword arguments, e.g. {smoothing: 0.1}."""

    link_weight: float = Field(1.0, gt=0)
    """Factor of the link's loss; of source reward, of the score."""

    sft: float = Field(0.0, ge=0)
    """Weight of fine-tuning on the chosen (liked, best) images, added to the link. 0: none."""

    kl: float = Field(0.0, ge=0)
    """Weight of the KL divergence from policy to reference, added to the link: k times the mean square of the
    difference of their predictions. Of a sampler's steps it is exact, as a mean over the dimensions; else k is 1."""

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

    flipped: bool = False
    """Learn what people reject: the worse image of the data counts as the better one, the disliked as the liked
    (Diffusion-NPO)."""

    users: bool = False
    """Condition the policy on the user of each pair, named in data.columns.user (docs/users.md)."""

    taste: str = "latents"
    """What a user's taste is read from: latents (pooled VAE latents: light and colour), or features as in `diffpo
    distance`: clip, dinov2, shapes or package.module:Class (its module is imported)."""

    prototypes: int = Field(0, ge=0)
    """Users are mixtures of so many prototypes (PAL). 0: each is free (PPD)."""

    steered: bool = False
    """Condition the policy on weights of several rewards, data.columns.rewards, which are chosen when pictures are made
    (docs/users.md)."""

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

    behaviour: BehaviourSettings = BehaviourSettings()
    """The second model that it is compared with: the policy that sampled the round."""

    @field_validator("beta", mode="wrap")
    @classmethod
    def _number_or_auto(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(value)
        except ValidationError as error:  # a fault of each of the two types; that of the number is the one to show
            raise ValueError(error.errors()[0]["msg"]) from None

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
        if given.get("beta") == "auto" and "beta" not in preset:
            raise ValueError(f"beta=auto chooses around the preset's number, and {given['name']} has none: write one")
        if given.get("link", preset.get("link")) != preset.get("link"):
            preset.pop("link_options", None)  # they were the other link's
        own, theirs = given.get("rollout"), preset.get("rollout", {})
        if isinstance(own, Mapping) and own.get("step", theirs.get("step")) != theirs.get("step"):
            preset["rollout"] = {key: value for key, value in theirs.items() if key != "step_options"}
        return methods.merge(preset, given)

    @model_validator(mode="wrap")
    @classmethod
    def _has_an_effect(cls, given: Any, handler: Any, info: ValidationInfo) -> ObjectiveSettings:
        objective = handler(given)
        if isinstance(given, dict) and isinstance(given.get("name"), str) and may_import(info):
            if found := unused.reason(objective, given, find(given["name"], _faults).settings):
                raise ValueError(found)
        return objective

    @model_validator(mode="after")
    def _makes_sense(self, info: ValidationInfo) -> ObjectiveSettings:
        if ":" in self.link and not may_import(info):
            return self
        if reason := choices.problem(self):
            raise ValueError(reason)
        return self

    @property
    def strength(self) -> float:
        """beta as a number. DiffpoError while it is to be chosen (train/beta.py)."""
        if self.beta == "auto":
            raise DiffpoError("objective.beta=auto is chosen by `diffpo train`: here write a number")
        return self.beta

    @property
    def on_policy(self) -> bool:
        return self.source in ("trajectory", "pool", "samples", "self_play", "reward")

    @property
    def behaviour_moves(self) -> bool:
        """Whether the behaviour policy needs a copy of what is trained; in rounds of one update it is the policy."""
        return self.behaviour.policy == "ema" or (self.behaviour.policy == "sync" and self.rollout.updates > 1)

    @property
    def single_steps(self) -> bool:
        """Whether each step of a trajectory is trained on by itself, with its image's advantage, and not in pairs."""
        return self.source == "trajectory" and bool(choices.ADVANTAGES & set(links.needs(self.link)))


def _faults(settings: dict[str, Any]) -> list[str]:
    """What is wrong with the settings of a preset by themselves, a line each."""
    if "name" in settings:
        return ["name: a preset cannot name another preset; leave it out"]
    if settings.get("beta") == "auto":
        return ["beta: auto chooses around the number of the preset; write a number"]
    try:
        ObjectiveSettings.model_validate({"beta": 1.0, **settings})
    except ValidationError as error:  # one fault at least: without a name, choices are not compared with each other
        faults = error.errors(include_url=False, include_context=False)
        return [explain(fault, ObjectiveSettings) for fault in faults if fault["loc"] != ("name",)]
    return []
