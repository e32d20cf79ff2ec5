#!/usr/bin/env python
"""Run a folder of golden cases through `samplers` and compare with what the official implementations computed.

    python scripts/check_golden.py DIR [--only SOLVER ...] [--skip SOLVER ...] [--quiet]

DIR holds index.json and arrays.npz. Prints one line per case and `N cases, N passed, N unsupported`; exits 1 if any
case failed or is unsupported (2 if nothing was selected).
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from samplers import EDM, Grid, Guidance, VPDiscrete, VPLinear, build_plan, dynamic_threshold
from samplers.analytic import GaussianMixture

GRIDS = {"time_uniform": "time", "time_quadratic": "quadratic", "logSNR": "logsnr", "edm": "karras"}
OUTPUTS = {"noise": "epsilon", "x_start": "sample", "v": "v_prediction", "score": "score"}


class Unsupported(Exception):
    """A case that `samplers` cannot run (yet)."""


class Golden:
    """One folder of cases: its arrays, problems and the code that runs a case."""

    def __init__(self, folder: Path):
        self.index = json.loads((folder / "index.json").read_text())
        self.arrays = np.load(folder / "arrays.npz", allow_pickle=False)

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.arrays[name], np.float64))

    def schedule(self, name: str):
        return {"sd": VPDiscrete.scaled_linear, "vp": VPLinear, "edm": EDM}[name]()

    def problem(self, case: dict) -> tuple[dict, GaussianMixture, torch.Tensor | None, torch.Tensor]:
        """The case's problem, its data, the classes to condition on (None: unconditional) and the initial state."""
        problem = self.index["problems"][case["problem"]]
        mixture = self.index["mixtures"][problem["mixture"]]
        means, stds = (torch.tensor(mixture[name], dtype=torch.float64) for name in ("means", "stds"))
        shape = (mixture["K"], *mixture["shape"])
        data = GaussianMixture(mixture["weights"], means.view(shape), stds.view(shape), mixture["classes"])
        z = self[problem["noise"]]
        z = z.view(len(z), *mixture["shape"])
        classes = torch.arange(len(z)) % 2 if problem["guided"] else None
        return problem, data, classes, z * case["t_start"] if problem["schedule"] == "edm" else z

    def run(self, case: dict) -> float:
        """The largest absolute difference to the case's output; AssertionError if the number of model calls differs."""
        if case["solver"] not in RUNNERS:
            raise Unsupported(case["solver"])
        problem, data, classes, x = self.problem(case)
        schedule = self.schedule(problem["schedule"])
        plan, settings = RUNNERS[case["solver"]](schedule, case, dict(case["options"]))
        model, calls = data.model(schedule, plan.prediction, classes), 0
        if classes is not None:
            settings["guidance"] = Guidance(problem["guidance_scale"], data.model(schedule, plan.prediction))
        if plan.stochastic:
            draws = self[case["step_noise"]]
            settings["noise"] = lambda k: draws[k].view(x.shape)

        def counted(x, label):
            nonlocal calls
            calls += 1
            return model(x, label)

        out = plan.run(counted, x, **settings)
        if calls != case["nfe"]:
            raise AssertionError(f"{calls} model calls instead of {case['nfe']}")
        return float((out - self[case["out"]].view(out.shape)).abs().max())


def _rest(options: dict) -> None:
    if options:
        raise Unsupported(", ".join(f"{k}={v}" for k, v in options.items()))


def _ddim(schedule, case, options):
    options.pop("discretize", None)  # the labels are listed in the case
    eta = options.pop("eta")
    _rest(options)
    grid = Grid(schedule, timesteps=case["timesteps"], end="t_end", t_end=case["t_end"])
    return build_plan(schedule, "ddim", grid=grid, eta=eta), {}


def _dpm_solver(schedule, case, options):
    steps, algorithm = case["steps"], options.pop("algorithm_type", "dpmsolver++")
    if options.pop("method", "multistep") != "multistep":
        raise Unsupported(f"method={case['options']['method']}")
    kind = GRIDS[options.pop("skip_type", "time_uniform")]
    options.pop("guidance_type", None)  # classifier guidance of an exact model is the same function
    settings = {}
    if options.pop("thresholding", False):
        ratio, floor = options.pop("dynamic_thresholding_ratio", 0.995), options.pop("thresholding_max_val", 1.0)
        settings["threshold"] = partial(dynamic_threshold, ratio=ratio, floor=floor)
    plan = build_plan(
        schedule,
        "dpmpp",
        steps,
        grid=Grid(schedule, kind, end="t_end", t_start=case["t_start"], t_end=case["t_end"]),
        prediction=OUTPUTS[options.pop("model_output", "noise")],
        order=options.pop("order", 2),
        solver_type={"dpmsolver": "midpoint", "taylor": "heun"}[options.pop("solver_type", "dpmsolver")],
        lower_order_final=options.pop("lower_order_final", True)
        and steps < 10,  # the official code stops lowering at 10
        target="sample" if algorithm == "dpmsolver++" else "epsilon",
        as_published=True,
    )
    _rest(options)
    return plan, settings


RUNNERS = {"ddim": _ddim, "dpm_solver": _dpm_solver}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", metavar="SOLVER", help="run only these solvers' cases")
    parser.add_argument("--skip", nargs="+", metavar="SOLVER", default=[], help="leave these solvers' cases out")
    parser.add_argument("--quiet", action="store_true", help="print failures and the summary only")
    args = parser.parse_args(argv)
    for name in ("index.json", "arrays.npz"):
        if not (args.folder / name).is_file():
            parser.error(f"{args.folder} has no {name}")
    torch.set_num_threads(1)
    golden = Golden(args.folder)
    cases = golden.index["cases"]
    solvers = {c["solver"] for c in cases}
    for name in [*(args.only or []), *args.skip]:
        if name not in solvers:
            parser.error(f"no case of solver {name!r}; the folder has {', '.join(sorted(solvers))}")
    cases = [c for c in cases if (not args.only or c["solver"] in args.only) and c["solver"] not in args.skip]
    passed = unsupported = 0
    for case in cases:
        try:
            gap = golden.run(case)
            good = gap <= case["tol"]
            passed += good
            verdict = f"{'pass' if good else 'FAIL'}  {gap:.1e} (tol {case['tol']:.0e})"
        except Unsupported as why:
            unsupported, good, verdict = unsupported + 1, True, f"unsupported  {why}"
        except Exception as error:
            good, verdict = False, f"FAIL  {type(error).__name__}: {error}"
        if not (args.quiet and good):
            print(f"{case['id']}  {verdict}")
    print(f"{len(cases)} cases, {passed} passed, {unsupported} unsupported")
    return 2 if not cases else int(passed != len(cases))


if __name__ == "__main__":
    sys.exit(main())
