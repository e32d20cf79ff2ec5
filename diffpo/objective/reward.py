"""Errors of policy, reference and behaviour policy -> rewards and likelihood ratios: the one place that touches them.

Every problem is solved by up to three models. The *reference* defines rewards, and the KL divergence that holds the
policy. The *behaviour policy* has sampled the images; likelihood ratios are taken to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from samplers.forward import predicted_x_0

from .. import links
from ..config import ObjectiveSettings
from ..data.judgement import Judgement
from ..links import divergences
from ..problems.policy import Policy
from ..problems.regression import Regression

if TYPE_CHECKING:
    from ..models.process import ForwardProcess
    from .kept import KeptErrors
    from .perceptual import Perceptual
    from .reference import Behaviour, Reference


@dataclass(frozen=True)
class Objective:
    """A composed objective, ready to be evaluated.

    Attributes:
        settings: the section `objective:`, complete.
        reference: what the policy is compared with.
        omega: (N,) timesteps -> (N,) weights of the rewards (weighting.py).
        perceptual: replaces the squared error (NCP-DPO), or None.
        behaviour: what sampled the round, or None if nothing asks for it.
        kept: the reference's errors of draws that come again, or None.
    """

    settings: ObjectiveSettings
    reference: Reference
    omega: Callable[[Tensor], Tensor]
    perceptual: Perceptual | None = None
    behaviour: Behaviour | None = None
    kept: KeptErrors | None = None

    def error(self, prediction: Tensor, regression: Regression) -> Tensor:
        """(N,) float32: how far the network's output is from the targets."""
        if self.perceptual is not None:
            return self.perceptual(prediction, regression)
        return squared_error(prediction, regression.target, regression.mask)


@dataclass(frozen=True)
class Outcome:
    """The results of policy and reference on a Regression's N problems, with its ``judgement``. (N,) float32 each:

    ``error`` and ``reference_error`` (0 without a reference); ``drift``, the mean square of policy's minus reference's
    prediction (0 without one, or if its error was kept); ``reward`` r = (beta/2) k omega(t) (reference_error - error),
    clipped and transformed as the settings define.

    ``more``: further quantities of single images by the names of diffpo/links, groups last; ``penalty`` (N,): what the
    KL divergences cost, with their weights, and ``kl`` (N,) the one from the reference without.
    """

    error: Tensor
    reference_error: Tensor
    drift: Tensor
    reward: Tensor
    judgement: Judgement
    more: Mapping[str, Tensor] = field(default_factory=dict)
    penalty: Tensor | None = None
    kl: Tensor | None = None

    def quantities(self, baseline: Tensor) -> dict[str, Tensor]:
        """Everything that a link may take by name; see diffpo/links."""
        judgement = self.judgement
        if judgement.members == 1:
            found = {"reward": self.reward, "liked": judgement.preference, "error": self.error, "drift": self.drift}
            found |= {**self.more, "reference_error": self.reference_error, "baseline": baseline}
            return found if judgement.advantages is None else {**found, "advantage": judgement.advantages[0]}
        rows = {name: judgement.by_member(getattr(self, name)) for name in _COLUMNS}
        found = {"rewards": rows["reward"], "preference": judgement.preference}
        if judgement.scores is not None:
            found["scores"] = judgement.scores
        if judgement.advantages is not None:
            found["advantages"] = judgement.advantages
        if "log_ratio" in self.more:
            found["log_ratios"] = judgement.by_member(self.more["log_ratio"])
        if judgement.members == 2:
            found |= {"chosen": rows["reward"][0], "rejected": rows["reward"][1]}
            found |= {f"{who}_error": rows["error"][i] for i, who in enumerate(("chosen", "rejected"))}
            found |= {"chosen_reference_error": rows["reference_error"][0], "chosen_drift": rows["drift"][0]}
            found |= {"rejected_reference_error": rows["reference_error"][1], "rejected_drift": rows["drift"][1]}
            if "reference_reward" in self.more:
                mine, other = judgement.by_member(self.more["reference_reward"])
                found["reference_margin"] = mine - other
            if judgement.scores is not None:
                found["gap"] = judgement.scores[0] - judgement.scores[1]
        return found

    def as_singles(self) -> Outcome:
        """Pairs as single images; see `Judgement.as_singles`."""
        return replace(self, judgement=self.judgement.as_singles())

    @property
    def margin(self) -> Tensor:
        """u = r_chosen - r_rejected of pairs, (n,)."""
        chosen, rejected = self.reward.chunk(2)
        return chosen - rejected


_COLUMNS = ("error", "reference_error", "drift", "reward")


def squared_error(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over C, h, w of the squared difference, in float32: half precision here would drown the reward in
    rounding. ``mask`` (N, 1, h, w), of mean 1, weighs the places."""
    squares = (prediction.float() - target.float()).square()
    return (squares if mask is None else squares * mask).flatten(1).mean(1)


def implicit_reward(
    error: Tensor, reference_error: Tensor, beta: float, weight: Tensor | None = None, clip: float | None = None
) -> Tensor:
    """r = (beta/2) k (err_ref - err_policy); beta as in Diffusion-DPO's code, errors are means over the dimensions.

    ``weight`` is k, 1 by default. Of a transition, k (err_ref - err_policy) is the log of a likelihood ratio, which
    ``clip`` keeps within 1 - clip .. 1 + clip, as D3PO and SPO do.
    """
    ratio = reference_error - error
    if weight is not None:
        ratio = ratio * weight
    if clip is not None:
        ratio = ratio.clamp(math.log(1 - clip), math.log(1 + clip))
    return (beta / 2) * ratio


def score(policy: Policy, objective: Objective, regression: Regression) -> Outcome:
    """One forward pass of the policy, and one of the reference and of the behaviour policy where they are used."""
    settings, behaviour = objective.settings, objective.behaviour
    before, reference_error, kept = None, None, objective.kept
    if kept is not None and regression.numbers is not None:
        reference_error = kept.get(regression.numbers, regression.t.device)
    if reference_error is None and not objective.reference.free:
        with objective.reference.on() as base:
            before = base.predict(regression)
            reference_error = objective.error(before, regression)
    old = None
    if behaviour is not None and not behaviour.same:
        with behaviour.on() as sampler:
            old = sampler.predict(regression)
    prediction = policy.predict(regression)
    errors = objective.error(prediction, regression)
    if reference_error is None:
        reference_error = torch.zeros_like(errors)
    elif kept is not None and regression.numbers is not None:
        kept.note(regression.numbers, reference_error)
    drift = torch.zeros_like(errors) if before is None else squared_error(prediction, before, regression.mask)
    held = errors
    if settings.winner_safeguard is not None:
        held = safeguard_winner(errors, prediction, regression.target, settings.winner_safeguard)

    omega = objective.omega(regression.t)
    reward = implicit_reward(held, reference_error, settings.strength, regression.weight, settings.clip)
    reward = divergences.transform(settings.divergence, omega * reward, settings.divergence_alpha)
    k = regression.weight if regression.weight is not None else torch.ones_like(reference_error)
    scale = (settings.strength / 2) * k * omega
    more = {"reference_reward": -scale * reference_error}
    kl = k * drift
    penalty = settings.kl * kl if settings.kl else None
    if behaviour is not None:
        old = prediction.detach() if old is None else old
        found = _against(prediction, old, objective, regression, policy.family)
        moved = found["behaviour_error"] - errors
        more |= {**found, "log_ratio": scale * moved, "behaviour_kl": scale * found["behaviour_drift"]}
        if settings.behaviour.kl:
            trust = settings.behaviour.kl * k * found["behaviour_drift"]
            penalty = trust if penalty is None else penalty + trust
    return Outcome(held, reference_error, drift, reward, regression.judgement, more, penalty, kl)


def _against(
    prediction: Tensor, old: Tensor, objective: Objective, regression: Regression, family: ForwardProcess
) -> dict[str, Tensor]:
    """What links may take of policy and behaviour policy, whose output is ``old``."""
    found = {
        "behaviour_error": objective.error(old, regression),
        "behaviour_drift": squared_error(prediction, old, regression.mask),
    }
    if regression.weight is not None and regression.std is not None:
        found |= {"step_weight": regression.weight, "step_std": regression.std}
    if "prediction" in links.needs(objective.settings.link):
        each = {"prediction": prediction, "behaviour_prediction": old, "target": regression.target}
        found |= {name: value.float().flatten(1).T for name, value in each.items()}
        alpha, sigma = family.alpha_sigma(regression.t)
        # x_0 is affine in the output; its slope
        slope = predicted_x_0(family.prediction, torch.ones_like(alpha), torch.zeros_like(alpha), alpha, sigma)
        found["x_0_scale"] = slope.flatten().abs()
    return found


def safeguard_winner(errors: Tensor, prediction: Tensor, target: Tensor, mu: float) -> Tensor:
    """The same errors, with the rejected images' gradient scaled down where it would raise the chosen ones' error.

    Diffusion-SDPO (arXiv 2511.03317): lambda = clip((1 - mu) |g_w|^2 / <g_l, g_w>, 0, 1) with g the errors' gradient by
    the prediction, and 1 where <g_l, g_w> <= 0. A step on err_w - lambda err_l then lowers err_w by at least mu |g_w|^2
    times the rate, to first order in the prediction. One lambda for each pair (the released code: one for a batch), so
    that the result does not depend on how the batch is cut.
    """
    with torch.no_grad():
        winner, loser = (prediction.float() - target.float()).flatten(1).chunk(2)
        inner = (winner * loser).sum(1)
        scale = ((1 - mu) * winner.square().sum(1) / inner.clamp(min=1e-12)).clamp(0, 1)
        scale = torch.where(inner > 0, scale, torch.ones_like(scale))
    chosen, rejected = errors.chunk(2)
    held = rejected.detach()
    return torch.cat([chosen, held + scale * (rejected - held)])  # the value to the last bit: u starts at 0


def group_losses(outcome: Outcome, settings: ObjectiveSettings, baseline: Tensor) -> Tensor:
    """(n,) losses, one for each group: the link, the KL divergences, and `sft` times the better images' own error.

    For a link of single images a pair's loss is the mean over its two images.
    """
    single = links.kind(settings.link) == "single"
    seen = outcome.as_singles() if single else outcome
    losses = settings.link_weight * links.losses(settings.link, settings.link_options, seen.quantities(baseline))
    by_member = outcome.judgement.by_member
    if single:
        losses = by_member(losses).mean(0)
    if outcome.penalty is not None:
        losses = losses + by_member(outcome.penalty).mean(0)
    if not settings.sft:
        return losses
    liked = outcome.judgement.preference if outcome.judgement.members == 1 else 1.0
    return losses + settings.sft * liked * by_member(outcome.error)[0]
