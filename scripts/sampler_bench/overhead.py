"""Time per call that a scheduler itself costs, without the model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from samplers import Grid, SolverScheduler, VPDiscrete
from samplers.solvers import SOLVERS

from .theirs import SD

SHAPES = ((2, 4, 64, 64), (1, 4, 128, 128))
STEPS = 20
OURS = {"solver": "unipc", "solver_order": 3}


def run(repeats: int = 60) -> list[dict]:
    """Rows of {shape, name, microseconds}: median over `repeats` interleaved runs of 20 calls, float32, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    try:
        for shape in SHAPES:
            contestants = _contestants(torch.randn(shape), torch.randn(shape))
            times = {name: [] for name in contestants}
            for _ in range(repeats):
                for name, go in contestants.items():  # interleaved, so that a busy moment hits everybody
                    times[name].append(go())
            rows += [{"shape": shape, "name": n, "microseconds": statistics.median(t)} for n, t in times.items()]
    finally:
        torch.set_num_threads(threads)
    return rows


def _contestants(x: torch.Tensor, output: torch.Tensor) -> dict[str, Callable[[], float]]:
    def scheduler(instance):
        @torch.inference_mode()
        def go() -> float:
            instance.set_timesteps(STEPS)
            timesteps = list(instance.timesteps)  # as a pipeline's loop sees them
            state, start = x, time.perf_counter()
            for t in timesteps:
                instance.scale_model_input(state, t)
                state = instance.step(output, t, state, return_dict=False)[0]
            return (time.perf_counter() - start) / STEPS * 1e6

        return go

    plan = SOLVERS["unipc"](Grid(VPDiscrete.scaled_linear(), "logsnr"), STEPS, order=3).for_prediction("epsilon")

    @torch.inference_mode()
    def ours() -> float:
        state, start = plan.begin(x), time.perf_counter()
        for k in range(STEPS):
            state = plan.step(k, state, output)
        return (time.perf_counter() - start) / STEPS * 1e6

    values = [torch.randn_like(x) for _ in range(4)]

    @torch.inference_mode()
    def floor() -> float:
        start = time.perf_counter()
        for _ in range(STEPS):
            (values[0] * 0.1).add_(values[1], alpha=0.2).add_(values[2], alpha=0.3).add_(values[3], alpha=0.4)
        return (time.perf_counter() - start) / STEPS * 1e6

    return {
        "SolverScheduler.step, UniPC order 3": scheduler(SolverScheduler(**SD, **OURS)),
        "Plan.step, UniPC order 3": ours,
        "diffusers DPM++2M": scheduler(DPMSolverMultistepScheduler(**SD, solver_order=2)),
        "diffusers UniPC order 2": scheduler(UniPCMultistepScheduler(**SD, solver_order=2)),
        "diffusers UniPC order 3": scheduler(UniPCMultistepScheduler(**SD, solver_order=3)),
        "floor: a bare combination of 4 tensors": floor,
    }
