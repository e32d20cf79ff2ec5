"""Trackers of other programs get the settings, the metrics and the pictures, and cannot stop a run.

Those that are installed are run without a network and read back from their files. The others are skipped; what is
sent to them is checked on a stand-in for accelerate's class.
"""

import json
from typing import ClassVar

import pytest
import trackings
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image
from safetensors.torch import load_file
from tiny import metrics_of
from torch import equal

from diffpo.common.errors import DiffpoError
from diffpo.train import outside
from diffpo.train.loop import train
from diffpo.train.outside import AGAIN, Line, Outside

CLOCK = ("time", "pairs_per_second")
PICTURES = [Image.new("RGB", (16, 16), color) for color in ("red", "green", "blue")]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working directory where trackers keep their files, and no network."""
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "SWANLAB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def sent(step):
    return dict(zip(("loss", "rewards/margins"), trackings.VALUES[step - 1], strict=True)) | {"nan": float("nan")}


def save_pictures(config, step):
    folder = config.output / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    for k, picture in enumerate(PICTURES):
        picture.save(folder / f"{step:06d}_{k:05d}.png")


@pytest.mark.parametrize("name", trackings.READ)
def test_a_tracker_keeps_what_a_resumed_run_sends(name, home, tiny_sd, make_config):
    pytest.importorskip(name)
    config = make_config(tiny_sd, f"log.trackers=[{name}]", f"output={home / 'mine'}", "lora.rank=8")
    config.output.mkdir()
    save_pictures(config, 2)
    first = Outside(config, Accelerator(cpu=True), 0)
    for step in (1, 2, 3):
        first.log(step, sent(step))
    first.show(2, PICTURES)
    first.close()
    again = Outside(config, Accelerator(cpu=True), 3)
    again.log(4, sent(4))
    again.close()
    metrics, rank, pictures = trackings.READ[name](config.output, home)
    for column, key in enumerate(("loss", "rewards/margins")):
        wanted = {step: values[column] for step, values in enumerate(trackings.VALUES, 1)}
        assert metrics[key] == pytest.approx(wanted, rel=1e-6), key
    assert int(rank) == 8 and pictures == len(PICTURES)


class Wandb(GeneralTracker):
    """Stands for accelerate's."""

    name, requires_logging_directory, tracker = "wandb", False, type("Run", (), {"id": "abc"})
    calls: ClassVar[list] = []

    def __init__(self, run_name, **options):
        super().__init__()
        self.calls.append(("started", (run_name, options)))

    def store_init_configuration(self, values):
        self.calls.append(("config", values))

    def log(self, values, step=None, **options):
        self.calls.append((step, values))

    def log_images(self, values, step=None, **options):
        self.calls.append((f"images {step}", values))

    def finish(self):
        self.calls.append(("finished", {}))


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Wandb)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType.WANDB])
    monkeypatch.setattr(Wandb, "calls", calls := [])
    return calls


@pytest.fixture
def watched(tmp_path):
    """Settings of pictures while training."""
    path = tmp_path / "held out.txt"
    path.write_text("red cat\nblue dog\na bird\n")
    return (f"log.samples.prompts={path}", "log.samples.every=2", "log.samples.steps=3", "log.samples.guidance=2")


def test_a_run_sends_its_settings_metrics_and_pictures(tiny_sdxl, make_config, watched, wandb):
    config = make_config(tiny_sdxl, *watched, "train.steps=2", "log.trackers=[wandb]")
    train(config)
    found, run = dict(wandb), config.output.name
    assert found["started"] == ("diffpo", {"name": run}) and found["config"]["lora.rank"] == 4
    row = metrics_of(config.output)[1]
    assert found[2] == {name: value for name, value in row.items() if name not in ("step", "time")}
    assert len(found["images 2"]["samples"]) == 3 and "finished" in found
    wandb.clear()
    train(make_config(tiny_sdxl, *watched, "train.steps=3", "log.trackers=[wandb]"))  # goes on with the same run
    found = dict(wandb)
    assert found["started"] == ("diffpo", {"name": run, "id": "abc", "resume": "allow"}) and {1, 2}.isdisjoint(found)


def test_a_tracker_that_fails_does_not_stop_or_change_a_run(
    tiny_sdxl, make_config, wandb, monkeypatch, tmp_path, capsys
):
    plain = make_config(tiny_sdxl, "train.steps=3", f"output={tmp_path / 'plain'}")
    weights = load_file(train(plain))

    def fail(self, *_, **__):
        raise ConnectionError("the network is down")

    for name in ("log", "log_images", "finish"):
        monkeypatch.setattr(Wandb, name, fail)
    config = make_config(tiny_sdxl, "train.steps=3", "log.trackers=[wandb]")
    found = load_file(train(config))
    assert all(equal(found[name], value) for name, value in weights.items())
    rows = [[{k: v for k, v in row.items() if k not in CLOCK} for row in metrics_of(c.output)] for c in (plain, config)]
    assert rows[0] == rows[1]
    said = capsys.readouterr().out
    assert said.count("wandb failed") == 1 and "3 records did not reach wandb" in said


class Flaky:
    """A tracker whose network is down while ``down``."""

    down = False

    def __init__(self):
        self.got, self.tries = [], 0

    def log(self, values, step):
        self.tries += 1
        if self.down:
            raise ConnectionError("down")
        self.got.append((step, values["loss"]))

    def close(self):
        self.got.append("closed")


def test_what_failed_is_sent_later_in_order_and_once(capsys):
    now, receiver = [0.0], Flaky()
    line = Line("wandb", receiver, lambda: now[0])

    def send(step):
        line.send(step, lambda to: to.log({"loss": 1 / step}, step))

    send(1)
    receiver.down = True
    for step in (2, 3, 4):
        send(step)
    assert receiver.tries == 2  # the others wait: a tracker that is down is not asked at every update
    receiver.down, now[0] = False, AGAIN + 1
    send(5)
    line.close()
    assert receiver.got == [*((step, 1 / step) for step in (1, 2, 3, 4, 5)), "closed"]
    assert capsys.readouterr().out.count("failed") == 1


def test_only_so_much_is_kept(monkeypatch, capsys):
    monkeypatch.setattr(outside, "KEPT", 3)
    receiver = Flaky()
    receiver.down = True
    line = Line("wandb", receiver, lambda: 0.0)
    for step in range(1, 6):
        line.send(step, lambda to, step=step: to.log({"loss": step}, step))
    receiver.down = False
    line.close()
    assert [step for step, _ in receiver.got[:-1]] == [3, 4, 5]
    assert "2 records did not reach" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["a tracker", "check"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_loaded(kind, tiny_sdxl, make_config, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    config = make_config(tiny_sdxl, "log.trackers=[swanlab]")
    if kind == "check":
        assert any("diffpo[swanlab]" in problem for problem in outside.missing(config))
        return
    monkeypatch.setattr("diffpo.train.loop.make_learner", lambda run: pytest.fail("it was loaded"))
    with pytest.raises(DiffpoError, match=r"diffpo\[swanlab\]"):
        train(config)


def test_an_unknown_tracker_is_an_error_of_the_config(tiny_sdxl, make_config):
    with pytest.raises(DiffpoError, match=r"log\.trackers.*wandb"):
        make_config(tiny_sdxl, "log.trackers=[wandbb]")


def test_a_tracker_that_does_not_start_is_named(tiny_sdxl, make_config, wandb, monkeypatch):
    def fail(self, run_name, **options):
        raise RuntimeError("api_key not configured")

    monkeypatch.setattr(Wandb, "__init__", fail)
    with pytest.raises(DiffpoError, match=r"wandb.*api_key"):
        train(make_config(tiny_sdxl, "log.trackers=[wandb]"))


@pytest.mark.parametrize("content", ["", "[]", '{"wandb": 3}', "nonsense"])
def test_a_damaged_record_of_the_trackers_starts_a_new_run(content, tiny_sdxl, make_config, wandb):
    config = make_config(tiny_sdxl, "log.trackers=[wandb]")
    config.output.mkdir(parents=True)
    (config.output / "trackers.json").write_text(content)
    Outside(config, Accelerator(cpu=True), 5).close()
    assert dict(wandb)["started"][1] == {"name": config.output.name}
    assert json.loads((config.output / "trackers.json").read_text()) == {"wandb": "abc"}


def test_both_names_of_tensorboard_are_one(tiny_sdxl, make_config):
    both = make_config(tiny_sdxl, "log.tensorboard=true", "log.trackers=[tensorboard]")
    assert outside.names(both) == ["tensorboard"]
    assert LoggerType.TENSORBOARD in get_available_trackers()
