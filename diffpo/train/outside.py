"""Trackers of other programs: TensorBoard in the run's folder, and accelerate's trackers by name.

A tracker gets the settings, the metrics of every update and the pictures of every look. What a tracker does not take,
because its network is down for example, is kept and sent later; metrics.jsonl has all of it in any case.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..common.errors import DiffpoError
from ..common.files import write_atomic
from ..common.run_folder import SAMPLES, TRACKED
from ..common.text import plain, read_text
from ..config import Config

if TYPE_CHECKING:
    from accelerate import Accelerator

SHOWN = 16  # pictures of a look, at most
PROJECT = "diffpo"
AGAIN = 60.0  # seconds after a failure until a tracker is tried again
KEPT = 10_000  # calls that wait for a tracker, at most


class Receiver(Protocol):
    """What `Outside` sends to: one tracker."""

    def log(self, values: dict[str, float], step: int) -> None: ...
    def show(self, images: Sequence[Any], step: int) -> None: ...
    def close(self) -> None: ...


class Outside:
    """The trackers of ``config.log``, on the process that writes. A run that is resumed at ``step`` goes on there.

    DiffpoError if the package of one is not installed, or if it does not start.
    """

    def __init__(self, config: Config, accelerator: Accelerator, step: int) -> None:
        require(config)
        self._lines: list[Line] = []
        try:
            for name in names(config):
                make = _tensorboard if name == "tensorboard" else _accelerated
                self._lines.append(Line(name, make(name, config, accelerator, step)))
        except BaseException:
            self.close()
            raise

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for line in self._lines:
            line.send(step, lambda to: to.log(metrics, step))

    def show(self, step: int, images: Sequence[Any]) -> None:
        """The first `SHOWN` PIL pictures."""
        for line in self._lines:
            line.send(step, lambda to: to.show(images[:SHOWN], step))

    def close(self) -> None:
        for line in self._lines:
            line.close()


class Line:
    """To one tracker. What fails is kept, up to `KEPT` calls, and sent again after `AGAIN` seconds and at the end."""

    def __init__(self, name: str, receiver: Receiver, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.receiver, self._clock = name, receiver, clock
        self._waiting: list[tuple[int, Callable[[Receiver], None]]] = []
        self._next, self._lost = -math.inf, 0

    def send(self, step: int, call: Callable[[Receiver], None]) -> None:
        """``call`` with the tracker, now or later; ``step`` is for messages."""
        self._waiting.append((step, call))
        if len(self._waiting) > KEPT:
            del self._waiting[0]
            self._lost += 1
        if self._clock() >= self._next:
            self._flush()

    def close(self) -> None:
        """Send what waits, and end. What could not be sent is said."""
        self._flush()
        if missing := len(self._waiting) + self._lost:
            print(f"log.trackers: {missing} records did not reach {self.name}; metrics.jsonl and samples/ have them")
        with contextlib.suppress(Exception):  # the run is done; what the tracker has is not lost by this
            self.receiver.close()

    def _flush(self) -> None:
        while self._waiting:
            step, call = self._waiting[0]
            try:
                call(self.receiver)
            except Exception as error:  # each tracker has its own: no network, a full disk, a name it does not take
                if self._next == -math.inf:  # the first of several in a row
                    reason = plain(f"{type(error).__name__}: {error}", 300)
                    print(f"log.trackers: {self.name} failed at step {step} ({reason}); training goes on", flush=True)
                self._next = self._clock() + AGAIN
                return
            del self._waiting[0]
        self._next = -math.inf


def names(config: Config) -> list[str]:
    """The trackers of a run, each once."""
    return list(dict.fromkeys([*(["tensorboard"] if config.log.tensorboard else []), *config.log.trackers]))


def missing(config: Config) -> list[str]:
    """What is wrong with the trackers of ``config.log``: a message for each whose package is not installed."""
    if not names(config):
        return []
    from accelerate.tracking import filter_trackers

    return [
        f'log.trackers={name} needs its package: pip install {name}, or pip install "diffpo[{name}]"'
        for name in names(config)
        if not filter_trackers([name], logging_dir=".")
    ]


def require(config: Config) -> None:
    """DiffpoError for the first of `missing`."""
    for problem in missing(config):
        raise DiffpoError(problem)


def make(config: Config, accelerator: Accelerator, step: int) -> Outside | None:
    """None if ``config.log`` names no tracker."""
    return Outside(config, accelerator, step) if names(config) else None


class Tensorboard:
    """TensorBoard's files in the run's folder. accelerate's own tracker keeps the lines of a run that was killed, and
    those after its checkpoint are then there twice; this one drops them."""

    def __init__(self, config: Config, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(config.output / "tensorboard"), purge_step=step + 1)
        if step == 0:
            text = "".join(f"    {line}\n" for line in config.to_yaml().splitlines())  # as code, in its Markdown
            self._writer.add_text("config", text, 0)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def show(self, images: Sequence[Any], step: int) -> None:
        import numpy as np

        stacked = np.stack([np.asarray(each) for each in images])
        self._writer.add_images("samples", stacked, step, dataformats="NHWC")

    def close(self) -> None:
        self._writer.close()


def _tensorboard(_name: str, config: Config, _accelerator: Accelerator, step: int) -> Receiver:
    return Tensorboard(config, step)


class Accelerated:
    """One of accelerate's trackers. ``folder``: with the pictures as files, for MLflow, which takes files alone."""

    def __init__(self, tracker: Any, folder: Path) -> None:
        self.tracker, self.folder = tracker, folder

    def log(self, values: dict[str, float], step: int) -> None:
        self.tracker.log({name: value for name, value in values.items() if math.isfinite(value)}, step=step)

    def show(self, images: Sequence[Any], step: int) -> None:
        if self.tracker.name == "aim":  # one picture for a name
            self.tracker.log_images({f"samples/{k}": image for k, image in enumerate(images)}, step=step)
        elif self.tracker.name == "trackio":  # whose pictures accelerate does not know
            from trackio import Image

            self.tracker.log({f"samples/{k}": Image(image) for k, image in enumerate(images)}, step=step)
        elif hasattr(self.tracker, "log_images"):
            self.tracker.log_images({"samples": list(images)}, step=step)
        elif hasattr(self.tracker, "log_artifact"):
            for path in sorted(self.folder.glob(f"{step:06d}_*.png"))[: len(images)]:
                self.tracker.log_artifact(str(path), "samples")

    def close(self) -> None:
        self.tracker.finish()


# how a tracker names a run, and goes on with the run that it gave this id before
NAMED: dict[str, Callable[[str, str | None], dict[str, Any]]] = {
    "wandb": lambda name, run: {"name": name} | ({"id": run, "resume": "allow"} if run else {}),
    "swanlab": lambda name, run: {"experiment_name": name} | ({"id": run, "resume": "allow"} if run else {}),
    "trackio": lambda name, _: {"name": name, "resume": "allow"},
    "mlflow": lambda name, run: {"run_id": run} if run else {"run_name": name},
    "aim": lambda _, run: {"run_hash": run} if run else {"experiment": PROJECT},
}
IDS: dict[str, Callable[[Any], str]] = {
    "wandb": lambda run: run.id,
    "swanlab": lambda run: run.id,
    "mlflow": lambda run: run.info.run_id,
    "aim": lambda run: run.hash,
}


def _accelerated(name: str, config: Config, accelerator: Accelerator, step: int) -> Receiver:
    """The run's folder names the run, in the project `PROJECT`."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # `Line` tries again, and updates do not wait
    run, ids = config.output.name, _read(config.output) if step else {}
    accelerator.project_configuration.logging_dir = accelerator.project_configuration.logging_dir or "."
    accelerator.log_with, accelerator.trackers = [name], []
    settings = dict(_flat(config.model_dump(mode="json")))
    try:
        project = run if name == "aim" else PROJECT  # what accelerate calls a project is aim's name of a run
        accelerator.init_trackers(project, settings, {name: NAMED[name](run, ids.get(name))})
        tracker = accelerator.get_tracker(name)
        if name in IDS:
            found = _read(config.output) | {name: str(IDS[name](tracker.tracker))}
            write_atomic(config.output / TRACKED, json.dumps(found, indent=1).encode())
    except Exception as error:  # each has its own: no account, no network, a name that it does not take
        raise DiffpoError(
            f"log.trackers: {name} did not start: {plain(f'{type(error).__name__}: {error}', 300)}. Log in to it, use "
            f"its offline mode, or leave it out of log.trackers"
        ) from error
    finally:
        accelerator.trackers = []  # they are closed here
    return Accelerated(tracker, config.output / SAMPLES)


def _read(output: Path) -> dict[str, str]:
    """The ids of the run that the trackers gave it before."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(read_text(output / TRACKED))
        if isinstance(found, dict):
            return {name: run for name, run in found.items() if name in IDS and isinstance(run, str)}
    return {}


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """``{"a": {"b": 1}}`` -> ``[("a.b", 1)]``; lists as text."""
    found: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((prefix + key, str(value) if isinstance(value, list) else value))
    return found
