import contextlib
import re
import signal
import subprocess
import sys

import pytest
from tiny import pick_a_pic_rows, write_parquet

from diffpo import cli
from diffpo.commands.check import check
from diffpo.common.errors import DiffpoError


def call(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["diffpo", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def test_help_and_check_of_data_do_not_import_torch(pairs_parquet):
    code = f"""
import sys
import diffpo.cli, diffpo.commands.check
from diffpo.config import Data
from diffpo.data.groups import scan
source = {str(pairs_parquet)!r}
assert len(scan(Data(train=source, resolution=16), source, "train")) == 10
print([name for name in ("torch", "diffusers", "transformers", "peft") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_names_the_verbs(monkeypatch, capsys):
    assert call(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    assert "train" in out and "check" in out


def test_errors_are_one_message_and_status_2(monkeypatch, capsys, tmp_path):
    assert call(monkeypatch, "train", tmp_path / "nowhere.yaml") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and "nowhere.yaml" in captured.err and "Traceback" not in captured.err
    assert len(captured.err.strip().splitlines()) == 1


def test_an_interruption_has_its_own_status(monkeypatch, capsys, tiny_sd, make_config, tmp_path):
    from diffpo.train import loop
    from diffpo.train.run import Interrupted

    def interrupted(config):
        raise Interrupted("interrupted: step 3 is saved")

    monkeypatch.setattr(loop, "train", interrupted)
    make_config(tiny_sd)
    assert call(monkeypatch, "train", tmp_path / "recipe.yaml") == 130
    assert capsys.readouterr().err == "interrupted: step 3 is saved\n"


def test_check_tells_what_it_found(tiny_sdxl, make_config, tmp_path, capsys):
    rows = pick_a_pic_rows(9, ties=2)
    rows[0]["caption"] = ""
    rows[1] |= {name: pick_a_pic_rows(1, size=(12, 20))[0][name] for name in ("jpg_0", "jpg_1")}
    data = write_parquet(tmp_path / "a.parquet", rows)
    options = ("data.bad_rows=skip", "train.accumulation=3", "train.steps=7", "train.precision=bf16")
    check(make_config(tiny_sdxl, *options, data=data))
    lines = capsys.readouterr().out.split("\n")
    for numbers in (
        r"accumulation: 3",  # the config as it is
        r"\b6 .*\b3 ",  # pairs and captions
        r"\b2\b.*left out",  # ties
        r"\b1 of 9\b.*\brow 0\b",  # what cannot be used, and where the first is
        r"16x16 +5\b",  # sizes
        r"12x20 +1\b",
        r"\b7 .*\b12 .*\b4 .*\b3\b",  # updates of 4 pairs at a time, 3 times
        r"\b14 times",  # that each pair is seen
        r"\b12 images.*16 px",  # to be cached
        r"4,608 trainable.*rank 4",
        r"bfloat16",
        r"memory",
    ):
        assert any(re.search(numbers, line) for line in lines), numbers


def test_check_prints_everything_and_then_fails_on_what_would_stop_training(tiny_sd, make_config, tmp_path, capsys):
    rows = pick_a_pic_rows(3)
    rows[1]["jpg_0"] = b"x"
    with pytest.raises(DiffpoError, match=r"a\.parquet: 1 of 3 rows"):
        check(make_config(tiny_sd, data=write_parquet(tmp_path / "a.parquet", rows)))
    assert "memory    roughly" in capsys.readouterr().out
    with pytest.raises(DiffpoError, match=r"b.parquet: all 2 usable pairs are ties"):
        check(make_config(tiny_sd, data=write_parquet(tmp_path / "b.parquet", pick_a_pic_rows(2, ties=2))))


def test_gradient_checkpointing_lowers_the_estimate(tiny_sdxl):
    from diffpo import models
    from diffpo.commands.footprint import activations
    from diffpo.config import Model, Train

    family = models.load(Model(path=str(tiny_sdxl)))
    kept = [
        activations(family, family.meta_network(), 2, 16, Train(steps=1, batch_size=1, lr=1, gradient_checkpointing=on))
        for on in (False, True)
    ]
    assert kept[1] < kept[0]
    assert activations(family, family.meta_network(), 4, 16, Train(steps=1, batch_size=1, lr=1)) == 2 * kept[0]


def test_check_does_not_promise_what_train_would_refuse(tiny_sd, make_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    with pytest.raises(DiffpoError, match=r"(?s)train\.optimizer.*torch\.optim\.Adamm.*notes\.txt"):
        check(make_config(tiny_sd, "train.optimizer=torch.optim.Adamm"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_ctrl_c_outside_the_training_loop_says_how_to_go_on(monkeypatch, capsys, tiny_sd, make_config, tmp_path):
    from diffpo.train import loop

    def pressed(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", pressed)
    make_config(tiny_sd)
    assert call(monkeypatch, "train", tmp_path / "recipe.yaml") == 130
    assert capsys.readouterr().err == cli.INTERRUPTED + "\n"


@pytest.mark.parametrize("error", [ImportError("numpy failed to import"), DiffpoError("cannot read"), SystemError("?")])
def test_ctrl_c_that_a_library_turned_into_another_error(monkeypatch, capsys, tiny_sd, make_config, tmp_path, error):
    """As C code does that is being imported."""
    from diffpo.train import loop

    def pressed(config):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise error from None

    monkeypatch.setattr(loop, "train", pressed)
    make_config(tiny_sd)
    before = signal.getsignal(signal.SIGINT)
    assert call(monkeypatch, "train", tmp_path / "recipe.yaml") == 130
    assert capsys.readouterr().err == cli.INTERRUPTED + "\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_other_errors_are_raised_and_a_run_that_ended_well_has_ended_well(monkeypatch, tiny_sd, make_config, tmp_path):
    from diffpo.train import loop

    def broken(config):
        raise ZeroDivisionError

    def swallowed(config):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    make_config(tiny_sd)
    monkeypatch.setattr(loop, "train", broken)
    monkeypatch.setattr(sys, "argv", ["diffpo", "train", str(tmp_path / "recipe.yaml")])
    with pytest.raises(ZeroDivisionError):
        cli.main()
    monkeypatch.setattr(loop, "train", swallowed)
    assert call(monkeypatch, "train", tmp_path / "recipe.yaml") == 0


def test_a_full_accelerator_is_one_message(monkeypatch, capsys, tiny_sd, make_config, tmp_path):
    import torch

    from diffpo.train import loop

    def full(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")

    monkeypatch.setattr(loop, "train", full)
    make_config(tiny_sd)
    assert call(monkeypatch, "train", tmp_path / "recipe.yaml") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and len(err.strip().splitlines()) == 1
    assert "CUDA out of memory" in err and "train.batch_size" in err and "--batch-size" in err
