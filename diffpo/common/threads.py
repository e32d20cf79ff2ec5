"""Torch's CPU threads on a machine that other programs use too.

A parallel operation ends when its slowest thread ends. Until then the other threads spin, on cores that the slowest may
need. Beside two busy programs on two cores, two threads take several times as long as one. A loop that calls
`Threads.adapt` therefore uses fewer threads while they wait for cores. Threads that do not spin avoid the problem, but
on an idle machine they are slower than one thread. scripts/bench_threads.py measures this.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

SPINS = "50000"  # for GNU OpenMP, about 1 ms; its default is six times as many
FREED = 2**25 - 2**16  # bytes, just below the most that glibc minds
WINDOW = 1.0  # s between two measurements
CROWDED, FREE = 0.15, 0.03  # fraction of time that a thread waits for a core
PATIENCE = 64  # most windows without waiting before more threads are tried again
EXACT = 2**15  # elements; torch splits longer sums by the number of threads, which changes the rounding


def set_waiting() -> None:
    """Set how OpenMP's threads wait, unless the user has. Call it before torch is imported."""
    if not any(name.startswith(("OMP_", "GOMP_", "KMP_")) for name in os.environ):
        os.environ["GOMP_SPINCOUNT"] = SPINS


def keep_freed_memory() -> None:
    """Let glibc keep tensors of up to 32 MiB that are freed, rather than ask the system for each anew, which clears its
    pages: it does so up to the size of the largest block that was freed. A VAE on a CPU takes 0.7 of the time."""
    bytearray(FREED)


class Threads:
    """The number of torch's threads, halved while they wait for cores and doubled when they no longer do.

    A context manager, which restores the number at its end. The number does not change if the user has set
    OMP_NUM_THREADS, on systems other than Linux, or on a GPU. ``trained``: numbers of elements of the trained tensors;
    if one is above `EXACT`, the number of threads does not change, so that a run does not depend on the machine's load.
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
        """Measure, and change the number of threads, if the last measurement is at least a `WINDOW` ago."""
        if self.fixed or time.perf_counter() - self.last[0] < WINDOW:
            return
        (before, waited), self.last = self.last, self._look()
        self.set(self.next((self.last[1] - waited) / (self.last[0] - before)))

    def next(self, waiting: float) -> int:
        """The number of threads to use after a window in which ``waiting`` threads on average waited for a core."""
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
        """Use ``number`` threads."""
        if number != self.now:
            import torch

            torch.set_num_threads(number)
            self.now = number

    @staticmethod
    def _look() -> tuple[float, float]:
        """The time in s, and how many s the threads of this process have waited for a core (Linux's schedstat)."""
        waited = 0
        for path in Path("/proc/self/task").glob("*/schedstat"):
            try:
                waited += int(path.read_text(encoding="utf-8").split()[1])
            except (OSError, ValueError, IndexError):  # the thread has ended
                continue
        return time.perf_counter(), waited / 1e9
