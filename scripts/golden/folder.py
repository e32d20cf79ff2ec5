"""A folder of golden cases, and what a runner is given to run one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from samplers import EDM, Grid, Guidance, Plan, Schedule, VPDiscrete, VPLinear
from samplers.analytic import GaussianMixture

GRIDS = {"time_uniform": "time", "time_quadratic": "quadratic", "logSNR": "logsnr", "edm": "karras"}


class Unsupported(Exception):
    """A case that `samplers` cannot run."""


class Setting:
    """One case: its schedule, initial noise `z` (batch, *shape), counted model and stored draws."""

    def __init__(self, golden: Golden, case: dict):
        self.golden, self.case = golden, case
        if case["problem"] is not None:  # null: a case of numbers alone
            self.schedule, self.scale, self.data, self.classes, self.z = golden.problem(case)
        self.steps, self.t_start, self.t_end = case["steps"], case.get("t_start"), case.get("t_end")
        self.calls = 0

    @property
    def x(self) -> torch.Tensor:
        """The initial state at t_start: z, for 'edm' t_start * z."""
        return self.z * self.t_start if isinstance(self.schedule, EDM) else self.z

    def grid(self, kind: str | None = None, **options) -> Grid:
        """Our grid from the case's t_start to its t_end, by the official or our own name."""
        options = {"end": "t_end", "t_start": self.t_start, "t_end": self.t_end} | options
        return Grid(self.schedule, GRIDS.get(kind, kind), **options)

    def noise(self, k: int) -> torch.Tensor:
        """The k-th stored Gaussian draw."""
        return self.golden[self.case["step_noise"]][k].view(self.z.shape)

    def model(self, prediction: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The guided model, counting its calls."""
        model = self.data.model(self.schedule, prediction, self.classes, self.scale)

        def counted(x, label):
            self.calls += 1
            return model(x, label)

        return counted

    def run(self, plan: Plan, x: torch.Tensor | None = None, **settings) -> torch.Tensor:
        """Run a plan with the case's guidance as `samplers` does it. `draw(k)`: index of call k's stored draw."""
        draw = settings.pop("draw", lambda k: k)
        if plan.stochastic:
            settings["noise"] = lambda k: self.noise(draw(k))
        model = self.data.model(self.schedule, plan.prediction, self.classes)
        if self.classes is not None:
            settings["guidance"] = Guidance(self.scale, self.data.model(self.schedule, plan.prediction))

        def counted(x, label):
            self.calls += 1
            return model(x, label)

        return plan.run(counted, self.x if x is None else x, **settings)


class Golden:
    """The arrays and problems of a folder, and the code that runs a case of it."""

    def __init__(self, folder: Path):
        self.index = json.loads((folder / "index.json").read_text())
        self.arrays = np.load(folder / "arrays.npz", allow_pickle=False)

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.arrays[name], np.float64))

    def problem(self, case: dict):
        """(schedule, guidance scale, data, classes to condition on or None, initial noise) of a case."""
        problem = self.index["problems"][case["problem"]]
        mixture = self.index["mixtures"][problem["mixture"]]
        means, stds = (torch.tensor(mixture[name], dtype=torch.float64) for name in ("means", "stds"))
        shape = (mixture["K"], *mixture["shape"])
        data = GaussianMixture(mixture["weights"], means.view(shape), stds.view(shape), mixture["classes"])
        z = self[problem["noise"]]
        schedule: Schedule = {"sd": VPDiscrete.scaled_linear, "vp": VPLinear, "edm": EDM}[problem["schedule"]]()
        classes = torch.arange(len(z)) % 2 if problem["guided"] else None
        return schedule, problem["guidance_scale"] or 1.0, data, classes, z.view(len(z), *mixture["shape"])

    def resolution(self, case: dict) -> float:
        """The smallest difference that float64 resolves in the case's output, after the rounding of a whole run."""
        return 1e-13 * float(self[case["out"]].abs().max())

    def run(self, case: dict) -> float:
        """The largest absolute difference to the case's output, and to its gradient if it has one.

        Raises:
            Unsupported: no runner, or options that it does not know. AssertionError: another number of model calls.
        """
        from . import RUNNERS

        if case["solver"] not in RUNNERS:
            raise Unsupported(case["solver"])
        setting, options = Setting(self, case), dict(case["options"])
        out = RUNNERS[case["solver"]](setting, options)
        if options:  # runners take out what they use
            raise Unsupported(", ".join(f"{k}={v}" for k, v in options.items()))
        if setting.calls != case.get("nfe", 0):
            raise AssertionError(f"{setting.calls} model calls instead of {case['nfe']}")
        results = dict(zip(("out", "out_grad"), out if isinstance(out, tuple) else (out,), strict=False))
        return max(float((each - self[case[key]].view(each.shape)).abs().max()) for key, each in results.items())
