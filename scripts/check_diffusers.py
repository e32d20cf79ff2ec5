"""Where our solvers and diffusers' schedulers agree: runs both on an analytic network and writes the table.

    python scripts/check_diffusers.py            # run all; exit 1 if a claim or the table in docs/diffusers.md is wrong
    python scripts/check_diffusers.py --write    # run all, and put the table into docs/diffusers.md

Both start from the same state, with the same labels and the same noise. The network is the exact prediction for a
Gaussian mixture on Stable Diffusion's schedule. "The same" is a largest difference below 2e-4 for states of size 1;
diffusers keeps its tables in float32.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch

import samplers
from diffpo.common import tables
from samplers.analytic import GaussianMixture

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TOLERANCE = 2e-4
DOC = Path(__file__).parents[1] / "docs" / "diffusers.md"
BEGIN, END = "<!-- table: scripts/check_diffusers.py -->\n", "<!-- end of table -->\n"
MIXTURE = GaussianMixture(
    [0.27, 0.51, 0.22],
    torch.tensor([[-0.86, -0.74], [0.90, 0.24], [-0.26, 0.02]]).view(3, 1, 1, 2),
    torch.tensor([[0.31, 0.20], [0.16, 0.34], [0.31, 0.26]]).view(3, 1, 1, 2),
)
NOISE = torch.randn(16, 1, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """One diffusers scheduler with its settings, and ours.

    nodes: what ours is given of theirs: 'labels', 'sigmas', or 'steps' (only their number, so the grids are compared).
    why: empty claims that the two agree; else what makes them differ.
    """

    theirs: str
    settings: dict
    ours: str
    options: dict = field(default_factory=dict)
    why: str = ""
    steps: int = 10
    nodes: str = "labels"


MIN = {"final_sigmas_type": "sigma_min"}
LAST_LABEL = "it steps by 1000 // steps and not to its next label (issues 11347, 12633)"
SIGMA_0 = "its last step goes to the last label; with that end they agree"
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
CUT = "it cuts the network's labels to whole numbers"
ROUNDED = "it rounds the network's labels of these sigmas to whole numbers"


def multistep(order: int, kind: str = "dpmsolver++", **more) -> tuple[dict, dict]:
    """The settings of DPMSolverMultistepScheduler, and what they are here."""
    theirs = {"solver_order": order, "algorithm_type": kind, **more}
    eps = kind.endswith("dpmsolver")
    ours = {"eta": 1.0} if kind.startswith("sde") else {}
    if eps:
        ours["solver_options"] = {"target": "epsilon"}
    if order == 3:
        ours["as_published"] = True
    return theirs, ours


def cases() -> list[Case]:
    rows = []

    def add(theirs, settings, ours, options=None, why="", **more):
        rows.append(Case(theirs, settings, ours, options or {}, why, **more))

    plain = {"clip_sample": False}
    trailing = {"timestep_spacing": "trailing"}
    add("DDIMScheduler", {**plain, **trailing}, "DDIM")
    add("DDIMScheduler", {**plain, **trailing, "set_alpha_to_one": False}, "DDIM", MIN)
    add("DDIMScheduler", {**plain, "set_alpha_to_one": False, "steps_offset": 1}, "DDIM", MIN)
    add("DDIMScheduler", {**plain, "timestep_spacing": "linspace"}, "DDIM", why=LAST_LABEL)
    add("DDPMScheduler", {**plain, **trailing}, "DDPM")
    large = "'fixed_large' is another variance than DDIM's at eta = 1"
    add("DDPMScheduler", {**plain, **trailing, "variance_type": "fixed_large"}, "DDPM", why=large)
    add("DDPMScheduler", {"clip_sample": True, **trailing}, "DDPM")
    kept = "it steps with the noise of the x_0 before clipping; use_clipped_model_output=True of its step agrees"
    add("DDIMScheduler", {"clip_sample": True, **trailing}, "DDIM", why=kept)

    dpm, single = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
    for order in (1, 2, 3):
        for kind, ends in (("dpmsolver++", ({}, MIN)), ("dpmsolver", (MIN,))):
            for end in ends:
                settings, ours = multistep(order, kind, **end)
                add(dpm, settings, "SolverScheduler", {"solver": "dpmpp", **ours})
    add(dpm, {"solver_type": "heun"}, "DPMSolverPP2M")
    add(dpm, {"solver_order": 2}, "DPMSolverPP2M", {"grid": "config"}, nodes="steps")
    half = "its third-order term is half as large as it should be (docs/corrections.md); as_published=True agrees"
    add(dpm, {"solver_order": 3}, "DPMSolverPP3M", why=half)
    no_lowering = "it lowers the last orders below 15 steps only; lower_order_final=False agrees"
    add(dpm, {"solver_order": 3, **MIN}, "DPMSolverPP3M", {"as_published": True}, no_lowering, steps=20)
    options = {"as_published": True, "lower_order_final": False}
    add(dpm, {"solver_order": 3, **MIN}, "DPMSolverPP3M", options, steps=20)
    add(dpm, {"use_karras_sigmas": True}, "DPMSolverPP2M", why=ROUNDED, nodes="sigmas")
    add(dpm, {"thresholding": True, "sample_max_value": 1.5}, "DPMSolverPP2M")
    add(dpm, multistep(2, "sde-dpmsolver++")[0], "DPMSolverPP2MSDE")
    for order in (1, 2):
        for kind in ("sde-dpmsolver++", "sde-dpmsolver"):
            settings, ours = multistep(order, kind, **({} if kind.endswith("++") else MIN))
            add(dpm, settings, "SolverScheduler", {"solver": "dpmpp", **ours})
    settings, ours = multistep(3, "sde-dpmsolver++")
    sign = "its second-derivative weight has - 0.5 where the integral gives + 0.5"
    add(dpm, settings, "SolverScheduler", {"solver": "dpmpp", **ours}, sign)
    settings, ours = multistep(3, "sde-dpmsolver", **MIN)
    add(dpm, settings, "SolverScheduler", {"solver": "dpmpp", **ours}, "it raises UnboundLocalError (PR 13778)")

    theirs_nodes = {"grid": "config", "as_published": True}  # stages on the grid's own labels
    for end in ({}, MIN):
        add(single, {"solver_order": 2, **end}, "DPMSolverPP2S", theirs_nodes, nodes="steps")
        add(single, {"solver_order": 3, "solver_type": "heun", **end}, "DPMSolverPP3S", theirs_nodes, nodes="steps")
    midpoint = (
        "the second stage of its third-order steps is a midpoint step, not algorithm 5's; solver_type='heun' agrees"
    )
    add(single, {"solver_order": 3}, "DPMSolverPP3S", theirs_nodes, midpoint, nodes="steps")
    inner = "the stages of its steps are not at r = 1/2 but on the grid's own labels; as_published=True agrees"
    add(single, {"solver_order": 2, **MIN}, "DPMSolverPP2S", {"grid": "config"}, inner, nodes="steps")

    unipc = "UniPCMultistepScheduler"
    for settings in (
        {},
        {"solver_order": 3},
        {"solver_order": 3, **MIN},
        {"solver_order": 3, "solver_type": "bh1", **MIN},
    ):
        add(unipc, settings, "UniPC")
    add(unipc, {"solver_type": "bh1"}, "UniPC", why="it returns NaN: B(h) is infinite in the step to sigma = 0")
    add(unipc, {"predict_x0": False, **MIN}, "UniPC", {"solver_options": {"target": "epsilon"}})
    add(unipc, {"use_karras_sigmas": True}, "UniPC", why=ROUNDED, nodes="sigmas")

    for order in (1, 2, 3):
        add("DEISMultistepScheduler", {"solver_order": order}, "DEIS", {"solver_type": "logrho", **MIN})
    add("DEISMultistepScheduler", {}, "DEIS", MIN, "ours is the paper's tAB; solver_type='logrho' agrees")
    add("DEISMultistepScheduler", {}, "DEIS", {"solver_type": "logrho"}, SIGMA_0)

    for p, c in ((1, 1), (2, 2), (3, 3), (3, 4)):
        orders = {"predictor_order": p, "corrector_order": c}
        settings = {**orders, "tau_func": _no_noise}
        add("SASolverScheduler", settings, "SASolver", {**MIN, "solver_options": orders, "as_published": True})
    settings = {"predictor_order": 3, "corrector_order": 4, "tau_func": _no_noise}
    options = {**MIN, "solver_options": {"predictor_order": 3, "corrector_order": 4}}
    exact = "its formulas through two values are approximate (as bh1); as_published=True agrees"
    add("SASolverScheduler", settings, "SASolver", options, exact)
    options = {**MIN, "solver_options": {"tau": 1.0, "predictor_order": 2, "corrector_order": 2}, "as_published": True}
    last = "ours makes the last step without noise, as the authors' few-steps mode"
    add("SASolverScheduler", {"tau_func": _noise}, "SASolver", options, last)

    for spacing in ("linspace", "trailing"):
        for name in ("Euler", "EulerAncestral", "Heun", "LMS"):
            add(f"{name}DiscreteScheduler", {"timestep_spacing": spacing}, name)
        for name in ("KDPM2", "KDPM2Ancestral"):
            add(f"{name}DiscreteScheduler", {"timestep_spacing": spacing}, name, nodes="sigmas")
    for name in ("Euler", "Heun", "LMS"):
        add(f"{name}DiscreteScheduler", {"use_karras_sigmas": True}, name, nodes="sigmas")

    add("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}, "PNDM", MIN)
    add("PNDMScheduler", {"skip_prk_steps": True, **trailing}, "PNDM", MIN)
    add("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}, "PNDM", why=SIGMA_0)
    add("PNDMScheduler", {"skip_prk_steps": False}, "PNDM", {**MIN, "solver_options": {"skip_prk": False}})

    flow = {"shift": 3.0}
    add("FlowMatchEulerDiscreteScheduler", flow, "Euler", nodes="steps")
    for more in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        add("FlowMatchEulerDiscreteScheduler", {**flow, more: True}, "Euler", nodes="steps")
    add("FlowMatchEulerDiscreteScheduler", {**flow, "shift_terminal": 0.1}, "Euler", nodes="steps")
    add("FlowMatchHeunDiscreteScheduler", flow, "Heun", nodes="steps")
    add(unipc, FLOW, "UniPC", why=CUT, nodes="sigmas")
    add(unipc, {**FLOW, "use_karras_sigmas": True}, "UniPC", why=CUT, nodes="steps")
    add(dpm, FLOW, "DPMSolverPP2M", why=CUT, nodes="sigmas")
    logrho = {"solver_type": "logrho", **MIN}
    add("DEISMultistepScheduler", FLOW, "DEIS", logrho, "its last step has length 0; " + CUT, nodes="sigmas")
    for name, solver in (("EDMEulerScheduler", "euler"), ("EDMDPMSolverMultistepScheduler", "dpmpp")):
        add(name, {}, "samplers.sample", {"solver": solver})
    return rows


def _no_noise(t):
    return 0.0


def _noise(t):
    return 1.0


def run(scheduler, model, x: torch.Tensor) -> torch.Tensor:
    """The loop of every diffusers pipeline."""
    drawn = {"generator": torch.Generator().manual_seed(1)}
    drawn = drawn if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(seen, t), t, x, **drawn).prev_sample
    return x


def edm_difference(case: Case) -> float:
    """EDM-preconditioned networks have no pipeline here: theirs against `samplers.sample` on the EDM schedule."""
    theirs = getattr(diffusers, case.theirs)(**case.settings)
    theirs.set_timesteps(case.steps)
    schedule = samplers.EDM(theirs.config.sigma_min, theirs.config.sigma_max)
    x = start = NOISE * float(theirs.sigmas[0])
    for t, sigma in zip(theirs.timesteps, theirs.sigmas.double(), strict=False):
        theirs.scale_model_input(x, t)
        x0 = MIXTURE.posterior(x, 1.0, float(sigma))[0]
        network = (x0 - theirs.precondition_outputs(x, torch.zeros_like(x), sigma)) / theirs.precondition_outputs(
            torch.zeros_like(x), torch.ones_like(x), sigma
        )
        x = theirs.step(network, t, x).prev_sample
    sigmas = theirs.sigmas.tolist()
    mine = samplers.sample(MIXTURE.model(schedule), start, schedule=schedule, sigmas=sigmas, **case.options)
    return float((x - mine).abs().max())


def difference(case: Case) -> float:
    """The largest difference of the two results; NaN if theirs raises or returns NaN."""
    if case.theirs.startswith("EDM"):
        return edm_difference(case)
    flow = case.theirs.startswith("FlowMatch") or "use_flow_sigmas" in case.settings
    theirs = getattr(diffusers, case.theirs)(**({} if flow else SD), **case.settings)
    theirs.set_timesteps(case.steps)
    schedule = samplers.RectifiedFlow(case.settings.get("shift", 1.0)) if flow else samplers.VPDiscrete.scaled_linear()
    model = MIXTURE.model(schedule, "flow" if flow else "epsilon")
    # diffusers draws the noise of its SDE solvers in float32
    x = NOISE.float() if "sde" in case.settings.get("algorithm_type", "") else NOISE
    start = x
    if case.theirs.startswith(("Euler", "Heun", "KDPM2", "LMS")):  # their states are x / alpha
        start = x * (float(theirs.sigmas[0]) ** 2 + 1) ** 0.5
    config = {name: value for name, value in theirs.config.items() if name != "tau_func"}
    ours = getattr(samplers, case.ours).from_config(config, **case.options)
    if case.nodes == "steps":
        ours.set_timesteps(len(theirs.timesteps))
    elif case.nodes == "sigmas":
        ours.set_timesteps(sigmas=_once(theirs.sigmas))
    else:
        of = torch.as_tensor(theirs._timesteps[::-1].copy()) if case.theirs == "PNDMScheduler" else theirs.timesteps
        ours.set_timesteps(timesteps=_once(of))
    if len(ours.timesteps) != len(theirs.timesteps):
        raise ValueError(f"{case}: {len(ours.timesteps)} calls, theirs {len(theirs.timesteps)}")
    mine = run(ours, model, x)
    if not torch.isfinite(mine).all():
        raise ValueError(f"{case}: our result is not finite")
    try:
        return float((run(theirs, model, start) - mine).abs().max())
    except UnboundLocalError:
        return float("nan")


def _once(values: torch.Tensor) -> list[float]:
    """The values without the repetitions that mean a second call."""
    return list(dict.fromkeys(values.tolist()))


def row(case: Case, gap: float) -> str:
    said = {name: v for name, v in case.settings.items() if name != "tau_func" and (name, v) != ("clip_sample", False)}
    if "tau_func" in case.settings:
        said["tau"] = case.settings["tau_func"](0)
    said |= {"steps": case.steps} if case.steps != 10 else {}
    cell = lambda options: ", ".join(f"{k}={v!r}" for k, v in options.items())  # noqa: E731
    result = "the same" if gap < TOLERANCE else f"{gap:.0e}: {case.why}"
    return tables.row([case.theirs, cell(said), case.ours, cell(case.options), result]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/diffusers.md")
    write = parser.parse_args().write
    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()
    table = tables.head(["diffusers", "settings", "samplers", "options", "result"]) + "\n"
    wrong = 0
    for case in cases():
        gap = difference(case)
        table += row(case, gap)
        if (gap < TOLERANCE) == bool(case.why):
            wrong += 1
            print(f"the claim does not hold: {row(case, gap)}", end="")
    head, rest = DOC.read_text().split(BEGIN)
    now, tail = rest.split(END)
    if write:
        DOC.write_text(head + BEGIN + table + END + tail)
    else:
        without = lambda text: re.sub(r"\| (nan|\de-?[+]?\d+): ", "| ", text)  # noqa: E731
        if without(now) != without(table):
            wrong += 1
            print(f"the table in {DOC} is not what was measured: run with --write")
    print(f"{len(cases())} settings, {sum('the same' in line for line in table.splitlines())} the same, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
