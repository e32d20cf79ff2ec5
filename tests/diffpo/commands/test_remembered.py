"""What `diffpo check` says of the model again without examining it: the same, and only while nothing has changed."""

import json
import os
import shutil

import pytest
from tiny import pick_a_pic_rows, write_parquet

from diffpo.commands import check as module
from diffpo.commands.check import check
from diffpo.common.errors import DiffpoError


@pytest.fixture
def examined(monkeypatch):
    """The calls of `examine`."""
    calls, examine = [], module.examine

    def counted(*args):
        calls.append(args)
        return examine(*args)

    monkeypatch.setattr(module, "examine", counted)
    return calls


@pytest.fixture
def model(tiny_sd, tmp_path):
    """A copy, whose files a test may change."""
    return shutil.copytree(tiny_sd, tmp_path / "model")


def test_the_second_check_says_the_same_without_the_model(model, make_config, tmp_path, examined, capsys):
    own = f"data.cache={tmp_path / 'cache'}"
    check(make_config(model, own))
    first = capsys.readouterr().out
    check(make_config(model, own))
    assert capsys.readouterr().out == first and len(examined) == 1
    assert "parameters" in first and "training can start" in first
    # the data are read anew: a label that changes nothing of the model is counted all the same
    rows = write_parquet(tmp_path / "more.parquet", pick_a_pic_rows(12, ties=4))
    check(make_config(model, own, data=rows))
    assert "ties        4" in capsys.readouterr().out


def test_whatever_it_follows_from_is_examined_anew(model, make_config, tmp_path, examined, monkeypatch):
    own = f"data.cache={tmp_path / 'cache'}"
    check(make_config(model, own))
    for changed in (["lora.rank=8"], ["train.batch_size=2"], ["train.gradient_checkpointing=true"]):
        check(make_config(model, own, *changed))
    assert len(examined) == 4
    check(make_config(model, own), vram=8)
    assert len(examined) == 5
    config = model / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"note": 1}))
    check(make_config(model, own))
    assert len(examined) == 6
    os.utime(config, ns=(1, 1))  # a file of the same size from another time
    check(make_config(model, own))
    assert len(examined) == 7
    monkeypatch.setattr(module.remembered, "_version", lambda name: "another")
    check(make_config(model, own))
    assert len(examined) == 8
    for _ in range(2):  # all of these are kept
        check(make_config(model, own))
    assert len(examined) == 8


def test_problems_and_folders_are_found_each_time(model, make_config, tmp_path, examined):
    own = f"data.cache={tmp_path / 'cache'}"
    for count in (1, 2):
        with pytest.raises(DiffpoError, match="fp16"):
            check(make_config(model, own, "train.precision=fp16"))
        assert len(examined) == count
    check(make_config(model, own))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("not a run")
    with pytest.raises(DiffpoError, match=r"thesis\.txt"):
        check(make_config(model, own))
    assert len(examined) == 3


def test_a_damaged_file_is_examined_anew(model, make_config, tmp_path, examined, capsys):
    own = f"data.cache={tmp_path / 'cache'}"
    check(make_config(model, own))
    first = capsys.readouterr().out
    (kept,) = (tmp_path / "cache").glob("check-*.json")
    for damaged in (b"[1, 2]", b"{", b'{"a": 1}'):
        kept.write_bytes(damaged)
        check(make_config(model, own))
        assert capsys.readouterr().out == first
    assert len(examined) == 4
