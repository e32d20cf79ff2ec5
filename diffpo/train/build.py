"""What a training run is made of: the machine, the data with its caches, the objective, the optimiser."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from .. import links, models
from ..common.errors import DiffpoError
from ..common.imports import load_attribute
from ..common.text import plain
from ..common.worker import Worker
from ..config import Config, Optimisation
from ..data.batches import Batch, Batches, latents_can_be_cached
from ..data.buckets import Buckets
from ..data.cache import content_key
from ..data.curriculum import Curriculum
from ..data.groups import Groups, load_groups
from ..data.prompts import load_prompts
from ..data.relabel import turn
from ..models.lazy_encoders import LazyEncoders
from ..objective import reference, users, weighting
from ..objective.kept import KeptErrors
from ..objective.reference import Behaviour, Reference
from ..objective.reward import Objective
from ..objective.steering import Steering, read_rewards
from ..problems.forward import Forward
from ..problems.policy import Policy
from ..problems.regression import Regression
from ..rollout.labels import read_labels
from ..rollout.prompts import PromptConditions
from ..scorers import features
from ..weights import trained
from .feeds import Feed, Offline
from .heldout import HeldOut, spread

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..models.family import Family

MANY = 20  # epochs after which every group counts as drawn, without a look at the order


def make_accelerator(settings: Optimisation) -> Accelerator:
    from accelerate import Accelerator, InitProcessGroupKwargs

    refusal = f"train.precision={settings.precision} does not work on this machine"
    try:
        # the first run fills the caches, and the processes wait for one another while it does
        accelerator = Accelerator(
            mixed_precision=settings.precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=24))]
        )
    except ValueError as error:
        raise DiffpoError(f"{refusal}: {error}") from None
    if settings.precision == "fp16" and accelerator.scaler is None:
        raise DiffpoError(f"{refusal}: there is no loss scaling for {accelerator.device.type}; use bf16 or no")
    return accelerator


@dataclass
class Sources:
    """The data of a run. ``batches``: the training data, if any; ``conditions``: of the prompts that an on-policy
    objective samples for; ``held_out``: what is measured on, if anything."""

    batches: Batches | None
    conditions: PromptConditions | None
    held_out: HeldOut | None
    conditioned: users.Tastes | Steering | None = None  # what the policy is further conditioned on
    samples: PromptConditions | None = None  # of the prompts of `log.samples`

    @property
    def hash(self) -> str:
        """Of all data that are trained on."""
        hashes = [self.batches.groups.data_hash] if self.batches else []
        return "-".join(hashes + ([content_key(self.conditions.prompts)] if self.conditions else []))

    @property
    def size(self) -> str:
        """In words, for the model card."""
        found = [f"{len(self.batches.groups)} {self.batches.groups.kind}s"] if self.batches else []
        return " and ".join(found + ([f"{len(self.conditions.prompts)} prompts"] if self.conditions else []))


def load_data(config: Config, family: Family, accelerator: Accelerator) -> Sources:
    """The config's data with their caches filled; the encoders are freed, the VAE too unless it is needed."""
    data, objective, worker = config.data, config.objective, Worker.of(accelerator)
    say = accelerator.print
    found = {}
    if data.train:
        found["train"] = load_groups(data, data.train, data.train_split, links.kind(objective.link), quiet=worker.quiet)
        if {"gap", "scores"} & set(links.needs(objective.link)) and not objective.on_policy:
            found["train"].require_scores(f"link {objective.link} needs scores")
    if data.validation:
        found["validation"] = load_groups(data, data.validation, data.validation_split, "pair", quiet=worker.quiet)
    for groups in found.values():
        if objective.flipped:
            turn(groups)
        if objective.users:
            users.require_users(groups)
        say(f"{groups.source}: {groups.describe()}")
        for remark in groups.remarks():
            say(f"  {remark}")
        if groups.bad:
            say(f"  skipped: {groups.describe_bad()}")
    if data.train and data.cache_latents and not latents_can_be_cached(data):
        say(
            "latents are not cached, because data.flip or data.crop=random shows another picture at each step; the "
            "VAE stays"
        )
    encoders = LazyEncoders(family, accelerator.device, data.cache, write=worker.index == 0)
    batches = {}
    for name, groups in found.items():
        # held-out draws do not depend on the run's seed, so that runs can be compared
        seed, needed = 0, set(spread(len(groups), config.train.eval_pairs))
        if name == "train":
            seed, needed = config.train.seed, visited(config, groups, pairs_per_update(config, worker))
        batches[name] = Batches(groups, data, encoders, seed, worker, needed)
    captions = {caption for each in batches.values() for caption in each.captions}
    conditions = None
    prompts: list[str] = []
    if objective.on_policy and objective.rollout.labels:
        prompts = sorted({label.prompt for label in read_labels(objective.rollout.labels)})
    elif objective.on_policy and data.prompts:
        prompts = load_prompts(data.prompts, pictures=data.columns.source)
    if prompts:
        conditions = PromptConditions(prompts, data, encoders, worker)
        captions |= set(conditions.captions)
    samples = None
    if config.log.samples is not None:
        prompts = load_prompts(config.log.samples.prompts, pictures=data.columns.source)[: config.log.samples.n]
        samples = PromptConditions(prompts, data, encoders, worker)
        captions |= set(samples.captions)
    texts = sorted(captions)
    if long := encoders.remember(f"long {content_key(texts)}", lambda: models.too_long(family.pipe, texts)):
        say(f"captions: {long}")
    accelerator.wait_for_everyone()
    tastes, steering = {}, {}
    for name, each in batches.items():
        each.check()
        if objective.users:
            seen = None if objective.taste == "latents" else features.load(objective.taste, str(accelerator.device))
            tastes[name] = users.read_tastes(each, seen)
            each.further = tastes[name].condition
        if objective.steered:
            steering[name] = read_rewards(each.groups)
            each.further, each.judge = steering[name].condition, steering[name].preference
    decodes = objective.on_policy or samples is not None
    encoders.free(keep_vae=decodes or not all(each.cached for each in batches.values()))
    held_out = None
    if "validation" in batches:
        # without gradients twice the pairs fit
        held_out = HeldOut(batches["validation"], config.train.eval_pairs, 2 * config.train.batch_size, accelerator)
    conditioned = tastes.get("train") or steering.get("train")
    return Sources(batches.get("train"), conditions, held_out, conditioned, samples)


def make_optimizer(settings: Optimisation, parameters: list[Any]) -> torch.optim.Optimizer:
    """An optimiser class by its path, e.g. torch.optim.AdamW or bitsandbytes.optim:AdamW8bit. Its module is imported,
    which runs the module; the class is called only if it is derived from torch's Optimizer. ``parameters`` may be
    groups with options of their own."""
    path, kind = settings.optimizer, "a class derived from torch.optim.Optimizer"
    try:
        cls = load_attribute(path, "train.optimizer", kind, _is_optimizer)
    except DiffpoError as error:
        advice = ' (pip install "diffpo[quantised]")' if path.startswith("bitsandbytes") else ""
        raise DiffpoError(f"{error}{advice}") from None
    try:
        return cls(parameters, lr=settings.lr, **settings.optimizer_args)
    except Exception as error:  # each class has its own checks of its arguments
        raise DiffpoError(f"train.optimizer_args do not fit {path}: {plain(error, 300)}") from None


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, torch.optim.Optimizer)


def make_schedule(settings: Optimisation, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Linear warm-up, then constant or falling to 0 at the last step, linearly or as a half cosine."""
    from diffusers.optimization import get_scheduler

    name = "constant_with_warmup" if settings.lr_schedule == "constant" else settings.lr_schedule
    return get_scheduler(name, optimizer, num_warmup_steps=settings.warmup, num_training_steps=settings.steps)


def make_objective(
    config: Config, sources: Sources, policy: Policy, accelerator: Accelerator
) -> tuple[Objective, Feed]:
    """The composed objective and what it trains on. The policy's network is bare, and has its adapter already."""
    settings = config.objective
    against = reference.make(settings.reference, policy, started=bool(config.lora and config.lora.start))
    behaviour = None
    if settings.behaviour.policy != "none":
        behaviour = Behaviour(settings.behaviour, policy, settings.rollout.updates)
    perceptual = None
    if settings.error == "perceptual":
        from ..objective.perceptual import Perceptual

        perceptual = Perceptual(policy.family, policy.network, settings.features == "middle")
    sampler = behaviour if behaviour is not None and settings.rollout.sampler == "behaviour" else against
    feed = _feed(config, sources, against, sampler, accelerator)
    kept = None
    if settings.forward.draws is not None and sources.batches is not None:
        groups = sources.batches.groups
        kept = KeptErrors(len(groups) * settings.forward.draws, groups.members)
    uniform = functools.partial(torch.ones_like, dtype=torch.float32)
    objective = Objective(settings, against, uniform, perceptual, behaviour, kept)
    errors = None
    if settings.weighting == "measured" and isinstance(feed, Offline):

        def error(base: Policy, regression: Regression) -> torch.Tensor:
            return objective.error(base.predict(regression), regression)

        rows = 2 * config.train.batch_size
        errors = weighting.measure(policy, error, feed.source, feed.batches, rows, Worker.of(accelerator))
    return replace(objective, omega=weighting.make(settings.weighting, policy.family, errors)), feed


def _feed(
    config: Config, sources: Sources, against: Reference, sampler: Reference | Behaviour, accelerator: Accelerator
) -> Feed:
    """The data through a source of regression problems, or the policy's own samples, or samples that people judged.
    ``sampler``: what samples where the policy does not."""
    settings, worker = config.objective, Worker.of(accelerator)
    per_update = pairs_per_update(config, worker)
    if settings.source == "reward":
        return _rewarded(config, sources, against.policy, per_update)
    if settings.on_policy:
        return _sampled(config, sources, against.policy, sampler, worker)
    policy, batches = against.policy, sources.batches
    assert batches is not None  # noqa: S101 (`Config` requires data.train for these sources)
    source: Callable[[Batch], Regression] = Forward(policy.family, settings.forward)
    if settings.source == "inversion":
        from ..problems.inversion import Inversion

        source = inversion = Inversion(settings.inversion, policy, against.on)
        if settings.inversion.cache:
            inversion.prepare(batches, config.data.cache, worker)
            accelerator.wait_for_everyone()
    order = training_order(config, batches.groups)
    return Offline(batches, source, lambda position: order.visit(position, per_update), settings.forward.draws)


def pairs_per_update(config: Config, worker: Worker) -> int:
    return config.train.batch_size * config.train.accumulation * worker.count


def training_order(config: Config, groups: Groups) -> Buckets | Curriculum:
    if config.data.buckets:
        return Buckets([group.target for group in groups.groups], config.train.seed)
    return Curriculum(groups, config.data, config.train.seed)


def visited(config: Config, groups: Groups, per_update: int) -> set[int]:
    """The groups that a run needs latents and text embeddings of: those that its updates draw, or all."""
    settings, total, everything = config.objective, config.train.steps * per_update, set(range(len(groups)))
    beyond = settings.users or settings.weighting == "measured" or settings.source == "self_play"
    beyond = beyond or (settings.source == "inversion" and settings.inversion.cache)
    if beyond or total > MANY * len(groups):
        return everything
    order, found = training_order(config, groups), set()
    for position in range(total):
        found.add(order.index(position, per_update))
        if len(found) == len(everything):
            break
    return found


def _rewarded(config: Config, sources: Sources, policy: Policy, per_update: int) -> Feed:
    """The policy's own images, with the gradient of their score."""
    from ..rollout.direct import Direct

    settings, seed = config.objective, config.train.seed
    if config.train.gradient_checkpointing:
        policy.family.pipe.vae.enable_gradient_checkpointing()
    data = None
    if settings.sft:
        assert sources.batches is not None  # noqa: S101 (`Config` requires data.train for it)
        order = Curriculum(sources.batches.groups, config.data, seed)
        forward = Forward(policy.family, settings.forward)
        data = Offline(sources.batches, forward, lambda position: order.visit(position, per_update)).regression
    assert sources.conditions is not None  # noqa: S101 (`Config` requires data.prompts)
    return Direct(settings, sources.conditions, policy, seed, data)


def _sampled(config: Config, sources: Sources, policy: Policy, sampler: Reference | Behaviour, worker: Worker) -> Feed:
    """The policy's own samples, or samples that people judged."""
    from ..rollout.feed import OnPolicy
    from ..rollout.labelled import Labelled
    from ..rollout.round import ImageRounds, PoolRounds, SelfPlayRounds

    settings, seed = config.objective, config.train.seed
    per_update = pairs_per_update(config, worker)
    batches, conditions = sources.batches, sources.conditions
    if conditions is not None and settings.rollout.labels is not None:
        start = config.lora.start if config.lora else None
        sampled_by = trained.file_hash(start) if start else None
        return Labelled(settings.rollout.labels, settings.rollout, conditions, policy, seed, sampled_by)
    if settings.source == "self_play":
        assert batches is not None  # noqa: S101 (`Config` requires data.train for it)
        return OnPolicy(SelfPlayRounds(settings, batches, policy, sampler, seed), worker, per_update)
    assert conditions is not None  # noqa: S101 (`Config` requires data.prompts or labels)
    kind = PoolRounds if settings.source == "pool" else ImageRounds
    return OnPolicy(kind(settings, conditions, policy, sampler, seed), worker, per_update)
