"""`diffpo train-scorer`: a step-aware preference model from pairs (SPO, arXiv 2406.04314; LPO, 2502.01051).

Both images of a pair get the same noise at the same random time; the scorer gets what the base model computes from them
(the decoded x_0 estimate, or its features) and learns which one people preferred.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler

from .. import models
from ..common.errors import DiffpoError
from ..common.files import write_atomic
from ..common.text import plain
from ..common.worker import Worker
from ..config import ScorerConfig
from ..data.batches import Batches
from ..data.groups import load_groups
from ..data.order import order
from ..data.relabel import relabel
from ..models import identity
from ..models.family import Family
from ..models.lazy_encoders import LazyEncoders
from ..problems.policy import Policy
from ..scorers.judge import Judge
from ..scorers.step import base, load
from ..scorers.step.base import StepScorer
from ..scorers.step.latent import LatentScorer
from ..scorers.step.pixel import StepAwareScorer
from . import checkpoint, claim, step_heldout
from .build import make_accelerator, make_optimizer, make_schedule
from .metrics import accuracy
from .run import Run
from .update import Diverged

ADVICE = "Lower train.lr, in a new output folder"


def preference_loss(chosen: Tensor, rejected: Tensor, preference: Tensor) -> Tensor:
    """(n,) scores and (n,) P(chosen is better) -> (n,) two-way cross-entropy with soft labels, less the labels' own
    entropy: the optimum is 0 for a tie too (Pick-a-Pic's loss, arXiv 2305.01569, eq. 2)."""
    margin = chosen - rejected
    cross = -preference * F.logsigmoid(margin) - (1 - preference) * F.logsigmoid(-margin)
    return cross + torch.special.xlogy(preference, preference) + torch.special.xlogy(1 - preference, 1 - preference)


def train_scorer(config: ScorerConfig) -> Path:
    """Train into ``config.output``, or go on there; returns the folder, which `objective.rollout.step_scorer` takes.

    Raises DiffpoError on bad input, if another run uses the folder, on a loss that is not finite (with the last good
    state saved) and on a full disk. Raises Interrupted after SIGINT or SIGTERM once the step is finished and saved.
    """
    run = Run(config, make_accelerator(config.train))
    if run.accelerator.num_processes > 1:
        raise DiffpoError("train-scorer runs in one process; start it without `accelerate launch`")
    with run.claimed(check_folder):
        learner, validation = make_learner(run)
        run.resume(learner, learner.origin())
        with run.working(ADVICE):
            repeat(run, learner)
        finish(run, learner, validation)
    return config.output


def check_folder(config: ScorerConfig) -> None:
    """As `claim.check_folder`; DiffpoError also if the folder holds a scorer that is finished."""
    try:
        finished = (config.output / base.ABOUT).exists()
    except OSError:  # claim.check_folder reports it
        finished = False
    if finished:
        raise DiffpoError(f"the scorer in {config.output} is finished. {claim.CHOOSE}, or delete it")
    claim.check_folder(config)


def repeat(run: Run[ScorerConfig], learner: ScorerLearner) -> None:
    """The training loop: update, log; `Run.steps` saves and stops."""
    pairs = run.settings.batch_size * run.settings.accumulation
    for step in run.steps():
        started = time.perf_counter()
        metrics = learner.update(step)
        metrics["pairs_per_second"] = pairs / (time.perf_counter() - started)
        run.log(metrics, f"loss {metrics['loss']:.3f} accuracy {metrics['accuracy']:.2f}")


def finish(run: Run[ScorerConfig], learner: ScorerLearner, validation: Batches) -> None:
    """Measure the scorer on held-out pairs and save it; its checkpoints go."""
    config, settings, choice, output = run.config, run.config.train, run.config.scorer, run.output
    learner.scorer.module.eval()
    compared: dict[str, StepScorer] = {"this": learner.scorer}
    compared |= {spec: load.load(spec, learner.policy.family, learner.policy.network) for spec in choice.compare}
    lines = step_heldout.measure(compared, validation, learner.policy, choice.guidance, settings)
    table = step_heldout.table(lines)
    with checkpoint.disk_errors(output):
        write_atomic(output / "accuracy.md", f"{table}\n".encode())
        learner.scorer.save(output, {"settings": config.identity(), "held_out": lines})
    for folder in checkpoint.folders(output):
        shutil.rmtree(folder, ignore_errors=True)
    held = f"held-out pairs ({lines[0]['pairs']}) ranked as labelled, 95 % intervals"
    compared_with = "; after each other scorer's: how much higher this scorer's is" if choice.compare else ""
    run.say(f"{held}{compared_with}\n{table}\nthe scorer is in {output}")


@dataclass
class ScorerLearner:
    """The scorer, what it sees pairs through, and all that a checkpoint holds."""

    config: ScorerConfig
    policy: Policy
    batches: Batches
    scorer: LatentScorer | StepAwareScorer
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler

    def update(self, step: int) -> dict[str, float]:
        """Update number ``step``; its metrics. Raises Diverged."""
        settings, losses, margins = self.config.train, [], []
        parameters = trainable(self.scorer.module)
        for part in range(settings.accumulation):
            first = (step * settings.accumulation + part) * settings.batch_size
            loss, margin = self._forward(list(range(first, first + settings.batch_size)))
            (loss.mean() / settings.accumulation).backward()
            losses.append(loss.detach())
            margins.append(margin)
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm or float("inf"))
        loss = torch.cat(losses).mean()
        if not (loss.isfinite() and norm.isfinite()):
            raise Diverged(f"the loss or its gradient is not finite at step {step + 1}")
        lr = float(self.schedule.get_last_lr()[0])
        try:
            self.optimizer.step()
        except (TypeError, RuntimeError) as error:
            reason = plain(error, 300)
            raise DiffpoError(f"train.optimizer {settings.optimizer} failed at step {step + 1}: {reason}") from error
        self.schedule.step()
        self.optimizer.zero_grad()
        share = accuracy(torch.cat(margins))
        return {"loss": loss.item(), "accuracy": share.mean().item(), "grad_norm": norm.item(), "lr": lr}

    def _forward(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        """(n,) losses of the pairs at these positions, and (m,) margins of those that are no ties."""
        batches, choice, clean = self.batches, self.config.scorer, self.config.scorer.times == "clean"
        indices = [order(self.config.train.seed, len(batches.groups), position) for position in positions]
        batch = batches.batch(indices, positions)
        problem = step_heldout.noised(self.policy.family, batches, batch, clean)
        x_0 = problem.x_t
        if choice.kind == "pixel":
            x_0 = step_heldout.estimated(self.policy, problem, choice.guidance, clean)
        captions, preference = step_heldout.captions(batches, indices), problem.judgement.preference
        found = self.scorer.rate(problem.x_t, x_0, problem.t, captions, problem.conditioning.cond)
        chosen, rejected = found.chunk(2)
        loss = preference_loss(chosen, rejected, preference)
        return loss, (chosen - rejected).detach()[preference != 0.5]

    def origin(self) -> dict[str, Any]:
        """What the run starts from; resuming compares it."""
        settings = self.config.train
        return {
            "base": identity.base_identity(self.policy.network, self.config.model.path),
            "data_hash": self.batches.groups.data_hash,
            "pairs_per_update": settings.batch_size * settings.accumulation,
            "settings": self.config.model_dump(mode="json"),
        }

    def writer(self, step: int) -> Callable[[Path], None]:
        return lambda folder: None  # the state holds the weights; only a finished scorer has files of its own

    def state(self) -> dict[str, Any]:
        parts = {"module": self.scorer.module, "optimizer": self.optimizer, "schedule": self.schedule}
        return {name: part.state_dict() for name, part in parts.items()}

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        self.scorer.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


def trainable(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def make_learner(run: Run[ScorerConfig]) -> tuple[ScorerLearner, Batches]:
    """Model, data, scorer and optimiser of the run's config, ready for the first step; and the held-out pairs."""
    config, settings, device = run.config, run.config.train, run.accelerator.device
    family = models.load(config.model, settings.precision, config.data.resolution)
    batches, validation = load_data(config, family, device)
    network = family.load_network(device)
    scorer = make_scorer(config, family, network, batches)
    optimizer = make_optimizer(settings, trainable(scorer.module.train()))
    schedule = make_schedule(settings, optimizer)
    return ScorerLearner(config, Policy(family, network), batches, scorer, optimizer, schedule), validation


def load_data(config: ScorerConfig, family: Family, device: torch.device) -> tuple[Batches, Batches]:
    """Training and held-out pairs with their caches filled; the VAE stays if the scorer needs pictures."""
    data, found = config.data, []
    assert data.train is not None and data.validation is not None  # noqa: S101 (`ScorerConfig` requires both)
    for source, split in ((data.train, data.train_split), (data.validation, data.validation_split)):
        found.append(load_groups(data, source, split, "pair", quiet=False))
        print("\n  ".join([f"{source}: {found[-1].describe()}", *found[-1].remarks()]))
        if found[-1].bad:
            print(f"  skipped: {found[-1].describe_bad()}")
    if (labels := config.scorer.labels) is not None:
        judge = Judge([labels], device)
        relabel(
            found[0],
            lambda images, captions: judge.scores(images, captions)[:, 0].tolist(),
            config.scorer.labels_margin,
        )
        print(f"labelled by {labels}: {found[0].describe()}")
    encoders = LazyEncoders(family, device, data.cache)
    seeds = (config.train.seed, 0)
    batches = [Batches(groups, data, encoders, seed, Worker(device)) for groups, seed in zip(found, seeds, strict=True)]
    pictures = config.scorer.kind == "pixel" or any(load.needs_vae(spec) for spec in config.scorer.compare)
    encoders.free(keep_vae=pictures or not batches[0].cached)
    return batches[0], batches[1]


def make_scorer(
    config: ScorerConfig, family: Family, network: torch.nn.Module, batches: Batches
) -> LatentScorer | StepAwareScorer:
    choice, device = config.scorer, next(network.parameters()).device
    if choice.clip is None:  # kind latent
        some = list(range(min(64, len(batches.groups))))
        batch = batches.batch(some, some, "calibration")
        problem = step_heldout.noised(family, batches, batch, choice.times == "clean")
        return LatentScorer.fresh(family, network, problem.x_t, problem.t, problem.conditioning.cond, config.train.seed)
    scorer = StepAwareScorer.fresh(family, choice.clip, choice.processor, choice.time_aware, config.train.seed)
    scorer.module.to(device)
    return scorer
