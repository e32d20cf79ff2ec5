"""`diffpo train`: the loop, top to bottom, on accelerate.

Reproducibility: pairs, noise, timesteps and augmentation have addresses (rng.py), so that the pairs of update k and
their draws do not depend on how the update is cut into forward passes and processes, nor on where the run was
interrupted.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from . import checkpoint, lora, models, objectives
from .card import write_card
from .config import Config, Train
from .data.batches import Batches, latents_can_be_cached, order
from .data.pairs import load_pairs
from .errors import DiffpoError
from .heldout import HeldOut
from .reward import score
from .track import Tracker, Watch, headline, summarize


class Interrupted(DiffpoError):
    exit_code = 130


def train(config: Config) -> Path:
    """Train ``config``'s LoRA into ``config.output`` or resume it there; returns the LoRA file.

    Raises DiffpoError on bad input, on a NaN (with the last good state saved) and on a full disk, and Interrupted after
    SIGINT or SIGTERM once the step is finished and saved.
    """
    settings, output = config.train, config.output
    accelerator = make_accelerator(settings)
    say = accelerator.print
    if accelerator.is_main_process:
        checkpoint.claim(config)
    accelerator.wait_for_everyone()

    objective = objectives.load(config.objective.name)
    family = models.load(config.model, settings.precision)
    train_data, held_out = load_data(config, family, accelerator)
    unet = family.load_unet(accelerator.device)
    base = lora.base_identity(unet, config.model.path)
    parameters = lora.add_lora(unet, config.lora, family.lora_targets, settings.seed)
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = make_optimizer(settings, parameters)
    schedule = make_schedule(settings, optimizer)

    per_update = settings.batch_size * settings.accumulation * accelerator.num_processes
    about = {
        "objective": config.objective.name,
        "beta": config.objective.beta,
        "base": base,
        "data_hash": train_data.pairs.data_hash,
        "pairs_per_update": per_update,
    }
    step = 0
    if found := checkpoint.latest(output, say):
        step = resume(*found, about, unet, optimizer, schedule, accelerator)
        if step > settings.steps:
            raise DiffpoError(f"{output} is already at step {step}, beyond train.steps={settings.steps}")
        say(f"resuming from {found[0]} (step {step})")
    policy = accelerator.prepare_model(unet)
    optimizer = accelerator.prepare_optimizer(optimizer)

    def save(step: int) -> Path | None:
        if not accelerator.is_main_process:
            return None
        state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        if accelerator.scaler is not None:
            state["scaler"] = accelerator.scaler.state_dict()

        def write_lora(path: Path) -> None:
            lora.save_lora(path, unet, family.component, {**about, "step": step})

        return checkpoint.save(output, step, write_lora, state, about, settings.checkpoint_keep)

    def update(step: int) -> dict[str, float]:
        """One optimiser step on the pairs at positions step * per_update, ...; returns its metrics."""
        tables = []
        for part in range(settings.accumulation):
            first = (
                step * per_update + (part * accelerator.num_processes + accelerator.process_index) * settings.batch_size
            )
            positions = range(first, first + settings.batch_size)
            indices = [order(settings.seed, len(train_data.pairs), position) for position in positions]
            regression = objective.source(family, train_data.batch(indices, positions))
            with contextlib.nullcontext() if part == settings.accumulation - 1 else accelerator.no_sync(policy):
                with accelerator.autocast():
                    result = score(family, policy, unet, objective.reference, regression, config.objective.beta)
                losses = objective.link(result.chosen, result.rejected, regression.preference)
                accelerator.backward(losses.mean() / settings.accumulation)
            deltas = (result.error - result.reference_error).chunk(2)
            columns = (losses, result.chosen, result.rejected, *deltas, regression.t.chunk(2)[0])
            tables.append(torch.stack([column.detach().float() for column in columns], 1))
        table = accelerator.gather(torch.cat(tables))
        norm = accelerator.clip_grad_norm_(parameters, settings.max_grad_norm or math.inf)
        # the loss scale of fp16 is found by overflowing now and then, which the scaler answers by skipping the update
        if not table.isfinite().all() or (accelerator.scaler is None and not torch.isfinite(norm)):
            raise Diverged(
                f"the {'loss' if not table.isfinite().all() else 'gradient'} is not finite at step {step + 1}"
            )
        metrics = {
            **summarize(table, family.train_timesteps),
            "grad_norm": norm.item(),
            "lr": schedule.get_last_lr()[0],
        }
        try:
            optimizer.step()
        except (TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise DiffpoError(f"train.optimizer {settings.optimizer} failed at step {step + 1}: {reason}") from error
        # a step can overflow; then the loss of the next one would show it, but nothing may be saved until then
        if not torch.stack([parameter.detach().abs().amax() for parameter in parameters]).amax().isfinite():
            raise Diverged(f"the weights are not finite after step {step + 1}", spoilt=True)
        schedule.step()
        optimizer.zero_grad()
        return metrics

    tracker = None
    if accelerator.is_main_process:
        with checkpoint.disk_errors(output):
            tracker = Tracker(output, step, config.log.tensorboard)
    watch = Watch(tqdm.write)
    last_saved = step if found else None
    metrics: dict[str, float] = {}
    with (
        checkpoint.disk_errors(output),
        contextlib.closing(tracker) if tracker else contextlib.nullcontext(),
        interruption(accelerator) as interrupted,
        tqdm(total=settings.steps, initial=step, desc=output.name, unit="step", disable=tracker is None) as bar,
    ):
        while step < settings.steps:
            started = time.perf_counter()
            try:
                metrics = update(step)
            except Diverged as error:
                if step and last_saved != step and not error.spoilt:
                    save(step)
                    last_saved = step
                good = output / f"{checkpoint.PREFIX}{last_saved:06d}" if last_saved else None
                kept = f"the state before it is in {good}" if good else "there is no good state yet"
                advice = (
                    "Lower train.lr or raise objective.beta (in a new output folder), or use precision bf16, not fp16"
                )
                if step == 0 and not error.spoilt:  # nothing was trained yet
                    advice = (
                        "The base model itself gives this: look at its weights, its VAE (model.vae) and train.precision"
                    )
                raise DiffpoError(f"{error}; stopped, {kept}. {advice}") from None
            step += 1
            metrics["pairs_per_second"] = per_update / (time.perf_counter() - started)
            if held_out and (step % settings.eval_every == 0 or step == settings.steps):
                with accelerator.autocast():
                    metrics |= held_out.measure(family, unet, objective, config.objective.beta, accelerator)
            if tracker:
                tracker.log(step, metrics)
                watch.look(step, metrics)
                bar.set_postfix_str(headline(metrics), refresh=False)
                bar.update()
            stop = interrupted()
            if step % settings.checkpoint_every == 0 or step == settings.steps or stop:
                save(step)
                last_saved = step
            if stop and step < settings.steps:
                raise Interrupted(f"interrupted: step {step} is saved in {output}; the same command resumes there")
        if accelerator.is_main_process:
            part = output / f".{lora.FILE_NAME}.part"
            lora.save_lora(part, unet, family.component, {**about, "step": step})
            part.replace(output / lora.FILE_NAME)
            write_card(config, about, train_data.pairs, output)
    accelerator.wait_for_everyone()
    say(f"the LoRA is in {output / lora.FILE_NAME}")
    return output / lora.FILE_NAME


class Diverged(Exception):
    """A loss, gradient or weight that is not a number; caught in the loop, which knows what was saved.

    ``spoilt``: the weights are touched already; otherwise they are those after the last good update.
    """

    def __init__(self, message: str, spoilt: bool = False) -> None:
        super().__init__(message)
        self.spoilt = spoilt


def make_accelerator(settings: Train) -> Any:
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


def load_data(config: Config, family: Any, accelerator: Any) -> tuple[Batches, HeldOut | None]:
    """Train and validation batches with their caches filled; the encoders are freed, the VAE too unless it is
    needed."""
    data, quiet = config.data, not accelerator.is_main_process
    say = accelerator.print
    found = [load_pairs(data, data.train, data.train_split, quiet=quiet)]
    if data.validation:
        found.append(load_pairs(data, data.validation, data.validation_split, quiet=quiet))
    for pairs in found:
        ties = f", {pairs.ties} ties {'left out' if data.ties == 'drop' else 'as soft labels'}" if pairs.ties else ""
        say(f"{pairs.source}: {len(pairs)} pairs{ties}")
        if pairs.bad:
            say(f"  skipped: {pairs.describe_bad()}")
    if data.cache_latents and not latents_can_be_cached(data):
        say(
            "latents are not cached, because data.flip or data.crop=random shows another picture at each step; the "
            "VAE stays"
        )
    family.load_encoders(accelerator.device)
    place = (accelerator.device, accelerator.process_index, accelerator.num_processes)
    # held-out draws do not depend on the run's seed, so that runs can be compared
    batches = [
        Batches(pairs, data, family, seed, *place) for pairs, seed in zip(found, (config.train.seed, 0), strict=False)
    ]
    if long := models.too_long(family.pipe, sorted({caption for each in batches for caption in each.captions})):
        say(f"captions: {long}")
    accelerator.wait_for_everyone()
    for each in batches:
        each.check()
    family.free_encoders(keep_vae=not batches[0].cached)
    if len(batches) == 1:
        return batches[0], None
    # without gradients twice the pairs fit
    return batches[0], HeldOut(batches[1], config.train.eval_pairs, 2 * config.train.batch_size, accelerator)


def make_optimizer(settings: Train, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Any class by its dotted path, e.g. torch.optim.AdamW or bitsandbytes.optim.AdamW8bit."""
    module, _, name = settings.optimizer.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise DiffpoError(
            f"train.optimizer {settings.optimizer!r} cannot be imported: {error}; is its package installed?"
        ) from None
    try:
        optimizer = cls(parameters, lr=settings.lr, **settings.optimizer_args)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DiffpoError(f"train.optimizer_args do not fit {settings.optimizer}: {error}") from None
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise DiffpoError(f"train.optimizer {settings.optimizer!r} is not an optimizer of torch's kind")
    return optimizer


def make_schedule(settings: Train, optimizer: torch.optim.Optimizer) -> Any:
    """Linear warm-up, then constant or falling to 0 at the last step, linearly or as a half cosine."""
    from diffusers.optimization import get_scheduler

    name = "constant_with_warmup" if settings.lr_schedule == "constant" else settings.lr_schedule
    return get_scheduler(name, optimizer, num_warmup_steps=settings.warmup, num_training_steps=settings.steps)


def resume(
    folder: Path, manifest: dict, about: dict, unet: Any, optimizer: Any, schedule: Any, accelerator: Any
) -> int:
    """Put everything back as it was at the checkpoint; DiffpoError if base, data or batch are not what they were."""
    for key, what in (
        ("data_hash", "the training pairs are not those"),
        ("pairs_per_update", "batch_size x accumulation x processes is not the product"),
    ):
        if manifest[key] != about[key]:
            raise DiffpoError(
                f"cannot resume {folder}: {what} that the run started with ({manifest[key]} there, {about[key]} now)"
            )
    if not lora.same_base(manifest["base"], about["base"]):
        raise DiffpoError(f"cannot resume {folder}: the base model is not the one that the run started with")
    weights, _ = lora.read_lora(folder)
    lora.set_lora_state(unet, {name.split(".", 1)[1]: value for name, value in weights.items()})
    state = checkpoint.read_state(folder)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    if "scaler" in state and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
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
