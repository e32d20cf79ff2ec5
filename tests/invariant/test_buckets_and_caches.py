"""Two processes fill the caches of pictures of several sizes, and train on them, as one does."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny import metrics_of, pick_a_pic_rows, picture, png, write_parquet

from diffpo.train.loop import train

SIZES = [(32, 16), (16, 40), (16, 16), (32, 16), (24, 16), (16, 16)]


@pytest.fixture
def source(tmp_path):
    rows = pick_a_pic_rows(len(SIZES))
    for i, (row, size) in enumerate(zip(rows, SIZES, strict=True)):
        row |= {f"jpg_{j}": png(picture(2 * i + j, size)) for j in (0, 1)}
    return write_parquet(tmp_path / "mixed.parquet", rows)


def files(cache):
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}


def test_two_processes_equal_one(tiny_sdxl, make_config, tmp_path, source):
    options = ["data.buckets=true", f"data.validation={source}", "train.optimizer=torch.optim.SGD", "train.lr=0.3"]
    options += ["train.steps=3", "data.caption_dropout=0.3"]
    make_config(tiny_sdxl, data=source)
    # as in test_processes
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--main_process_port", "0", "-m", "diffpo.cli", "train"]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "hf")}
    done = subprocess.run(
        [*command, str(tmp_path / "recipe.yaml"), *options, "train.batch_size=2", f"data.cache={tmp_path / 'two'}"],
        env={**os.environ, **environment, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two, two_rows = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors"), metrics_of(tmp_path / "run")
    whole = (f"data.cache={tmp_path / 'one'}", f"output={tmp_path / 'alone'}", "train.batch_size=4")
    one = load_file(train(make_config(tiny_sdxl, *options, *whole, data=source)))
    kept = files(tmp_path / "one")
    assert files(tmp_path / "two") == kept  # to the byte, and nothing beside them
    assert [name.split("-")[0] for name in kept] == ["latents"] * 3 + ["text"]  # one for each size
    for ours, theirs in zip(metrics_of(tmp_path / "alone"), two_rows, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"time", "pairs_per_second"}:
            assert ours[key] == pytest.approx(theirs[key], rel=5e-3, abs=2e-4), key
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-6)
    assert sum(value.abs().sum() for name, value in one.items() if "lora_B" in name) > 1e-3
