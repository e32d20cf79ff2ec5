"""Where networks run if no device is named, and that nothing there is counted in float64, which mps lacks."""

import ast
from pathlib import Path

import pytest
import torch

from diffpo import scorers
from diffpo.commands.calibrate import Calibration
from diffpo.common import devices
from diffpo.models import source

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "cuda, mps, best", [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_cuda_comes_before_mps_and_mps_before_the_cpu(monkeypatch, tiny_sd, cuda, mps, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert devices.best() == best
    assert scorers.default_device("pickscore") == best and scorers.default_device("shapes") == "cpu"
    fitted = Calibration("model", "prompts", "plan.safetensors").device
    assert fitted == ("cpu" if best == "mps" else None)  # it needs float64
    tried = []
    monkeypatch.setattr(torch, "zeros", lambda *_, device: tried.append(device) or torch.empty(0))
    monkeypatch.setattr(source, "source_of", lambda settings: pytest.fail("far enough"))
    with pytest.raises(BaseException, match="far enough"):
        source.load_pipeline(str(tiny_sd))
    assert tried == [best]


def test_float64_is_of_the_cpu():
    """`.double()` of what a network computed comes after `.cpu()`. In these files all tensors are on the CPU."""
    on_the_cpu = {"evaluation/benchmark_results.py", "objective/steering.py", "objective/weighting.py"}
    on_the_cpu |= {"train/metrics.py", "train/update.py", "models/process.py"}
    found = set()
    for path in (ROOT / "diffpo").rglob("*.py"):
        name = path.relative_to(ROOT / "diffpo").as_posix()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "double":
                moved = any(getattr(inner, "attr", "") == "cpu" for inner in ast.walk(node.func.value))
                found |= set() if moved or name in on_the_cpu else {f"{name}:{node.lineno}"}
    assert not found
