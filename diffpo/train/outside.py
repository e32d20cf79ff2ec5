"""Trackers of other programs: TensorBoard in the run's folder, and those that accelerate knows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..common.errors import DiffpoError
from ..common.run_folder import SAMPLES
from ..common.text import plain
from ..config import Config

if TYPE_CHECKING:
    from accelerate import Accelerator

SHOWN = 16  # pictures of a look, at most


class Outside:
    """The trackers of ``config.log``, on the process that writes. A run that is resumed at ``step`` goes on there.

    DiffpoError if the package of one is not installed, or if it does not start.
    """

    def __init__(self, config: Config, accelerator: Accelerator, step: int) -> None:
        self._output, self._writer, self._trackers = config.output, None, list[Any]()
        if config.log.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise DiffpoError('log.tensorboard needs tensorboard: pip install "diffpo[trackers]"') from None
            self._writer = SummaryWriter(str(config.output / "tensorboard"), purge_step=step + 1)
        if config.log.trackers:
            _start(accelerator, config)
            self._trackers = accelerator.trackers

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self._writer:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for tracker in self._trackers:
            tracker.log(finite, step=step)

    def show(self, step: int, images: Sequence[Any]) -> None:
        """The first `SHOWN` PIL pictures. MLflow keeps them as files; trackio gets none from accelerate."""
        import numpy as np

        images = images[:SHOWN]
        if self._writer:
            self._writer.add_images(
                "samples", np.stack([np.asarray(each) for each in images]), step, dataformats="NHWC"
            )
        for tracker in self._trackers:
            if hasattr(tracker, "log_images"):
                tracker.log_images({"samples": list(images)}, step=step)
            elif hasattr(tracker, "log_artifact"):
                for path in sorted((self._output / SAMPLES).glob(f"{step:06d}_*.png"))[:SHOWN]:
                    tracker.log_artifact(str(path), "samples")

    def close(self) -> None:
        if self._writer:
            self._writer.close()
        for tracker in self._trackers:
            tracker.finish()
        self._trackers.clear()  # accelerate's own list


def make(config: Config, accelerator: Accelerator, step: int) -> Outside | None:
    """None if ``config.log`` names no tracker."""
    return Outside(config, accelerator, step) if config.log.tensorboard or config.log.trackers else None


def missing(names: Sequence[str]) -> list[str]:
    """The trackers of accelerate whose packages are not installed."""
    from accelerate.tracking import filter_trackers

    return [name for name in names if not filter_trackers([name])]


def _start(accelerator: Accelerator, config: Config) -> None:
    """Start accelerate's trackers, under the name of the run's folder."""
    names = list(dict.fromkeys(config.log.trackers))
    for name in missing(names):
        raise DiffpoError(f"log.trackers={name} needs its package: pip install {name}")
    accelerator.log_with = names
    try:
        accelerator.init_trackers(config.output.name, dict(_flat(config.model_dump(mode="json"))))
    except Exception as error:  # each has its own: no account, no network, a name that it does not take
        raise DiffpoError(f"log.trackers: {', '.join(names)} did not start: {plain(error, 300)}") from error


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """``{"a": {"b": 1}}`` -> ``[("a.b", 1)]``; lists as text."""
    found: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((prefix + key, str(value) if isinstance(value, list) else value))
    return found
