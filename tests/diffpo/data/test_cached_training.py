"""Training from the caches equals training without them, and a run that fills them equals one that finds them."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import metrics_of
from tiny_transformers import make_sd3

from diffpo.train.loop import train


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_from_cache_equals_without(name, tiny_sdxl, make_config, tmp_path, pairs_parquet):
    path = tiny_sdxl if name == "sdxl" else make_sd3(tmp_path / "sd3")
    # as in test_train: Adam's first steps would turn rounding into differences of 2 lr
    common = ("train.optimizer=torch.optim.SGD", "train.lr=0.3", f"data.cache={tmp_path / 'cache'}")
    common += ("data.caption_dropout=0.3", f"data.validation={pairs_parquet}")

    def run(folder, *options):
        lora = load_file(train(make_config(path, *common, *options, f"output={tmp_path / folder}")))
        return lora, [
            {key: value for key, value in row.items() if key not in ("time", "pairs_per_second")}
            for row in metrics_of(tmp_path / folder)
        ]

    without = run("without", "data.cache_latents=false")
    assert not list((tmp_path / "cache").glob("latents-*"))
    filled, files = run("filled"), sorted((tmp_path / "cache").rglob("*.safetensors"))
    times = [file.stat().st_mtime_ns for file in files]
    found = run("found")
    assert found[1] == filled[1] and all(torch.equal(found[0][key], filled[0][key]) for key in filled[0])
    assert {file.parent.name.split("-")[0] for file in files} == {"text", "latents"}
    assert sorted((tmp_path / "cache").rglob("*.safetensors")) == files
    assert [file.stat().st_mtime_ns for file in files] == times  # they were read, not written
    for ours, theirs in zip(filled[1], without[1], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert value == pytest.approx(theirs[key], rel=5e-3, abs=2e-4), key
    for key, value in filled[0].items():
        # the VAE rounds otherwise in a batch of other images
        assert (value - without[0][key]).norm() <= 1e-3 * value.norm(), key
    assert sum(value.abs().sum() for key, value in filled[0].items() if "lora_B" in key) > 1e-3
