"""Errors of policy and reference -> implicit rewards: the one place that touches the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import links
from ..config import ObjectiveSettings
from ..data.judgement import Judgement
from ..links import divergences
from ..problems.policy import Policy
from ..problems.regression import Regression

if TYPE_CHECKING:
    from .perceptual import Perceptual
    from .reference import Reference


@dataclass(frozen=True)
class Objective:
    """A composed objective, ready to be evaluated.

    Attributes:
        settings: the section `objective:`, complete.
        reference: what the policy is compared with.
        omega: (N,) timesteps -> (N,) weights of the rewards (weighting.py).
        perceptual: replaces the squared error (NCP-DPO), or None.
    """

    settings: ObjectiveSettings
    reference: Reference
    omega: Callable[[Tensor], Tensor]
    perceptual: Perceptual | None = None

    def error(self, prediction: Tensor, regression: Regression) -> Tensor:
        """(N,) float32: how far the network's output is from the targets."""
        if self.perceptual is not None:
            return self.perceptual(prediction, regression)
        return squared_error(prediction, regression.target, regression.mask)


@dataclass(frozen=True)
class Outcome:
    """The results of policy and reference on a Regression's N problems, with its ``judgement``. (N,) float32 each:

    ``error`` and ``reference_error`` (0 without a reference); ``drift``, the mean square of policy's minus reference's
    prediction (0 without one); ``reward`` r = (beta/2) k omega(t) (reference_error - error), clipped and transformed as
    the settings define.
    """

    error: Tensor
    reference_error: Tensor
    drift: Tensor
    reward: Tensor
    judgement: Judgement

    def quantities(self, baseline: Tensor) -> dict[str, Tensor]:
        """Everything that a link may take by name; see diffpo/links."""
        judgement = self.judgement
        if judgement.members == 1:
            found = {"reward": self.reward, "liked": judgement.preference, "error": self.error, "drift": self.drift}
            return {**found, "reference_error": self.reference_error, "baseline": baseline}
        rows = {name: judgement.by_member(getattr(self, name)) for name in _COLUMNS}
        found = {"rewards": rows["reward"], "preference": judgement.preference}
        if judgement.scores is not None:
            found["scores"] = judgement.scores
        if judgement.members == 2:
            found |= {"chosen": rows["reward"][0], "rejected": rows["reward"][1]}
            found |= {f"{who}_error": rows["error"][i] for i, who in enumerate(("chosen", "rejected"))}
            found |= {"chosen_reference_error": rows["reference_error"][0], "chosen_drift": rows["drift"][0]}
            found |= {"rejected_reference_error": rows["reference_error"][1], "rejected_drift": rows["drift"][1]}
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
    """One forward pass of the policy, and one of the reference if there is one."""
    settings = objective.settings
    if objective.reference.free:
        before = None
    else:
        with objective.reference.on() as base:
            before = base.predict(regression)
            reference_error = objective.error(before, regression)
    prediction = policy.predict(regression)
    errors = objective.error(prediction, regression)
    if before is None:
        reference_error, drift = torch.zeros_like(errors), torch.zeros_like(errors)
    else:
        drift = squared_error(prediction, before, regression.mask)
    if settings.winner_safeguard is not None:
        errors = safeguard_winner(errors, prediction, regression.target, settings.winner_safeguard)

    reward = implicit_reward(errors, reference_error, settings.beta, regression.weight, settings.clip)
    reward = objective.omega(regression.t) * reward
    reward = divergences.transform(settings.divergence, reward, settings.divergence_alpha)
    return Outcome(errors, reference_error, drift, reward, regression.judgement)


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
    """(n,) losses, one for each group: the link, and the `sft` term on the better images' own error.

    For a link of single images a pair's loss is the mean over its two images.
    """
    single = links.kind(settings.link) == "single"
    seen = outcome.as_singles() if single else outcome
    losses = settings.link_weight * links.losses(settings.link, settings.link_options, seen.quantities(baseline))
    by_member = outcome.judgement.by_member
    if single:
        losses = by_member(losses).mean(0)
    if not settings.sft:
        return losses
    liked = outcome.judgement.preference if outcome.judgement.members == 1 else 1.0
    return losses + settings.sft * liked * by_member(outcome.error)[0]
