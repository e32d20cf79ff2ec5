"""Cases computed by the official implementations (the folder's index says which), through scripts/check_golden.py."""

import json
import re
from pathlib import Path

import check_golden
import pytest
from golden import Golden

FOLDER = Path(__file__).parent / "golden"
CASES = json.loads((FOLDER / "index.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_case(case):
    assert Golden(FOLDER).run(case) <= case["tol"]


def test_exact_solution_agrees_with_the_stored_one():
    """`GaussianMixture.exact` against solutions made elsewhere."""
    golden, seen = Golden(FOLDER), set()
    for case in CASES:
        if "exact" not in case or case["exact"] in seen or case["solver"] == "ddim":
            continue
        seen.add(case["exact"])
        schedule, scale, data, classes, z = golden.problem(case)
        exact = data.exact(schedule, z, case["t_start"], case["t_end"], classes, scale)
        assert (exact - golden[case["exact"]].view(z.shape)).abs().max() < 1e-9
    assert len(seen) >= 4


def counts(capsys):
    """Cases, passed and unsupported of the summary."""
    return [int(number) for number in re.findall(r"\d+", capsys.readouterr().out.splitlines()[-1])]


def test_command(capsys):
    assert check_golden.main([str(FOLDER), "--only", "ddim"]) == 0
    cases = sum(case["solver"] == "ddim" for case in CASES)
    assert counts(capsys) == [cases, cases, 0]


def test_command_fails_on_a_wrong_result(capsys, tmp_path):
    index = json.loads((FOLDER / "index.json").read_text())
    index["cases"] = index["cases"][:2]
    index["cases"][0]["steps"] += 1
    index["cases"][0]["timesteps"] = index["cases"][0]["timesteps"][1:]
    index["cases"][1]["solver"] = "something_else"
    (tmp_path / "index.json").write_text(json.dumps(index))
    (tmp_path / "arrays.npz").write_bytes((FOLDER / "arrays.npz").read_bytes())
    assert check_golden.main([str(tmp_path)]) == 1
    assert counts(capsys) == [2, 0, 1]
