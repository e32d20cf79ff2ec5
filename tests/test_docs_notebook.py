"""The notebook for Colab: its commands are spelt as the program reads them, and its cells run on the embedded model."""

import json
import shlex
import sys
import types
from pathlib import Path

import docs_commands
import pytest
import yaml
from docs_pages import ROOT
from PIL import Image
from test_docs_blocks import SMALL, make_folder, released, stand_in

from diffpo.cli import app

NOTEBOOK = json.loads((ROOT / "docs" / "colab.ipynb").read_text("utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
COMMANDS = [shlex.split(line[1:]) for cell in CELLS for line in cell.splitlines() if line.startswith("!")]


def test_it_is_a_notebook_without_outputs():
    assert NOTEBOOK["nbformat"] == 4 and NOTEBOOK["metadata"]["colab"]["gpuType"] == "T4"
    for cell in NOTEBOOK["cells"]:
        assert isinstance(cell["source"], list) and not cell.get("outputs") and not cell.get("execution_count")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_its_commands_parse(words):
    docs_commands.check(words)


def test_a_t4_has_no_bfloat16():
    """What a command does not set comes from its recipe."""
    for words in COMMANDS:
        if words[1] == "train":
            set_there = dict(word.split("=", 1) for word in words if "=" in word)
            recipe = yaml.safe_load((ROOT / words[2]).read_text("utf-8"))
            assert set_there.get("train.precision", recipe["train"]["precision"]) == "fp16"
        assert "bfloat16" not in words


def test_its_cells_run_on_the_embedded_model(tmp_path, monkeypatch):
    make_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SMALL, "data.cache", str(tmp_path / "cache"))
    seen = []
    display = types.ModuleType("IPython.display")
    display.display, display.Image = seen.append, Image.open
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    namespace = {}
    for cell in CELLS:
        if cell.startswith("%pip"):
            continue
        if not cell.startswith("!"):
            exec(compile(cell, "colab.ipynb", "exec"), namespace)
            continue
        words = shlex.split(cell[1:])[1:]
        if words[0] == "quickstart":  # tests/assets/test_quickstart.py runs it; this is what the next cell shows
            Path("runs/quickstart/eval").mkdir(parents=True)
            Image.new("RGB", (8, 8)).save("runs/quickstart/eval/grid.png")
            continue
        words = [word for word in words if not word.startswith("model.vae=")]
        app(stand_in([released(word) for word in words]), standalone_mode=False)
    assert len(seen) == 2 and seen[1].size > (32, 32)
    assert Path("exports/mine/mine.safetensors").is_file()
