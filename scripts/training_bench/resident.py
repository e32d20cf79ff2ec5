"""Optimisers that measure what memory is resident while a network is trained."""

import atexit
import json
import os
from pathlib import Path

import torch


def status(name: str) -> int:
    """A number of /proc/self/status, in KiB: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


class Measured(torch.optim.AdamW):
    """The most memory that is resident from its making, when the network is loaded, on: KiB, in the file
    $BENCH_PEAK."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again from what is resident now

    def step(self, closure=None):
        super().step(closure)
        Path(os.environ["BENCH_PEAK"]).write_text(str(status("VmHWM")))


class Followed(torch.optim.AdamW):
    """What is resident after each step: KiB, in the file $BENCH_RESIDENT."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.resident: list[int] = []
        atexit.register(self._write)

    def step(self, closure=None):
        super().step(closure)
        self.resident.append(status("VmRSS"))

    def _write(self) -> None:
        Path(os.environ["BENCH_RESIDENT"]).write_text(json.dumps(self.resident))
