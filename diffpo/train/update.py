"""One optimiser step: forward passes over the groups of an update, the link, backward, and what it measured."""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .. import links
from ..common.errors import DiffpoError
from ..config import Train
from ..objective.reward import Objective, Outcome, group_losses, score
from ..problems.policy import Policy
from ..weights import lora_forward, sharding
from . import distributed
from .feeds import Feed
from .metrics import summarize

if TYPE_CHECKING:
    from accelerate import Accelerator

EXPLODED, PATIENCE = 10.0, 3  # policy errors of 10 times the reference's, in 3 updates in a row


class Diverged(Exception):
    """A loss, gradient or weight that is not finite, or an error far above the reference's.

    ``spoilt``: the weights have changed already; otherwise they are those after the last good update.
    """

    def __init__(self, message: str, spoilt: bool = False) -> None:
        super().__init__(message)
        self.spoilt = spoilt


class Stuck(Exception):
    """There is nothing to train on, e.g. because a scorer failed; the weights are those after the last update."""


class Updater:
    """All that one update needs. ``policy`` holds the network as it is trained: bare, or in its DDP wrapper.

    ``baseline`` is the mean reward of the update before, over all processes: what links of single images compare with
    (KTO's z0). Taking it from the update before leaves results independent of how an update is cut into batches.
    """

    def __init__(
        self, settings: Train, policy: Policy, objective: Objective, feed: Feed, accelerator: Accelerator
    ) -> None:
        self.settings, self.policy, self.objective = settings, policy, objective
        self.feed, self.accelerator = feed, accelerator
        self.per_update = settings.batch_size * settings.accumulation * accelerator.num_processes
        self._direct = getattr(feed, "losses", None)  # of reward fine-tuning
        self.baseline = 0.0
        self.exploding = 0

    def __call__(
        self, step: int, parameters: list[torch.nn.Parameter], optimizer: Optimizer, schedule: LRScheduler
    ) -> dict[str, float]:
        """Update number ``step``; returns its metrics. Raises Diverged and Stuck."""
        settings = self.settings
        try:
            metrics = self.feed.begin(step)
        except DiffpoError as error:
            raise Stuck(str(error)) from error
        parts = [self._part(step, part) for part in range(settings.accumulation)]
        tables = [part for part in parts if part is not None]
        lr = float(schedule.get_last_lr()[0])
        if not tables:
            with warnings.catch_warnings(action="ignore"):  # before the first step of the optimiser torch complains
                schedule.step()
            return {**metrics, "lr": lr}
        table = self.accelerator.gather(torch.cat(tables)).cpu()
        norm = sharding.whole(self.accelerator.clip_grad_norm_(parameters, settings.max_grad_norm or math.inf))
        # fp16's loss scale is found by an overflow now and then, after which the scaler skips the update
        if not table.isfinite().all() or (self.accelerator.scaler is None and not torch.isfinite(norm)):
            raise Diverged(
                f"the {'loss' if not table.isfinite().all() else 'gradient'} is not finite at step {step + 1}"
            )
        metrics |= self._judged(table, step) if self._direct is None else rewarded(table)
        metrics |= {"grad_norm": norm.item(), "lr": lr}
        try:
            optimizer.step()
        except (TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise DiffpoError(f"train.optimizer {settings.optimizer} failed at step {step + 1}: {reason}") from error
        # a step can overflow; then the loss of the next one would show it, but nothing may be saved until then
        if not distributed.finite(parameters, self.accelerator):
            raise Diverged(f"the weights are not finite after step {step + 1}", spoilt=True)
        schedule.step()
        optimizer.zero_grad()
        self.objective.reference.after_update(step + 1)
        if self.objective.kept is not None:
            self.objective.kept.after_update(self.accelerator)
        if self.objective.behaviour is not None:
            self.objective.behaviour.after_update(step + 1)
        return metrics

    def _judged(self, table: torch.Tensor, step: int) -> dict[str, float]:
        """The metrics of groups; Diverged if their errors have exploded."""
        ratio = exploded(table)
        self.exploding = self.exploding + 1 if ratio > EXPLODED else 0
        if self.exploding == PATIENCE:
            raise Diverged(f"the policy's error is {ratio:.3g} times the reference's at step {step + 1}", spoilt=True)
        self.baseline = table[:, MEAN_REWARD].double().mean().item()
        found = summarize(table[:, :RATIO], self.policy.family.train_timesteps)
        return found | compared(table[:, RATIO:], self.objective)

    def _part(self, step: int, part: int) -> torch.Tensor | None:
        """Forward and backward of one batch; the table of its groups, or None if there is nothing to learn from."""
        settings, accelerator = self.settings, self.accelerator
        first = step * self.per_update
        first += (part * accelerator.num_processes + accelerator.process_index) * settings.batch_size
        positions = range(first, first + settings.batch_size)
        last = part == settings.accumulation - 1
        sync = contextlib.nullcontext() if last else accelerator.no_sync(self.policy.network)
        if self._direct is not None:
            with sync:
                losses, scores = self._direct(self.policy, positions)
                accelerator.backward(losses.mean() / settings.accumulation)
            return torch.stack([losses.detach().float(), scores.float()], 1)
        regression = self.feed.regression(positions)
        if regression is None:
            return None
        bare, cond = self.objective.reference.policy.network, regression.conditioning.cond
        texts = [value for value in cond.values() if value.ndim == 3 and not value.requires_grad]
        with sync, lora_forward.shared(bare, texts, regression.judgement.members):
            outcome = score(self.policy, self.objective, regression)
            baseline = torch.tensor(self.baseline, device=outcome.reward.device)
            losses = group_losses(outcome, self.objective.settings, baseline)
            accelerator.backward(losses.mean() / settings.accumulation)
        return rows(outcome, losses, regression.t)

    def state(self) -> dict[str, Any]:
        found = {"baseline": self.baseline, "reference": self.objective.reference.state(), "feed": self.feed.state()}
        if self.objective.behaviour is not None:
            found["behaviour"] = self.objective.behaviour.state()
        if self.objective.kept is not None:
            found["kept"] = self.objective.kept.state()
        return found

    def load(self, state: dict[str, Any]) -> None:
        self.baseline = state["baseline"]
        self.objective.reference.load(state["reference"])
        if self.objective.behaviour is not None:
            self.objective.behaviour.load(state["behaviour"])
        if self.objective.kept is not None and "kept" in state:
            self.objective.kept.load(state["kept"])
        self.feed.load(state["feed"])


MEAN_REWARD, RATIO = 6, 10  # columns of the table below: the mean reward, and the first of the last three


def compared(table: torch.Tensor, objective: Objective) -> dict[str, float]:
    """Of groups' log-ratios, and KL divergences from behaviour policy and reference, (n, 3): ratio/mean, the mean
    likelihood ratio to the behaviour policy; ratio/deviation, the mean of |log ratio|; ratio/clipped, the share beyond
    the link's clip; kl/behaviour and kl/reference. What the objective does not use is left out."""
    log_ratio, behaviour, reference = table.double().unbind(1)
    found = {}
    if objective.behaviour is not None:
        ratio, options = log_ratio.exp(), links.options(objective.settings.link) | objective.settings.link_options
        found = {
            "ratio/mean": ratio.mean(),
            "ratio/deviation": log_ratio.abs().mean(),
            "kl/behaviour": behaviour.mean(),
        }
        if "clip" in options:
            found["ratio/clipped"] = ((ratio - 1).abs() > options["clip"]).double().mean()
    if objective.settings.kl:
        found["kl/reference"] = reference.mean()
    return {name: value.item() for name, value in found.items()}


def rewarded(table: torch.Tensor) -> dict[str, float]:
    """The metrics of reward fine-tuning, from losses and scores (n, 2)."""
    loss, score = table.double().mean(0).tolist()
    return {"loss": loss, "rollout/score": score}


def rows(outcome: Outcome, losses: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """What is logged of each group, (n, 13): loss, reward of the best and of the worst member, their errors minus the
    reference's, timestep, mean reward, preference, reference error of the best, 1 for single images (best and worst
    at once); means over the members of the log-ratio to the behaviour policy and of the KL divergences from that and
    from the reference (0 without)."""
    judgement, by_member = outcome.judgement, outcome.judgement.by_member
    reward, reference = by_member(outcome.reward), by_member(outcome.reference_error)
    delta = by_member(outcome.error - outcome.reference_error)
    columns = (losses, reward[0], reward[-1], delta[0], delta[-1], by_member(t)[0], reward.mean(0))
    table = [column.detach().float() for column in (*columns, judgement.preference, reference[0])]
    single = torch.full_like(table[0], float(judgement.members == 1))
    none = torch.zeros_like(outcome.error)
    further = (outcome.more.get("log_ratio", none), outcome.more.get("behaviour_kl", none), outcome.kl)
    means = [by_member(none if each is None else each).mean(0).detach().float() for each in further]
    return torch.stack([*table, single, *means], 1)


def exploded(table: torch.Tensor) -> float:
    """The policy's error in units of the reference's, both means over the update; 0 without a reference."""
    reference = table[:, 8].mean()
    return ((table[:, 3].mean() + reference) / reference).item() if reference > 0 else 0.0
