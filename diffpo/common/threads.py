"""Torch's CPU threads on a machine that other programs use too.

A parallel piece of work ends when its slowest thread ends. The others spin until then, on cores that the slowest may
be waiting for: beside two busy programs on two cores, two threads take several times as long as one. So a loop that
calls `Threads.adapt` uses fewer of them while they wait for cores. Threads that never spin would need no such care, but
on an idle machine they are slower than one thread. scripts/bench_threads.py measures all of this.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

SPINS = "50000"  # of GNU OpenMP, about a millisecond; its own default is six times as many
WINDOW = 1.0  # s between two looks
CROWDED, FREE = 0.15, 0.03  # share of its time that a thread waits for a core
PATIENCE = 64  # windows without waiting, at most, before more threads are tried again
EXACT = 2**15  # numbers: torch splits a longer sum by the number of threads, which changes its rounding


def set_waiting() -> None:
    """How OpenMP's threads wait, unless the user has set that; to be called before torch is imported."""
    if not any(name.startswith(("OMP_", "GOMP_", "KMP_")) for name in os.environ):
        os.environ["GOMP_SPINCOUNT"] = SPINS


class Threads:
    """The number of torch's threads, halved while they wait for cores and doubled when they no longer do.

    A context manager that puts the number back. It stays as it is where the user has set OMP_NUM_THREADS, on other
    systems than Linux, and on a GPU. ``trained``: sizes of what is trained; above `EXACT` numbers it stays too, so that
    a run does not depend on the machine's load.
    """

    def __init__(self, device: str = "cpu", trained: Iterable[int] = ()) -> None:
        import torch

        self.most = self.now = torch.get_num_threads()
        self.fixed = (
            self.most == 1 or device != "cpu" or "OMP_NUM_THREADS" in os.environ or max(trained, default=0) > EXACT
        )
        self.patience, self.quiet, self.tried, self.last = 1, 0, False, self._look()

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_: object) -> None:
        self.set(self.most)

    def adapt(self) -> None:
        """Look again, if the last look was a `WINDOW` ago."""
        if self.fixed or time.perf_counter() - self.last[0] < WINDOW:
            return
        (before, waited), self.last = self.last, self._look()
        self.set(self.next((self.last[1] - waited) / (self.last[0] - before)))

    def next(self, waiting: float) -> int:
        """How many threads to use after a window in which on average ``waiting`` threads waited for a core."""
        crowded, tried, self.tried = waiting > CROWDED * self.now, self.tried, False
        if crowded and self.now > 1:
            self.patience = min(2 * self.patience, PATIENCE) if tried else 1
            self.quiet = 0
            return max(1, self.now // 2)
        self.quiet = self.quiet + 1 if waiting < FREE * self.now else 0
        if self.quiet < self.patience or self.now == self.most:
            return self.now
        self.quiet, self.tried = 0, True
        return min(2 * self.now, self.most)

    def set(self, number: int) -> None:
        if number != self.now:
            import torch

            torch.set_num_threads(number)
            self.now = number

    @staticmethod
    def _look() -> tuple[float, float]:
        """Seconds by the clock, and seconds that this process's threads have waited for a core (Linux's schedstat)."""
        waited = 0
        for path in Path("/proc/self/task").glob("*/schedstat"):
            try:
                waited += int(path.read_text().split()[1])
            except (OSError, ValueError, IndexError):  # the thread has ended
                continue
        return time.perf_counter(), waited / 1e9
