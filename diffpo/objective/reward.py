"""Errors of policy and reference -> implicit rewards: the one place that touches the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import links
from ..config import ObjectiveSettings
from ..links import divergences
from ..problems.regression import Regression
from ..problems.transitions import guided

if TYPE_CHECKING:
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
    perceptual: Any = None

    def error(self, prediction: Tensor, regression: Regression) -> Tensor:
        """(N,) float32: how far the network's output is from the targets."""
        if self.perceptual is not None:
            return self.perceptual(prediction, regression, regression.cond)
        return squared_error(prediction, regression.target)


@dataclass(frozen=True)
class Outcome:
    """What policy and reference made of a Regression's N problems: (N,) float32 each, laid out as there.

    ``error`` and ``reference_error`` (0 without a reference); ``drift``, the mean square of policy's minus reference's
    prediction (0 without one); ``reward`` r = (beta/2) k omega(t) (reference_error - error), clipped and transformed as
    the objective says.
    """

    error: Tensor
    reference_error: Tensor
    drift: Tensor
    reward: Tensor
    preference: Tensor
    members: int
    scores: Tensor | None = None

    def quantities(self, baseline: Tensor) -> dict[str, Tensor]:
        """Everything that a link may ask for by name; see diffpo/links."""
        if self.members == 1:
            found = {"reward": self.reward, "liked": self.preference, "error": self.error, "drift": self.drift}
            return {**found, "reference_error": self.reference_error, "baseline": baseline}
        rows = {name: getattr(self, name).unflatten(0, (self.members, -1)) for name in _COLUMNS}
        found = {"rewards": rows["reward"], "preference": self.preference}
        if self.scores is not None:
            found["scores"] = self.scores
        if self.members == 2:
            found |= {"chosen": rows["reward"][0], "rejected": rows["reward"][1]}
            found |= {f"{who}_error": rows["error"][i] for i, who in enumerate(("chosen", "rejected"))}
            found |= {"chosen_reference_error": rows["reference_error"][0], "chosen_drift": rows["drift"][0]}
            found |= {"rejected_reference_error": rows["reference_error"][1], "rejected_drift": rows["drift"][1]}
            if self.scores is not None:
                found["gap"] = self.scores[0] - self.scores[1]
        return found

    def as_singles(self) -> Outcome:
        """Pairs as single images: the chosen one is liked with the pair's probability, the rejected one with the
        rest of it."""
        if self.members == 1:
            return self
        if self.members != 2:
            raise ValueError("only pairs fall apart into liked and disliked images")
        preference = torch.cat([self.preference, 1 - self.preference])
        scores = None if self.scores is None else self.scores.reshape(1, -1)
        return Outcome(self.error, self.reference_error, self.drift, self.reward, preference, 1, scores)

    @property
    def margin(self) -> Tensor:
        """u = r_chosen - r_rejected of pairs, (n,)."""
        chosen, rejected = self.reward.chunk(2)
        return chosen - rejected


_COLUMNS = ("error", "reference_error", "drift", "reward")


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over C, h, w of the squared difference, in float32: half precision here would drown the reward in
    rounding."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


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


def predict(family: Any, network: torch.nn.Module, regression: Regression) -> Tensor:
    """The network's output (N, C, h, w), with classifier-free guidance where the policy includes it (D3PO, SPO)."""
    unconditional, guidance = regression.unconditional, regression.guidance
    return guided(family, network, regression.x_t, regression.t, regression.cond, unconditional, guidance)


def score(
    family: Any, policy: torch.nn.Module, network: torch.nn.Module, objective: Objective, regression: Regression
) -> Outcome:
    """One forward pass of each; ``policy`` is ``network`` or its DDP wrapper. Call under the run's autocast."""
    settings = objective.settings
    if objective.reference.free:
        before = None
    else:
        with objective.reference.on(network) as base:
            before = predict(family, base, regression)
            reference_error = objective.error(before, regression)
    prediction = predict(family, policy, regression)
    errors = objective.error(prediction, regression)
    if before is None:
        reference_error, drift = torch.zeros_like(errors), torch.zeros_like(errors)
    else:
        drift = squared_error(prediction, before)
    if settings.winner_safeguard is not None:
        errors = safeguard_winner(errors, prediction, regression.target, settings.winner_safeguard)

    reward = implicit_reward(errors, reference_error, settings.beta, regression.weight, settings.clip)
    reward = objective.omega(regression.t) * reward
    reward = divergences.transform(settings.divergence, reward, settings.divergence_alpha)
    return Outcome(errors, reference_error, drift, reward, regression.preference, regression.members, regression.scores)


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
    if settings.sft:
        errors = outcome.error.unflatten(0, (outcome.members, -1))
        losses = losses if not single else losses.unflatten(0, (outcome.members, -1)).mean(0)
        liked = outcome.preference if outcome.members == 1 else 1.0
        return losses + settings.sft * liked * errors[0]
    return losses.unflatten(0, (outcome.members, -1)).mean(0) if single else losses
