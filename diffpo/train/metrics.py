"""What a run reports while it runs: metrics.jsonl always, other trackers if wanted (outside.py), and warnings."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.files import write_atomic
from ..common.run_folder import METRICS_NAME

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor

    from .outside import Outside

BINS = 5  # timestep bins, equally wide


def summarize(table: Tensor, train_timesteps: int) -> dict[str, float]:
    """The metrics of one update from the table of its groups (`update.rows`).

    Names are TRL's where TRL has one; of single images, chosen are those liked and rejected the others. Deltas are
    policy minus reference (without one: the policy's error): positive means that the policy explains the image worse.
    """
    loss, first, last, first_delta, last_delta, t, _, preference, _, single = table.double().unbind(1)
    if single.all():
        return _summarize_singles(loss, first, first_delta, preference > 0.5)
    margin = first - last
    metrics = {
        "loss": loss.mean(),
        "rewards/chosen": first.mean(),
        "rewards/rejected": last.mean(),
        "rewards/margins": margin.mean(),
        "rewards/accuracies": accuracy(margin).mean(),
        "error/chosen_delta": first_delta.mean(),
        "error/rejected_delta": last_delta.mean(),
    }
    width = train_timesteps / BINS
    for number in range(BINS):
        inside = (t >= number * width) & (t < (number + 1) * width)
        if inside.any():
            name = f"timesteps/{math.ceil(number * width)}-{math.ceil((number + 1) * width) - 1}"
            metrics[f"{name}/margins"] = margin[inside].mean()
            metrics[f"{name}/chosen_delta"] = first_delta[inside].mean()
            metrics[f"{name}/rejected_delta"] = last_delta[inside].mean()
    return {name: value.item() for name, value in metrics.items()}


def _summarize_singles(loss: Tensor, reward: Tensor, delta: Tensor, liked: Tensor) -> dict[str, float]:
    metrics = {"loss": loss.mean().item()}
    for name, which in (("chosen", liked), ("rejected", ~liked)):
        if which.any():
            metrics[f"rewards/{name}"] = reward[which].mean().item()
            metrics[f"error/{name}_delta"] = delta[which].mean().item()
    if liked.any() and not liked.all():
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    metrics["rewards/accuracies"] = accuracy(reward.where(liked, -reward)).mean().item()
    return metrics


def accuracy(margin: Tensor) -> Tensor:
    """1 where the chosen image has the higher reward, 1/2 where both are equal."""
    return (margin > 0).double() + 0.5 * (margin == 0).double()


def headline(metrics: dict[str, float]) -> str:
    """For the progress bar."""
    if "loss" not in metrics:
        return "no valid pair in this round"
    if "rewards/accuracies" not in metrics:
        return f"loss {metrics['loss']:.3f} score {metrics['rollout/score']:.3f}"
    text = f"loss {metrics['loss']:.3f} accuracy {metrics['rewards/accuracies']:.2f}"
    return text + (f" margin {metrics['rewards/margins']:.3g}" if "rewards/margins" in metrics else "")


class Meter:
    """Counts the samples that go through the network, forward and backward, on all processes: the cost of training.

    A pass with gradients also counts as one backward, but not when a backward pass repeats it. A pass through the
    encoder alone counts as a whole one. The second half of a batch with classifier-free guidance counts.
    """

    def __init__(self, network: torch.nn.Module, accelerator: Accelerator) -> None:
        self._accelerator, self._on = accelerator, True
        self._here = [0, 0]  # since the start of this process
        self._before = [0, 0]  # of the whole run until then
        self.watch(network)

    def watch(self, network: torch.nn.Module) -> None:
        """Count the passes of this one too (NCP-DPO's copy of the encoder, full fine-tuning's reference)."""
        network.register_forward_pre_hook(self._count)

    def _count(self, _module: torch.nn.Module, args: tuple) -> None:
        import torch

        if self._on:
            again = torch._C._current_graph_task_id() != -1  # activations are computed again in a backward pass
            self._here[0] += len(args[0])
            self._here[1] += len(args[0]) * (torch.is_grad_enabled() and not again)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For measuring, which is not training."""
        self._on = False
        try:
            yield
        finally:
            self._on = True

    def totals(self) -> dict[str, float]:
        """calls/forward and calls/backward since the start of the run; on all processes together."""
        return dict(zip(("calls/forward", "calls/backward"), map(float, self.state()), strict=True))

    def state(self) -> list[int]:
        import torch

        here = self._here
        if self._accelerator.num_processes > 1:
            counts = torch.tensor(here, dtype=torch.float64, device=self._accelerator.device)
            here = [int(count) for count in self._accelerator.reduce(counts, "sum").tolist()]
        return [before + count for before, count in zip(self._before, here, strict=True)]

    def load(self, state: list[int]) -> None:
        self._before, self._here = list(state), [0, 0]


class Tracker:
    """Appends one JSON line per step to ``output``/metrics.jsonl, and sends it to ``outside``; after a resume, lines
    beyond ``step`` are dropped first."""

    def __init__(self, output: Path, step: int, outside: Outside | None = None) -> None:
        path = output / METRICS_NAME
        kept: list[str] = []
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError, RecursionError):  # cut off by a crash, beyond the checkpoint
                    continue
        write_atomic(path, "".join(line + "\n" for line in kept).encode())
        self._file = open(path, "a", encoding="utf-8")
        self._outside = outside

    def log(self, step: int, metrics: dict[str, float]) -> None:
        # JSON has no NaN: null marks it
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 2), **values}) + "\n")
        self._file.flush()
        if self._outside:
            self._outside.log(step, metrics)

    def show(self, step: int, images: Sequence[Any]) -> None:
        """PIL pictures, to the trackers that show them."""
        if self._outside and images:
            self._outside.show(step, images)

    def close(self) -> None:
        self._file.close()
        if self._outside:
            self._outside.close()


class Watch:
    """Warns when the margin grows only because the policy explains both images worse than the reference does.

    That is what likelihood displacement looks like in a diffusion model; pictures degrade long before the loss shows
    it.
    """

    WINDOW = 50  # updates that an average remembers
    QUIET = 200  # updates between two warnings
    MARGIN = 0.1  # what is below it is noise

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._seen, self._silent_until = say, 0, 0
        self._mean = dict.fromkeys(("error/chosen_delta", "error/rejected_delta", "rewards/margins"), 0.0)

    def look(self, step: int, metrics: dict[str, float]) -> None:
        if not metrics.keys() >= self._mean.keys():
            return
        self._seen += 1
        share = max(1 / self._seen, 1 / self.WINDOW)
        for name in self._mean:
            self._mean[name] += share * (metrics[name] - self._mean[name])
        chosen, rejected, margin = self._mean.values()
        if self._seen >= self.WINDOW and step >= self._silent_until and rejected > chosen > 0 and margin > self.MARGIN:
            self._silent_until = step + self.QUIET
            self._say(
                f"step {step}: the margin ({margin:.3g}) grows, but both errors rise against the reference (chosen "
                f"{chosen:+.2g}, rejected {rejected:+.2g}). If samples get worse, lower train.lr, raise objective.beta "
                f"or stop earlier"
            )
