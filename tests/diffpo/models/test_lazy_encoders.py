"""Encoders that are loaded only for what the caches lack: the same run, without them."""

import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffpo import models
from diffpo.config import Model
from diffpo.models import lazy_encoders
from diffpo.models.family import Family
from diffpo.models.lazy_encoders import LazyEncoders
from diffpo.train.loop import train


@pytest.fixture
def folder(tiny_sdxl, tmp_path, monkeypatch):
    """A model whose files count as old."""
    shutil.copytree(tiny_sdxl, tmp_path / "model")
    monkeypatch.setattr(lazy_encoders, "SETTLED", -1e9)
    return tmp_path / "model"


def lazy(folder, cache, **options) -> LazyEncoders:
    return LazyEncoders(models.load(Model(path=str(folder), **options), "no", 16), "cpu", cache)


def hashes(encoders) -> tuple[str, str]:
    return encoders.text_hash(), encoders.vae_hash()


def negate(weights) -> None:
    """One value negated in a file of the same size, with the times of before."""
    before, values = weights.stat(), load_file(weights)
    name = max(values, key=lambda name: (values[name].numel(), name))
    values[name].view(-1)[7] *= -1
    content = weights.with_suffix(".new")
    save_file(values, content, {"format": "pt"})
    weights.write_bytes(content.read_bytes())
    content.unlink()
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size


def test_a_second_run_loads_no_encoder_and_is_the_same(folder, tmp_path, make_config, monkeypatch, capsys):
    cache = f"data.cache={tmp_path / 'cache'}"
    train(make_config(folder, cache, f"output={tmp_path / 'one'}"))
    said = capsys.readouterr().out

    def refuse(self, device):
        raise AssertionError("loaded")

    monkeypatch.setattr(Family, "load_encoders", refuse)
    train(make_config(folder, cache, f"output={tmp_path / 'two'}"))
    one, two = (load_file(tmp_path / run / "pytorch_lora_weights.safetensors") for run in ("one", "two"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    remarks = [line for line in said.splitlines() if line.startswith("captions:")]
    assert remarks == [line for line in capsys.readouterr().out.splitlines() if line.startswith("captions:")]


def test_the_hashes_are_the_familys_own_and_any_change_of_a_file_is_seen(folder, tmp_path):
    family = models.load(Model(path=str(folder)), "no", 16)
    family.load_encoders()
    own = family.text_hash(), family.vae_hash()
    assert hashes(first := lazy(folder, tmp_path)) == own and first.loaded
    assert hashes(again := lazy(folder, tmp_path)) == own and not again.loaded
    for part, file in (("text_encoder_2", "model.safetensors"), ("vae", "diffusion_pytorch_model.safetensors")):
        negate(folder / part / file)
        text, vae = hashes(other := lazy(folder, tmp_path))
        assert other.loaded and (text == own[0], vae == own[1]) == (part == "vae", part != "vae")
        negate(folder / part / file)
        assert hashes(lazy(folder, tmp_path)) == own


def test_files_of_this_moment_and_another_vae_and_a_damaged_record(folder, tmp_path, monkeypatch):
    own = hashes(lazy(folder, tmp_path))
    shutil.copytree(folder / "vae", tmp_path / "vae")
    negate(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    text, vae = hashes(lazy(folder, tmp_path, vae=str(tmp_path / "vae")))
    assert text == own[0] and vae != own[1]
    (record,) = (path for path in tmp_path.glob("encoders-*.json") if own[1] in path.read_text())
    for damage in (b"", b"[1]", record.read_bytes().replace(b"made_from", b"made from"), b"\xff\xfe"):
        record.write_bytes(damage)
        assert hashes(lazy(folder, tmp_path)) == own
    monkeypatch.setattr(lazy_encoders, "SETTLED", 2.0)
    record.unlink()
    os.utime(folder / "model_index.json", (time.time(), time.time()))
    for _ in range(2):
        assert hashes(young := lazy(folder, tmp_path)) == own and young.loaded
    assert not record.exists()


def test_the_vae_stays_where_it_is_needed_and_its_scale_where_not(folder, tmp_path):
    for keep in (False, True, False):
        encoders = lazy(folder, tmp_path)
        hashes(encoders)
        encoders.free(keep_vae=keep)
        scaled = encoders.scale_latents(torch.ones(1, 4, 2, 2))
        assert torch.allclose(scaled, torch.full_like(scaled, encoders.family.vae_config["scaling_factor"]))
        if keep:
            assert encoders.family.decode(scaled).shape == (1, 3, 4, 4) and encoders.family.pipe.text_encoder is None
    assert not encoders.loaded
