"""A solver from outside the package, named by `package.module:attribute`."""

import json
import math
import sys

import pytest
import torch
from tiny_pipes import SD

import samplers
from samplers import SolverScheduler, VPLinear, build_plan, sample
from samplers.solvers import find_solver

VP = VPLinear()
MODULE = '''
from samplers.plan import Plan, row


def two_step(grid, steps, *, lower_order_final=False):
    """Adams-Bashforth of order 2 in sigma / alpha."""
    nodes = grid.nodes(steps)
    kappa, rows = nodes.sigma / nodes.alpha, []
    for i in range(steps):
        h, scale = kappa[i + 1] - kappa[i], nodes.alpha[i + 1]
        r = 0.0 if i == 0 or (lower_order_final and i == steps - 1) else h / (kappa[i] - kappa[i - 1]) / 2
        rows.append(row(scale / nodes.alpha[i], scale * h * (1 + r), -scale * h * r))
    return Plan.build("two_step", "epsilon", nodes, rows) if steps > 1 else ddim(grid, steps)


def ddim(grid, steps):
    from samplers.solvers.ddim import ddim
    return ddim(grid, steps)


def any_options(grid, steps, **options):
    assert options == {"strength": 2}
    return ddim(grid, steps)


def of_another_kind(grid, steps):
    return [grid, steps]


def not_a_solver(grid):
    return None


number = 3
'''


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outside")
    (folder / "made_up_solvers").mkdir()
    (folder / "made_up_solvers" / "__init__.py").write_text("")
    (folder / "made_up_solvers" / "adams.py").write_text(MODULE)
    (folder / "needs_more.py").write_text("import a_package_that_is_not_there\n")
    sys.path.insert(0, str(folder))
    yield "made_up_solvers.adams"
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.startswith("made_up_solvers")]:
        del sys.modules[name]


def test_its_order_is_2(module, mixture, z):
    exact, errors = mixture.exact(VP, z), []
    for n in (80, 160):
        out = sample(mixture.model(VP), z, schedule=VP, solver=f"{module}:two_step", steps=n, end="t_end")
        errors.append((out - exact).square().mean().sqrt().item())
    assert abs(math.log2(errors[0] / errors[1]) - 2) < 0.3, errors


def test_its_options(module):
    path = f"{module}:two_step"
    low, high = (build_plan(VP, path, 4, end="t_end", lower_order_final=low) for low in (True, False))
    assert (low.rows[:3] == high.rows[:3]).all() and (low.rows[3] != high.rows[3]).any()
    with pytest.raises(ValueError, match=r"lower_order_finl.*did you mean 'lower_order_final'"):
        build_plan(VP, path, 4, lower_order_finl=True)
    assert len(build_plan(VP, f"{module}:any_options", 4, strength=2)) == 4


def test_in_a_scheduler(module):
    path = f"{module}:two_step"
    scheduler = SolverScheduler(**SD, solver=path, solver_options={"lower_order_final": True}, grid="karras")
    scheduler.set_timesteps(5)
    grid = samplers.Grid(scheduler.schedule, "karras")
    assert (scheduler.plan.rows == find_solver(path)(grid, 5, lower_order_final=True).rows).all()
    for bad in ({"solver_options": {"order": 3}}, {"eta": 1.0}):
        with pytest.raises(ValueError, match=next(iter(bad.get("solver_options", bad)))):
            SolverScheduler(**SD, solver=path, **bad)

    class Mine(SolverScheduler, solver=path):
        pass

    mine, x = Mine.from_config(samplers.UniPC(**SD).config), torch.randn(1, 4, 8, 8)
    mine.set_timesteps(5)
    for t in mine.timesteps:
        x = mine.step(0.1 * x, t, x).prev_sample
    assert mine.plan.name == "two_step" and torch.isfinite(x).all()


def test_a_saved_config_imports_nothing_by_itself(module, tmp_path):
    path = f"{module}:two_step"
    mine = SolverScheduler(**SD, solver=path, solver_options={"lower_order_final": True})
    mine.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["solver"] == path
    del sys.modules[module]
    for load in (SolverScheduler.from_pretrained, lambda folder: SolverScheduler.from_config(mine.config)):
        with pytest.raises(ValueError, match=path):
            load(tmp_path)
    assert module not in sys.modules
    assert SolverScheduler.from_pretrained(tmp_path, solver="ddim").config.solver == "ddim"
    assert samplers.UniPC.from_pretrained(tmp_path).config.solver == "unipc"
    assert module not in sys.modules
    again = SolverScheduler.from_pretrained(tmp_path, solver=path)
    assert again.config.solver == path and again.config.solver_options == {"lower_order_final": True}


@pytest.mark.parametrize(
    ("attribute", "what"),
    [
        ("tow_step", "did you mean 'two_step'"),
        ("not_a_solver", "not_a_solver"),
        ("number", "number"),
        ("of_another_kind", "list"),
        ("a:b", "package.module:attribute"),
        ("", "package.module:attribute"),
    ],
)
def test_what_is_no_solver(module, attribute, what):
    for use in (lambda path: build_plan(VP, path, 3), lambda path: SolverScheduler(**SD, solver=path).set_timesteps(3)):
        with pytest.raises(ValueError, match=what):
            use(f"{module}:{attribute}")


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("no_such_module.solvers:heun", "no_such_module"),
        ("needs_more:heun", "a_package_that_is_not_there"),
        ("../evil:heun", "package.module:attribute"),
        ("heum", "did you mean 'heun'"),
    ],
)
def test_modules_that_are_not_there(module, path, what):
    with pytest.raises(ValueError, match=what):
        find_solver(path)
