"""An optimiser that notes the time of every step, for any trainer that takes the class of its optimiser."""

import atexit
import json
import os
import time

import torch


class ClockedAdamW(torch.optim.AdamW):
    """AdamW that notes (CPU seconds of the process, seconds of the machine's clock) after each step.

    They are written to the file $BENCH_MARKS when the process ends.
    """

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.marks: list[tuple[float, float]] = []
        atexit.register(self._write)

    @torch.no_grad()
    def step(self, closure=None):
        result = super().step(closure)
        self.marks.append((time.process_time(), time.monotonic()))
        return result

    def _write(self) -> None:
        with open(os.environ["BENCH_MARKS"], "w") as file:
            json.dump(self.marks, file)
