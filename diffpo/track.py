"""What a run says while it runs: metrics.jsonl always, tensorboard if asked, warnings, and the stop at a NaN."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import DiffpoError

BINS = 5  # timestep bins, equally wide


def summarize(values: Any, train_timesteps: int) -> dict[str, float]:
    """The metrics of one update from a (pairs, 6) table: loss, r_chosen, r_rejected, error deltas of both, timestep.

    Names are TRL's where TRL has one. Deltas are policy minus reference: positive means that the policy explains the
    image worse than the reference does.
    """
    loss, chosen, rejected, chosen_delta, rejected_delta, t = values.double().unbind(1)
    margin = chosen - rejected
    metrics = {
        "loss": loss.mean(),
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": margin.mean(),
        "rewards/accuracies": accuracy(margin).mean(),
        "error/chosen_delta": chosen_delta.mean(),
        "error/rejected_delta": rejected_delta.mean(),
    }
    width = train_timesteps / BINS
    for number in range(BINS):
        inside = (t >= number * width) & (t < (number + 1) * width)
        if inside.any():
            name = f"timesteps/{math.ceil(number * width)}-{math.ceil((number + 1) * width) - 1}"
            metrics[f"{name}/margins"] = margin[inside].mean()
            metrics[f"{name}/chosen_delta"] = chosen_delta[inside].mean()
            metrics[f"{name}/rejected_delta"] = rejected_delta[inside].mean()
    return {name: value.item() for name, value in metrics.items()}


def accuracy(margin: Any) -> Any:
    """1 where the chosen image has the higher reward, 1/2 where both are equal."""
    return (margin > 0).double() + 0.5 * (margin == 0).double()


def headline(metrics: dict[str, float]) -> str:
    """For the progress bar."""
    accuracy, margin = metrics["rewards/accuracies"], metrics["rewards/margins"]
    return f"loss {metrics['loss']:.3f} accuracy {accuracy:.2f} margin {margin:.3g}"


class Tracker:
    """Appends one JSON line per step to ``output``/metrics.jsonl; after a resume, lines beyond ``step`` are dropped
    first."""

    def __init__(self, output: Path, step: int, tensorboard: bool) -> None:
        from .checkpoint import write_atomic

        path = output / "metrics.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except ValueError:  # a line cut off by a crash; it is beyond the checkpoint
                    continue
        write_atomic(path, "".join(line + "\n" for line in kept).encode())
        self._file = open(path, "a", encoding="utf-8")
        self._writer = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise DiffpoError('log.tensorboard needs tensorboard: pip install "diffpo[trackers]"') from None
            self._writer = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        # JSON has no NaN: null marks it
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 2), **values}) + "\n")
        self._file.flush()
        if self._writer:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._writer:
            self._writer.close()


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
        self._seen += 1
        share = max(1 / self._seen, 1 / self.WINDOW)
        for name in self._mean:
            self._mean[name] += share * (metrics[name] - self._mean[name])
        chosen, rejected, margin = self._mean.values()
        if self._seen >= self.WINDOW and step >= self._silent_until and rejected > chosen > 0 and margin > self.MARGIN:
            self._silent_until = step + self.QUIET
            self._say(
                f"step {step}: the margin ({margin:.3g}) grows because both errors rise, the rejected images' faster "
                f"(chosen {chosen:+.2g}, rejected {rejected:+.2g} against the reference). If samples get worse, lower "
                f"train.lr, raise objective.beta or stop earlier"
            )
