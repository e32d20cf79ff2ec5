import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny import metrics_of

from diffpo.train import train


def test_two_processes_of_four_equal_one_of_eight(tiny_sdxl, make_config, tmp_path, pairs_parquet):
    """Through the real `accelerate launch` and gloo: same losses, LoRA and held-out numbers, to float tolerance."""
    options = ["train.optimizer=torch.optim.SGD", "train.lr=0.3", "train.steps=3", f"data.validation={pairs_parquet}"]
    cache = tmp_path / "cache"  # empty: the two processes fill it together
    # --multi_gpu with ACCELERATE_USE_CPU, because --cpu starts several processes only under MPI; port 0: any free one
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--main_process_port", "0"]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "hf")}
    make_config(tiny_sdxl)
    done = subprocess.run(
        [*command, "-m", "diffpo.cli", "train", str(tmp_path / "recipe.yaml"), *options, f"data.cache={cache}"],
        env={**os.environ, **environment, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = json.loads((tmp_path / "run" / "checkpoint-000003" / "checkpoint.json").read_text())
    assert manifest["pairs_per_update"] == 8  # there really were two
    two, two_rows = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors"), metrics_of(tmp_path / "run")
    one = load_file(train(make_config(tiny_sdxl, *options, "train.batch_size=8", f"output={tmp_path / 'one'}")))
    for ours, theirs in zip(metrics_of(tmp_path / "one"), two_rows, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"time", "pairs_per_second"}:
            assert ours[key] == pytest.approx(theirs[key], rel=5e-3, abs=2e-4), key
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-6)
    assert sum(value.abs().sum() for name, value in one.items() if "lora_B" in name) > 1e-3
