"""`diffpo train`: the loop, top to bottom, on accelerate.

Reproducibility: pairs, noise, timesteps and augmentation have addresses (rng.py), so that the pairs of update k and
their draws do not depend on how the update is cut into forward passes and processes, nor on where the run was
interrupted.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .. import models
from ..common.errors import DiffpoError
from ..common.run_folder import CHECKPOINT
from ..common.text import plain
from ..common.threads import Threads
from ..config import Config
from ..export.card import write_card
from ..models import identity
from ..objective import users
from ..problems.policy import Policy
from ..weights import lora_file, sharding, trained
from . import checkpoint, distributed
from .build import load_data, make_accelerator, make_objective, make_optimizer, make_schedule
from .metrics import Meter, Tracker, Watch, headline
from .update import Diverged, Stuck, Updater

EMPTY_ROUNDS = 20  # updates on end without anything to learn from


class Interrupted(DiffpoError):
    exit_code = 130


def train(config: Config) -> Path:
    """Train ``config``'s LoRA or network into ``config.output``, or resume it there; returns what `trained.save` wrote.

    Raises DiffpoError on bad input, if another run is at work in the folder, on a NaN (with the last good state saved)
    and on a full disk, and Interrupted after SIGINT or SIGTERM once the step is finished and saved.
    """
    accelerator = make_accelerator(config.train)
    with distributed.by_main(accelerator, checkpoint.claim(config)):
        return _train(config, accelerator)


def _train(config: Config, accelerator: Any) -> Path:
    settings, output, say = config.train, config.output, accelerator.print
    family = models.load(config.model, settings.precision, config.data.resolution)
    distributed.check(config, family, accelerator)
    sources = load_data(config, family, accelerator)
    network = trained.load_network(config, family, distributed.place(accelerator))
    meter = Meter(network, accelerator)
    for copy in trained.frozen(network):
        meter.watch(copy)
    base = identity.base_identity(network, config.model.path)
    parameters = trained.begin(config, family, network)
    if config.objective.users:
        parameters += users.attach(network, sources.tastes.scale, settings.seed).parameters()
    bare = Policy(family, network, accelerator.autocast)
    objective, feed = make_objective(config, sources, bare, accelerator)
    if objective.perceptual is not None:
        meter.watch(objective.perceptual.encoder)
    if settings.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if settings.compile:
        for each in (network, *trained.frozen(network)):
            distributed.compile_blocks(each)
    optimizer = make_optimizer(settings, parameters)
    schedule = make_schedule(settings, optimizer)
    wrapped, optimizer = distributed.prepare(accelerator, network, optimizer)
    parameters = distributed.parameters(optimizer)
    update = Updater(settings, replace(bare, network=wrapped), objective, feed, accelerator)

    about = {
        "objective": config.objective.name,
        "beta": config.objective.beta,
        "base": base,
        "data_hash": sources.hash,
        "pairs_per_update": update.per_update,
    }
    validation = sources.held_out.batches.groups.data_hash if sources.held_out else None
    start = trained.file_hash(config.lora.start) if config.lora and config.lora.start else None
    started_with = {"settings": config.model_dump(mode="json"), "validation_hash": validation, "start_hash": start}
    step = 0
    if found := checkpoint.latest(output, say):
        step = resume(*found, {**about, **started_with}, network, optimizer, schedule, accelerator, update, meter)
        if step > settings.steps:
            raise DiffpoError(f"{output} is already at step {step}, beyond train.steps={settings.steps}")
        say(f"resuming from {found[0]} (step {step})")

    def save(step: int) -> Path | None:
        calls, moments, weights = meter.state(), sharding.whole(optimizer.state_dict()), trained.gather(network)
        if not accelerator.is_main_process:
            return None
        state = {"optimizer": moments, "schedule": schedule.state_dict(), "calls": calls}
        state["update"] = update.state()
        if config.objective.users:
            state["users"] = network.user_tokens.state_dict()
        if accelerator.scaler is not None:
            state["scaler"] = accelerator.scaler.state_dict()

        def write(folder: Path) -> None:
            trained.save(folder, network, weights, family.component, {**about, "step": step})

        return checkpoint.save(output, step, write, state, {**about, **started_with}, settings.checkpoint_keep)

    tracker = None
    if accelerator.is_main_process:  # not before it is certain that the run goes on from what is there
        checkpoint.write_config(config)
        with checkpoint.disk_errors(output):
            tracker = Tracker(output, step, config.log.tensorboard)
    watch = Watch(tqdm.write)
    last_saved = step if found else None
    metrics: dict[str, float] = {}
    empty = 0
    with (
        checkpoint.disk_errors(output),
        contextlib.closing(tracker) if tracker else contextlib.nullcontext(),
        interruption(accelerator) as interrupted,
        Threads(accelerator.device.type, (each.numel() for each in parameters)) as threads,
        tqdm(
            total=settings.steps, initial=step, desc=plain(output.name, 40), unit="step", disable=tracker is None
        ) as bar,
    ):
        while step < settings.steps:
            started = time.perf_counter()
            try:
                metrics = update(step, parameters, optimizer, schedule)
            except Diverged as error:
                if step and last_saved != step and not error.spoilt:
                    save(step)
                    last_saved = step
                good = output / f"{CHECKPOINT}{last_saved:06d}" if last_saved else None
                kept = f"the state before it is in {good}" if good else "there is no good state yet"
                advice = (
                    "Lower train.lr or raise objective.beta (in a new output folder), or use precision bf16, not fp16"
                )
                if step == 0 and not error.spoilt:  # nothing was trained yet
                    advice = (
                        "The base model itself gives this: look at its weights, its VAE (model.vae) and train.precision"
                    )
                raise DiffpoError(f"{error}; stopped, {kept}. {advice}") from None
            except Stuck as error:
                kept = ""
                # of several processes the others wait for this one, and saving is something that all do together
                if step and accelerator.num_processes == 1:
                    if last_saved != step:
                        save(step)
                    kept = f" (stopped; step {step} is saved in {output}, and the same command resumes there)"
                raise DiffpoError(f"{error}{kept}") from None
            step += 1
            threads.adapt()
            metrics["pairs_per_second"] = update.per_update / (time.perf_counter() - started)
            metrics |= meter.totals()
            if sources.held_out and (step % settings.eval_every == 0 or step == settings.steps):
                with meter.paused():
                    metrics |= sources.held_out.measure(bare, objective)
            empty = 0 if "loss" in metrics else empty + 1
            if empty == EMPTY_ROUNDS:
                raise DiffpoError(
                    f"no valid pair in {empty} updates up to step {step}: the judge sees no difference between the "
                    f"samples. Lower objective.rollout.threshold, raise rollout.prompts, or name other scorers"
                )
            if tracker:
                tracker.log(step, metrics)
                if not objective.reference.free:  # without one there is nothing that errors could have risen above
                    watch.look(step, metrics)
                bar.set_postfix_str(headline(metrics), refresh=False)
                bar.update()
            stop = interrupted()
            if step % settings.checkpoint_every == 0 or step == settings.steps or stop:
                save(step)
                last_saved = step
            if stop and step < settings.steps:
                raise Interrupted(f"interrupted: step {step} is saved in {output}; the same command resumes there")
        weights = trained.gather(network)
        if accelerator.is_main_process:
            if config.objective.users:
                users.save(output / lora_file.USERS_FILE_NAME, network, config.data.resolution)
            trained.save(output, network, weights, family.component, {**about, "step": step})
            write_card(config, about, sources.size, output)
    accelerator.wait_for_everyone()
    done = trained.place(output, network, family.component)
    say(f"the {'LoRA' if config.lora else 'network'} is in {done}")
    return done


def resume(
    folder: Path,
    manifest: dict,
    about: dict,
    network: Any,
    optimizer: Any,
    schedule: Any,
    accelerator: Any,
    update: Updater,
    meter: Meter,
) -> int:
    """Put everything back as it was at the checkpoint; DiffpoError if base, data or batch are not what they were."""
    anew = "start a new run with output=FOLDER"
    for key, what, mend in (
        ("data_hash", "the training pairs are not those", "Point data.train or data.prompts at the same data"),
        ("validation_hash", "the validation pairs are not those", "Point data.validation at the same data"),
        ("start_hash", "lora.start is not the LoRA", "Set lora.start to that one"),
        (
            "pairs_per_update",
            "batch_size x accumulation x processes is not the product",
            "Set train.batch_size and train.accumulation accordingly",
        ),
    ):
        if manifest.get(key, about[key]) != about[key]:  # older checkpoints have only some of them
            raise DiffpoError(
                f"cannot resume {folder}: {what} that the run started with ({manifest[key]} there, {about[key]} now). "
                f"{mend}, or {anew}"
            )
    if not identity.same_base(manifest["base"], about["base"]):
        raise DiffpoError(
            f"cannot resume {folder}: the base model is not the one that the run started with. Set model.path to that "
            f"one, or {anew}"
        )
    trained.restore(folder, network, update.policy.family.component)
    state = checkpoint.read_state(folder)
    distributed.load_optimizer(optimizer, state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    if "users" in state:
        network.user_tokens.load_state_dict(state["users"])
    if "scaler" in state and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    update.load(state["update"])
    meter.load(state["calls"])
    return manifest["step"]


@contextlib.contextmanager
def interruption(accelerator: Any) -> Iterator[Any]:
    """Within it the first SIGINT or SIGTERM only sets a flag; the value asks whether any process was asked to stop."""
    asked: list[int] = []

    def note(number: int, _frame: Any) -> None:
        asked.append(number)
        accelerator.print("\nfinishing the step and saving; once more to stop at once")
        for each, handler in previous.items():
            signal.signal(each, handler)

    previous: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # signals belong to the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)

    def interrupted() -> bool:
        if accelerator.num_processes == 1:
            return bool(asked)
        flag = torch.tensor([float(len(asked))], device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum").item())

    try:
        yield interrupted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
