"""Dynamic compensation: the triangular matrix against a run that keeps a history, and what it does to the order."""

import math

import numpy as np
import pytest
import torch
from ids import named

from samplers import Grid, VPLinear, build_plan
from samplers.solvers import dc
from samplers.solvers.dc import compensate, dc_solver, lagrange, with_predictor

VP = VPLinear()
RATIOS = [1.0, 1.0, 0.9, 1.2, 1.0, 1.35, 0.8, 1.1]


@pytest.fixture(scope="module")
def exact(mixture, z):
    return mixture.exact(VP, z)


def by_hand(plan, predictor, model, x, ratios, dc_order):
    """The definition: a corrected and a predicted state, and a history whose newest value is replaced for good.

    The two are told apart by the plans with and without the corrector, both at the state before the correction.
    """
    history = []
    for i, ratio in enumerate(ratios):
        new = model(x, torch.tensor(plan.label[i]))
        row, alone = plan.rows[i, 0], np.zeros(plan.rows.shape[2])
        alone[: predictor.rows.shape[2]] = predictor.rows[i, 0]
        corrected = x
        if i and row[0]:  # state after the corrector of the step before: the new value, and the history
            change = (row - alone)[3:] / row[0]
            corrected = x + sum(c * m for c, m in zip(change, [new, *history], strict=False))
        history.insert(0, new)
        if ratio != 1.0 and len(history) > dc_order:
            t = plan.t[i - np.arange(dc_order + 1)]
            target = ratio * t[0] + (1 - ratio) * t[1]
            polynomial = [np.polyfit(t, unit, dc_order) for unit in np.eye(dc_order + 1)]
            history[0] = sum(np.polyval(p, target) * m for p, m in zip(polynomial, history, strict=False))
        x = row[0] * corrected + sum(c * m for c, m in zip(alone[3:], history, strict=False))
    return x


@pytest.mark.parametrize("dc_order", [1, 2, 3])
@pytest.mark.parametrize(
    ("base", "options"),
    [("unipc", {"variant": "bh1"}), ("unipc", {"order": 2}), ("dpmpp", {"order": 2}), ("dpmpp", {"target": "epsilon"})],
    ids=named,
)
def test_is_the_definition(mixture, z, base, options, dc_order):
    grid = Grid(VP, end="t_end")
    plan, predictor = (p.for_prediction(p.prediction) for p in with_predictor(grid, 8, base, options))
    model = mixture.model(VP, plan.prediction)
    out = dc_solver(grid, 8, base=base, ratios=RATIOS, dc_order=dc_order, **options).run(model, z)
    assert (out - by_hand(plan, predictor, model, z, RATIOS, dc_order)).abs().max() < 1e-11
    assert (out - plan.run(model, z)).abs().max() > 1e-3


def test_lagrange_is_exact_for_polynomials():
    t = np.array([0.3, 0.45, 0.8, 0.9])
    for ratio in (0.7, 1.0, 1.6):
        at = ratio * t[0] + (1 - ratio) * t[1]
        for power in range(4):
            assert lagrange(t, ratio) @ t**power == pytest.approx(at**power, rel=1e-12)


@pytest.mark.parametrize("base", ["unipc", "dpmpp", "abm", "deis", "ipndm", "lms", "sa_solver", "ddim"])
def test_every_solver_with_one_call_per_step(mixture, z, base):
    """Ratios of 1 change nothing, others do; the prediction type of the network does not matter."""
    grid = Grid(VP)
    options = {"tau": 0.0} if base == "sa_solver" else {}
    plain = dc_solver(grid, 8, base=base, **options)
    assert (plain.rows == build_plan(VP, base, 8, grid).rows).all() or base == "sa_solver"
    plan = dc_solver(grid, 8, base=base, ratios=RATIOS, **options)
    runs = [plan.for_prediction(k).run(mixture.model(VP, k), z) for k in ("epsilon", "sample", "v_prediction")]
    assert all((run - runs[0]).abs().max() < 1e-11 for run in runs[1:])
    assert (runs[0] - plain.for_prediction("epsilon").run(mixture.model(VP), z)).abs().max() > 1e-6


@pytest.mark.parametrize(("power", "order"), [(0, 1), (1, 2), (2, 3)])
def test_order_follows_the_distance_of_the_ratio_from_one(mixture, z, exact, power, order):
    """rho = 1 + c h^(p-1) keeps order p: the value moves by (rho - 1) h m', so the step's error by h^2 (rho - 1)."""
    errors = []
    for n in (160, 320):
        ratios = [1.0 + 0.2 * (40 / n) ** power] * n
        plan = dc_solver(Grid(VP, end="t_end"), n, ratios=ratios, lower_order_final=False)
        out = plan.for_prediction("epsilon").run(mixture.model(VP), z)
        errors.append((out - exact).square().mean().sqrt().item())
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.3, errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": (1.0, 1.1)}, "needs 8 finite ratios"),
        ({"ratios": (math.nan,) * 8}, "needs 8 finite ratios"),
        ({"ratios": RATIOS, "dc_order": 0}, "dc_order must be a whole number"),
        ({"ratios": RATIOS, "base": "heun"}, "one model call per step"),
        ({"ratios": RATIOS, "base": "ddim", "eta": 1.0}, "no noise"),
        ({"ordr": 2}, "option of solver 'unipc' 'ordr': did you mean 'order'"),
        ({"base": "unipcc"}, "did you mean 'unipc'"),
    ],
    ids=named,
)
def test_says_what_it_cannot_do(options, message):
    with pytest.raises(ValueError, match=message):
        build_plan(VP, "dc_solver", 8, **options)


def test_a_saved_plan_is_the_plan(tmp_path):
    plan = compensate(dc.with_predictor(Grid(VP), 8, "unipc", {})[0], RATIOS)
    plan.save(tmp_path / "plan.safetensors")
    assert (type(plan).load(tmp_path / "plan.safetensors").rows == plan.rows).all()
