"""`diffpo train-scorer`: a step-aware preference model from pairs (SPO, arXiv 2406.04314; LPO, 2502.01051).

Both images of a pair get the same noise at the same random time; the scorer sees what the base model makes of them (the
decoded x_0 estimate, or its own features) and learns which one people preferred.
"""

from __future__ import annotations

import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from .. import models
from ..common import lock
from ..common.errors import DiffpoError
from ..common.files import write_atomic
from ..common.text import plain
from ..common.worker import Worker
from ..config import ScorerConfig
from ..data.batches import Batches
from ..data.groups import load_groups
from ..data.order import order
from ..problems.policy import Policy
from ..scorers.step import base, load
from . import step_heldout
from .build import make_accelerator, make_optimizer, make_schedule
from .checkpoint import check_unused, differences, disk_errors, write_config
from .loop import Interrupted, interruption
from .metrics import Tracker, accuracy

STATE_NAME = "unfinished.pt"  # weights and optimiser of a run that has not ended; tensors and numbers, never code


def preference_loss(chosen: Tensor, rejected: Tensor, preference: Tensor) -> Tensor:
    """(n,) scores and (n,) P(chosen is better) -> (n,) two-way cross-entropy with soft labels, less the labels' own
    entropy: the optimum is 0 for a tie too (Pick-a-Pic's loss, arXiv 2305.01569, eq. 2)."""
    margin = chosen - rejected
    cross = -preference * F.logsigmoid(margin) - (1 - preference) * F.logsigmoid(-margin)
    return cross + torch.special.xlogy(preference, preference) + torch.special.xlogy(1 - preference, 1 - preference)


def train_scorer(config: ScorerConfig) -> Path:
    """Train into ``config.output``, or go on there; returns the folder, which `objective.rollout.step_scorer` takes.

    Raises DiffpoError on bad input, if another run is at work in the folder, on a loss that is not finite and on a full
    disk, and Interrupted after SIGINT or SIGTERM once the step is finished and saved.
    """
    accelerator = make_accelerator(config.train)
    if accelerator.num_processes > 1:
        raise DiffpoError("train-scorer runs in one process; start it without `accelerate launch`")
    check_folder(config)
    with lock.held(config.output):
        check_folder(config)  # another run may have ended there just now
        return _train(config, accelerator)


def _train(config: ScorerConfig, accelerator: Any) -> Path:
    settings, choice, output = config.train, config.scorer, config.output
    device, clean = accelerator.device, choice.times == "clean"
    family = models.load(config.model, settings.precision, config.data.resolution)
    train, validation = load_data(config, family, device)
    network = family.load_network(device)
    policy = Policy(family, network)
    scorer = make_scorer(config, family, network, train)
    module = scorer.module.train()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(settings, parameters)
    schedule = make_schedule(settings, optimizer)
    step = resume(config, train.groups.data_hash, module, optimizer, schedule)

    def save(step: int) -> None:
        state = {
            "step": step,
            "settings": json.dumps([config.model_dump(mode="json"), train.groups.data_hash]),
            "module": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(output / STATE_NAME, buffer.getvalue())

    def update(step: int) -> dict[str, float]:
        losses, margins = [], []
        for part in range(settings.accumulation):
            first = (step * settings.accumulation + part) * settings.batch_size
            positions = list(range(first, first + settings.batch_size))
            indices = [order(settings.seed, len(train.groups), position) for position in positions]
            batch = train.batch(indices, positions)
            problem = step_heldout.noised(train, batch, clean)
            x_0 = problem.x_t
            if choice.kind == "pixel":
                x_0 = step_heldout.estimated(policy, problem, choice.guidance, clean)
            captions, preference = step_heldout.captions(train, indices), problem.judgement.preference
            found = scorer.rate(problem.x_t, x_0, problem.t, captions, problem.conditioning.cond)
            chosen, rejected = found.chunk(2)
            loss = preference_loss(chosen, rejected, preference)
            (loss.mean() / settings.accumulation).backward()
            losses.append(loss.detach())
            margins.append((chosen - rejected).detach()[preference != 0.5])
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm or float("inf"))
        loss = torch.cat(losses).mean()
        if not (loss.isfinite() and norm.isfinite()):
            raise DiffpoError(f"the loss or its gradient is not finite at step {step + 1}; lower train.lr")
        lr = schedule.get_last_lr()[0]
        try:
            optimizer.step()
        except (TypeError, RuntimeError) as error:
            reason = plain(error, 300)
            raise DiffpoError(f"train.optimizer {settings.optimizer} failed at step {step + 1}: {reason}") from error
        schedule.step()
        optimizer.zero_grad()
        share = accuracy(torch.cat(margins))
        return {"loss": loss.item(), "accuracy": share.mean().item(), "grad_norm": norm.item(), "lr": lr}

    write_config(config)  # not before it is certain that the run goes on from what is there
    with (
        disk_errors(output),
        contextlib.closing(Tracker(output, step, False)) as tracker,
        interruption(accelerator) as interrupted,
        tqdm(total=settings.steps, initial=step, desc=plain(output.name, 40), unit="step") as bar,
    ):
        while step < settings.steps:
            started = time.perf_counter()
            metrics = update(step)
            step += 1
            seconds = time.perf_counter() - started
            metrics["pairs_per_second"] = settings.batch_size * settings.accumulation / seconds
            tracker.log(step, metrics)
            bar.set_postfix_str(f"loss {metrics['loss']:.3f} accuracy {metrics['accuracy']:.2f}", refresh=False)
            bar.update()
            if step % settings.checkpoint_every == 0 or step == settings.steps or interrupted():
                save(step)
            if interrupted() and step < settings.steps:
                raise Interrupted(f"interrupted: step {step} is saved in {output}; the same command resumes there")

    module.eval()
    compared = {"this": scorer, **{spec: load.load(spec, family, network) for spec in choice.compare}}
    lines = step_heldout.measure(compared, validation, policy, choice.guidance, settings)
    table = step_heldout.table(lines)
    with disk_errors(output):
        write_atomic(output / "accuracy.md", (table + "\n").encode())
        scorer.save(output, {"settings": config.identity(), "held_out": lines})
        (output / STATE_NAME).unlink(missing_ok=True)
    held = f"held-out pairs ({lines[0]['pairs']}) ranked as labelled, 95 % intervals"
    compared_with = "; after each other scorer's: how much better this one is" if choice.compare else ""
    print(f"{held}{compared_with}\n{table}\nthe scorer is in {output}")
    return output


def check_folder(config: ScorerConfig) -> None:
    """May ``config.output`` be this run's folder? Nothing is written. DiffpoError if it holds something else, a scorer
    that is finished, or a run whose settings differ in what they compute."""
    output = config.output
    try:
        finished, begun = (output / base.ABOUT).exists(), (output / STATE_NAME).exists()
    except OSError:  # which the next says
        finished = begun = False
    if finished:
        raise DiffpoError(f"the scorer in {output} is finished; choose another folder with output=FOLDER, or delete it")
    if not begun:
        check_unused(output)
        return
    theirs, ours = _read_state(output / STATE_NAME, mmap=True)[1], config.identity()
    if theirs != ours:
        raise DiffpoError(
            f"{output} holds a run with other settings ({differences(theirs, ours)}); choose another folder with "
            f"output=FOLDER"
        )


def load_data(config: ScorerConfig, family: Any, device: Any) -> tuple[Batches, Batches]:
    """Training and held-out pairs with their caches filled; the VAE stays where the scorer looks at pictures."""
    data, found = config.data, []
    for source, split in ((data.train, data.train_split), (data.validation, data.validation_split)):
        found.append(load_groups(data, source, split, "pair", quiet=False))
        print("\n  ".join([f"{source}: {found[-1].describe()}", *found[-1].remarks()]))
        if found[-1].bad:
            print(f"  skipped: {found[-1].describe_bad()}")
    family.load_encoders(device)
    seeds = (config.train.seed, 0)
    batches = [Batches(groups, data, family, seed, Worker(device)) for groups, seed in zip(found, seeds, strict=True)]
    pictures = config.scorer.kind == "pixel" or any(load.needs_vae(spec) for spec in config.scorer.compare)
    family.free_encoders(keep_vae=pictures or not batches[0].cached)
    return batches[0], batches[1]


def make_scorer(config: ScorerConfig, family: Any, network: torch.nn.Module, batches: Batches) -> Any:
    choice, device = config.scorer, next(network.parameters()).device
    if choice.kind == "latent":
        from ..scorers.step.latent import LatentScorer

        some = list(range(min(64, len(batches.groups))))
        problem = step_heldout.noised(batches, batches.batch(some, some, "calibration"), choice.times == "clean")
        return LatentScorer.fresh(family, network, problem.x_t, problem.t, problem.conditioning.cond, config.train.seed)
    from ..scorers.step.pixel import StepAwareScorer

    scorer = StepAwareScorer.fresh(family, choice.clip, choice.processor, choice.time_aware, config.train.seed)
    scorer.module.to(device)
    return scorer


def resume(config: ScorerConfig, data_hash: str, module: torch.nn.Module, optimizer: Any, schedule: Any) -> int:
    """The step to go on from; 0 if there is nothing to resume."""
    path = config.output / STATE_NAME
    if not path.exists():
        return 0
    state, _, trained_on = _read_state(path)
    if trained_on != data_hash:
        raise DiffpoError(
            f"cannot resume {path}: the training pairs are not those that the run started with. Point data.train at "
            f"the same data, or start a new run with output=FOLDER"
        )
    try:
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        step = int(state["step"])
    except Exception as error:  # whatever damaged bytes lead torch to
        raise _unreadable(path, error) from error
    print(f"resuming from {path} (step {step})")
    return step


def _read_state(path: Path, mmap: bool = False) -> tuple[dict, dict, str]:
    """The state, the `ScorerConfig.identity` that it was trained with, and the hash of its training pairs."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        settings, data_hash = json.loads(state["settings"])
        # older versions wrote the identity alone, which has no output
        return state, ScorerConfig.model_validate({"output": "", **settings}).identity(), data_hash
    except Exception as error:  # refused pickles, and whatever damaged bytes lead torch to
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DiffpoError:
    return DiffpoError(f"cannot read {path}: {plain(error, 200)}. Delete it to start again from the beginning")
