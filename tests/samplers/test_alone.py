"""`samplers` without `diffpo` and its packages: torch and numpy are enough, and what needs more says so."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# torch and numpy, and what they import
THERE = ["torch", "torchgen", "functorch", "numpy", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock"]
THERE += ["fsspec", "typing_extensions", "setuptools", "_distutils_hack", "cuda", "nvidia", "triton"]
PROGRAM = """
import importlib.abc, json, sys

there, root, file = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
allowed = {*there, *sys.stdlib_module_names, "samplers"}

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

sys.meta_path.insert(0, Absent())
sys.path.insert(0, root)
import torch
import samplers, samplers.analytic, samplers.calibrate, samplers.comfyui

schedule = samplers.VPLinear()
exact = samplers.analytic.GaussianMixture([1.0], [[0.5]], [[0.3]])
model = exact.model(schedule, "epsilon")
noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))

def sampled(**options):
    options = {"steps": 60, "grid": "logsnr", "prediction": "epsilon", **options}
    generator = torch.Generator().manual_seed(1)
    x = samplers.sample(model, noise, schedule=schedule, generator=generator, **options)
    return [x.mean().item(), x.std().item()]

# need statistics, ratios, a flow, or a state of many dimensions (its Langevin steps are sized by the state's norm)
own = ("dpm_solver_v3", "dc_solver", "flow_sde", "predictor_corrector")
found = {name: sampled(solver=name) for name in samplers.SOLVERS if name not in own}
found["default"] = sampled(steps=10)
said = {}
for what, act in {
    "scheduler": lambda: samplers.SolverScheduler,
    "named": lambda: samplers.UniPC,
    "beta": lambda: sampled(grid="beta"),
    "save": lambda: samplers.build_plan(schedule, "dpmpp", 4, prediction="epsilon").save(file),
    "load": lambda: samplers.Plan.load(file),
}.items():
    try:
        act()
    except Exception as error:
        said[what] = [type(error).__name__, str(error)]
extra = sorted({name.partition(".")[0] for name in sys.modules} - allowed - {"__mp_main__"})
print(json.dumps([found, said, [name for name in extra if hasattr(sys.modules[name], "__version__")]]))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    arguments = [json.dumps(THERE), str(ROOT), str(folder / "plan.safetensors")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM, *arguments], capture_output=True, text=True, encoding="utf-8", cwd=folder
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_every_solver_samples_a_gaussian(alone):
    found, _, loaded = alone
    assert len(found) > 20 and not loaded
    wrong = {
        name: (mean, std) for name, (mean, std) in found.items() if abs(mean - 0.5) > 0.05 or abs(std - 0.3) > 0.05
    }
    assert not wrong


@pytest.mark.parametrize(
    "what, package",
    [
        ("scheduler", "diffusers"),
        ("named", "diffusers"),
        ("beta", "scipy"),
        ("save", "safetensors"),
        ("load", "safetensors"),
    ],
)
def test_what_needs_more_names_the_package(alone, what, package):
    kind, message = alone[1][what]
    assert kind == "ImportError" and f"pip install {package}" in message


def test_both_distributions_agree():
    """`diffpo` holds the same package, so its version and what it asks of torch and numpy must be the same."""
    both = [
        tomllib.loads((ROOT / place / "pyproject.toml").read_text("utf-8"))["project"] for place in ("", "samplers")
    ]
    for key in ("version", "requires-python", "license"):
        assert both[0][key] == both[1][key], key
    assert set(both[1]["dependencies"]) <= set(both[0]["dependencies"])
    assert [line for line in both[0]["classifiers"] if "Python" in line or "System" in line] == [
        line for line in both[1]["classifiers"] if "Python" in line or "System" in line
    ]
    extras = {line for lines in both[1]["optional-dependencies"].values() for line in lines}
    assert extras <= set(both[0]["dependencies"])
    assert (ROOT / "samplers" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
