"""The official codes: those that need no fitting reproduced by our solvers `as_published`, the fitted ones as numbers.

Settings: every combination of dpm-solver, UniPC, SA-Solver, DEIS, diff-sampler and k-diffusion that was measured when
their codes were run on these mixtures, all ending at label 0 unless said.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from samplers import Grid
from samplers.solvers import SOLVERS

SPACINGS = {"time_uniform": "time", "logSNR": "logsnr", "time_quadratic": "quadratic", "polynomial": "karras"}


def methods() -> dict[str, Callable]:
    found = {}

    def add(label: str, solver: str, spacings, end: str = "t_end", **options):
        for spacing in spacings:
            found[f"{label} {spacing}"] = partial(_run, solver, SPACINGS[spacing], end, options)

    official = ("time_uniform", "logSNR", "time_quadratic")
    sampler = ("polynomial", "logSNR")
    add("DDIM", "ddim", official)
    for name, target in (("dpmsolver++", "sample"), ("dpmsolver", "epsilon")):
        for order in (2, 3):
            published = {"as_published": True} if order == 3 else {}
            add(
                f"{name} {order}M",
                "dpmpp",
                official,
                order=order,
                target=target,
                lower_order_final=BELOW_10,
                **published,
            )
    for order in (2, 3):
        for variant in ("bh1", "bh2"):
            add(f"UniPC {variant} o{order}", "unipc", official, order=order, variant=variant)
        add(f"UniPC bh1 o{order} eps", "unipc", ("logSNR",), order=order, variant="bh1", target="epsilon")
        add(f"diff-sampler dpmpp o{order}", "dpmpp", sampler, order=order, target="epsilon", as_published=True)
    add("diff-sampler unipc o3", "unipc", sampler, order=3, target="epsilon")
    for order in (2, 3, 4):
        add(f"diff-sampler ipndm {order}", "ipndm", sampler, order=order)
        add(f"diff-sampler ipndm_v {order}", "ipndm", sampler, order=order, variable=True, as_published=True)
    add("k-diffusion lms", "lms", sampler, end="zero", order=4)
    add("k-diffusion dpmpp_2m", "dpmpp", sampler, end="zero", order=2)
    return found


BELOW_10 = object()  # dpm-solver lowers the order at the end below ten steps only


def _run(solver: str, kind: str, end: str, options: dict, problem, calls: int):
    options = {k: calls < 10 if v is BELOW_10 else v for k, v in options.items()}
    plan = SOLVERS[solver](Grid(problem.schedule, kind, end=end), calls, **options)
    return plan.run(problem.model, problem.z, prediction=problem.prediction, check_finite=False), end


# DPM-Solver-v3 with statistics fitted to the mixture (1,200 levels, the authors' code): RMSE of its best settings on
# the same mixtures with other noise. With guidance 7.5 it never comes near the others.
FITTED = {
    ("gmm16a g=1", 5): ("DPM-Solver-v3 o2 c2 time_quadratic", 0.0168),
    ("gmm16a g=1", 8): ("DPM-Solver-v3 o3 c3 time_quadratic", 0.0048),
    ("gmm16a g=1", 10): ("DPM-Solver-v3 o3 time_quadratic", 0.0034),
    ("gmm16a g=1", 15): ("DPM-Solver-v3 o3 c3 time_quadratic", 0.0017),
    ("gmm16a g=1", 20): ("DPM-Solver-v3 o3 c3 time_quadratic", 0.0008),
    ("gmm2a g=1", 5): ("DPM-Solver-v3 o2 c2 time_quadratic", 0.0150),
    ("gmm2a g=1", 8): ("DPM-Solver-v3 o3 c3 logSNR, pseudo", 0.0068),
    ("gmm2a g=1", 10): ("DPM-Solver-v3 o3 c3 logSNR, pseudo", 0.0040),
    ("gmm2a g=1", 15): ("DPM-Solver-v3 o3 c3 time_quadratic", 0.00099),
    ("gmm2a g=1", 20): ("DPM-Solver-v3 o3 c3 time_quadratic", 0.0004),
}
