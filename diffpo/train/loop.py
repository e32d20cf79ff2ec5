"""`diffpo train`: the loop, top to bottom, on accelerate.

Reproducibility: pairs, noise, timesteps and augmentation have addresses (rng.py). So the pairs of update k and their
draws do not depend on the division into forward passes and processes, or on where the run was interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from .. import methods, models
from ..common.errors import DiffpoError
from ..common.run_folder import BEST
from ..common.threads import Threads
from ..common.worker import Worker
from ..config import Config
from ..export.card import write_card
from ..models import identity
from ..objective import users
from ..objective.reward import Objective
from ..objective.user_attention import attach
from ..problems.policy import Policy
from ..weights import lora, lora_file, lora_forward, sharding, trained
from . import beta, distributed, outside, stop
from .build import Sources, load_data, make_accelerator, make_objective, make_optimizer, make_schedule
from .claim import check_folder
from .heldout import HeldOut
from .metrics import Meter, Watch, headline
from .run import Run
from .update import Updater

EMPTY_ROUNDS = 20  # updates in a row without anything to learn from
ADVICE = "Lower train.lr or raise objective.beta (in a new output folder), or use precision bf16, not fp16"


def train(config: Config) -> Path:
    """Train ``config``'s LoRA or network into ``config.output``, or resume it there; returns what `Weights.save` wrote.

    Raises DiffpoError on bad input, if another run uses the folder, on a NaN (with the last good state saved) and on a
    full disk. Raises Interrupted after SIGINT or SIGTERM once the step is finished and saved.
    """
    outside.require(config)
    return fit(beta.resolved(config, fit))


def fit(config: Config, after: Callable[[HeldOut, Policy, Objective], None] | None = None) -> Path:
    """`train` with a number for beta. ``after`` is called at the end, by all processes, with the held-out pairs, which
    there must be, and what they are measured with."""
    run = Run(config, make_accelerator(config.train))
    with run.claimed(check_folder):
        learner, sources = make_learner(run)
        run.resume(learner, learner.origin(sources))
        with run.working(ADVICE):
            repeat(run, learner, sources)
            finish(run, learner, sources)
        if after is not None:
            assert sources.held_out is not None  # noqa: S101 (see above)
            after(sources.held_out, learner.policy, learner.update.objective)
    run.accelerator.wait_for_everyone()
    done = learner.weights.path_in(config.output, learner.policy.family.component)
    run.say(f"the {'LoRA' if config.lora else 'network'} is in {done}")
    return done


def repeat(run: Run[Config], learner: Learner, sources: Sources) -> None:
    """The training loop: update, measure, log; `Run.steps` saves and stops."""
    settings, held_out, meter, objective = run.config.train, sources.held_out, learner.meter, learner.update.objective
    looks = learner.looks
    parameters = distributed.parameters(learner.optimizer)
    watch, empty = Watch(tqdm.write), 0
    if looks is not None:
        with meter.paused():
            looks.begin(run)
    with Threads(run.accelerator.device.type, (each.numel() for each in parameters)) as threads:
        for step in run.steps():
            started, done = time.perf_counter(), step + 1
            metrics = learner.update(step, parameters, learner.optimizer, learner.schedule)
            threads.adapt()
            metrics["pairs_per_second"] = learner.update.per_update / (time.perf_counter() - started)
            metrics |= meter.totals()
            if held_out and (done % settings.eval_every == 0 or done == settings.steps):
                with meter.paused():
                    metrics |= held_out.measure(learner.policy, objective)
            images: list[Any] = []
            if looks is not None and looks.due(done, settings.steps):
                with meter.paused():
                    more, images = looks.look(run, done, learner.writer)
                metrics |= more
            empty = 0 if "loss" in metrics else empty + 1
            if empty == EMPTY_ROUNDS:
                raise DiffpoError(
                    f"no valid pair in {empty} updates up to step {done}: the scores of the samples do not differ "
                    f"enough. Lower objective.rollout.threshold, raise rollout.prompts, or name other scorers"
                )
            if run.main and not objective.reference.free:  # there is nothing that errors could have risen above
                watch.look(done, metrics)
            run.log(metrics, headline(metrics), images)


def finish(run: Run[Config], learner: Learner, sources: Sources) -> None:
    """Write what was trained, with its model card."""
    step = run.step
    if learner.looks is not None and (best := learner.looks.chosen()) is not None:
        learner.weights.restore(run.output / BEST, learner.policy.family.component)
        step = best
    write = learner.writer(step)
    if run.main:
        if sources.conditioned is not None:
            path, data = run.output / lora_file.USERS_FILE_NAME, run.config.data
            users.save(path, learner.policy.network, data.resolution, sources.conditioned.header)
        write(run.output)
        write_card(run.config, learner.about, sources.size, run.output)


@dataclass
class Learner:
    """What is trained, and all that a checkpoint of it holds. ``about`` goes into the header of the LoRA file."""

    config: Config
    policy: Policy  # the bare network
    weights: trained.Weights  # of it
    update: Updater
    optimizer: Optimizer
    schedule: LRScheduler
    meter: Meter
    about: dict[str, Any]
    looks: stop.Looks | None = None

    def origin(self, sources: Sources) -> dict[str, Any]:
        """What the run starts from; resuming compares it."""
        lora, held_out = self.config.lora, sources.held_out
        return {
            **self.about,
            "settings": self.config.model_dump(mode="json"),
            "validation_hash": held_out.batches.groups.data_hash if held_out else None,
            "start_hash": trained.file_hash(lora.start) if lora and lora.start else None,
        }

    def writer(self, step: int) -> Callable[[Path], None]:
        gathered, about = self.weights.gather(), {**self.about, "step": step}
        return lambda folder: self.weights.save(folder, gathered, self.policy.family.component, about)

    def state(self) -> dict[str, Any]:
        accelerator = self.update.accelerator
        calls, moments = self.meter.state(), sharding.whole(self.optimizer.state_dict())
        if not accelerator.is_main_process:
            return {}
        state = {"optimizer": moments, "schedule": self.schedule.state_dict(), "calls": calls}
        state["update"] = self.update.state()
        if hasattr(self.policy.network, "user_tokens"):
            state["users"] = self.policy.network.user_tokens.state_dict()
        if accelerator.scaler is not None:
            state["scaler"] = accelerator.scaler.state_dict()
        if self.looks is not None:
            state["looks"] = self.looks.state()
        return state

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        scaler = self.update.accelerator.scaler
        self.weights.restore(folder, self.policy.family.component)
        distributed.load_optimizer(self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if "users" in state:
            self.policy.network.user_tokens.load_state_dict(state["users"])
        if "scaler" in state and scaler is not None:
            scaler.load_state_dict(state["scaler"])
        self.update.load(state["update"])
        self.meter.load(state["calls"])
        if self.looks is not None:
            self.looks.load(state.get("looks", {}))


def make_learner(run: Run[Config]) -> tuple[Learner, Sources]:
    """Model, data, objective and optimiser of the run's config, ready for the first step."""
    config, settings, accelerator = run.config, run.config.train, run.accelerator
    family = models.load(config.model, settings.precision, config.data.resolution)
    distributed.check(config, family, accelerator)
    if config.lora is not None and config.lora.text_encoders:
        family.train_text()
    sources = load_data(config, family, accelerator)
    weights = trained.load(config, family, distributed.loading_device(accelerator))
    network = weights.network
    meter = Meter(network, accelerator)
    for copy in weights.frozen():
        meter.watch(copy)
    base = identity.base_identity(network, config.model.path)
    parameters = weights.begin(config, family)
    if sources.conditioned is not None:
        prototypes = config.objective.prototypes
        parameters += attach(network, sources.conditioned.scale, settings.seed, prototypes).parameters()
    bare = Policy(family, network, accelerator.autocast)
    objective, feed = make_objective(config, sources, bare, accelerator)
    if objective.perceptual is not None:
        meter.watch(objective.perceptual.encoder)
    if settings.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if config.lora and not settings.compile and not distributed.sharded(accelerator):
        lora_forward.install(network)
    if settings.compile:
        for each in (network, *weights.frozen()):
            distributed.compile_blocks(family, each)
    optimizer = make_optimizer(settings, lora.by_rate(network, parameters, config.lora, settings.lr))
    schedule = make_schedule(settings, optimizer)
    wrapped, optimizer = distributed.prepare(accelerator, network, optimizer)
    update = Updater(settings, replace(bare, network=wrapped), objective, feed, accelerator)
    about = {
        "objective": methods.label(config.objective.name),
        "beta": config.objective.strength,
        "base": base,
        "data_hash": sources.hash,
        "pairs_per_update": update.per_update,
    }
    looks = stop.make(config, sources.samples, bare, Worker.of(accelerator)) if sources.samples else None
    return Learner(config, bare, weights, update, optimizer, schedule, meter, about, looks), sources
