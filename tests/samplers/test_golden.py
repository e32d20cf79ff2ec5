"""Cases computed by the official implementations (the folder's index says which), through scripts/check_golden.py."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent / "golden"
CASES = json.loads((FOLDER / "index.json").read_text())["cases"]


@pytest.fixture(scope="session")
def script():
    spec = importlib.util.spec_from_file_location("check_golden", ROOT / "scripts" / "check_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_case(script, case):
    assert script.Golden(FOLDER).run(case) <= case["tol"]


def test_exact_solution_agrees_with_the_stored_one(script):
    """`GaussianMixture.exact` against solutions made elsewhere."""
    golden, seen = script.Golden(FOLDER), set()
    for case in CASES:
        if "exact" not in case or case["exact"] in seen or case["solver"] == "ddim":
            continue
        seen.add(case["exact"])
        problem, data, classes, x = golden.problem(case)
        scale = problem["guidance_scale"] or 1.0
        exact = data.exact(golden.schedule(problem["schedule"]), x, case["t_start"], case["t_end"], classes, scale)
        assert (exact - golden[case["exact"]].view(x.shape)).abs().max() < 1e-9
    assert len(seen) >= 4


def test_command(script, capsys):
    assert script.main([str(FOLDER), "--only", "ddim"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "3 cases, 3 passed, 0 unsupported"


def test_command_fails_on_a_wrong_result(script, capsys, tmp_path):
    index = json.loads((FOLDER / "index.json").read_text())
    index["cases"] = index["cases"][:2]
    index["cases"][0]["steps"] += 1
    index["cases"][0]["timesteps"] = index["cases"][0]["timesteps"][1:]
    index["cases"][1]["solver"] = "something_else"
    (tmp_path / "index.json").write_text(json.dumps(index))
    (tmp_path / "arrays.npz").write_bytes((FOLDER / "arrays.npz").read_bytes())
    assert script.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "2 cases, 0 passed, 1 unsupported"
