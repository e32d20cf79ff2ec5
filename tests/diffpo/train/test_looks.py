"""Pictures while training and the rule that stops by them."""

import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import metrics_of

from diffpo.common.errors import DiffpoError
from diffpo.config import StopSettings
from diffpo.evaluation import generate
from diffpo.evaluation.generation import Generation
from diffpo.train import metrics as track
from diffpo.train.loop import train
from diffpo.train.run import Interrupted
from diffpo.train.samples import Look
from diffpo.train.stop import StopRule

CLOCK = ("time", "pairs_per_second")


@pytest.fixture
def options(tmp_path):
    path = tmp_path / "held out.txt"
    path.write_text("red cat\nblue dog\na bird\n")
    return (
        f"log.samples.prompts={path}",
        "log.samples.every=2",
        "log.samples.steps=3",
        "log.samples.guidance=2",
        "log.samples.scorers=[on_policy:Redness]",
    )


def without_clock(rows):
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


def test_samples_are_those_of_diffpo_generate_and_change_nothing_else(tiny_sdxl, make_config, options, tmp_path):
    plain = load_file(train(make_config(tiny_sdxl, f"output={tmp_path / 'plain'}")))
    config = make_config(tiny_sdxl, *options, "train.steps=3")
    train(config)
    names = sorted(path.name for path in (config.output / "samples").iterdir())
    assert names == [f"{step:06d}_{index:05d}.png" for step in (0, 2, 3) for index in range(3)]
    model = Generation(str(tiny_sdxl), steps=3, guidance=2, height=16, width=16, device="cpu")
    pipe = generate.load(model)
    wanted = generate.paint(pipe, model, [generate.Picture(1, 0, "blue dog")])[0]
    saved = np.asarray(Image.open(config.output / "samples" / "000000_00001.png"), int)
    assert np.abs(saved - np.asarray(wanted, int)).max() <= 1
    rows = metrics_of(config.output)
    assert [("samples/redness" in row) for row in rows] == [False, True, True]
    red = [
        np.asarray(Image.open(config.output / "samples" / f"000002_0000{i}.png"))[..., 0].mean() / 255
        for i in (0, 1, 2)
    ]
    assert rows[1]["samples/redness"] == pytest.approx(np.mean(red))
    assert {"samples/redness/base", "samples/redness/win_rate", "samples/sharpness"} <= rows[1].keys()
    assert rows[1]["calls/forward"] == 2 * rows[0]["calls/forward"]  # sampling is not training
    config = make_config(tiny_sdxl, *options)  # one step more
    weights = load_file(train(config))
    assert all(torch.equal(weights[name], value) for name, value in plain.items())


def test_resumed_looks_equal_straight_ones(tiny_sdxl, make_config, options, tmp_path, monkeypatch):
    more = (*options, "train.stop_when.train_scorer=redness", "train.stop_when.patience=9", "log.samples.every=1")
    straight = make_config(tiny_sdxl, *more, f"output={tmp_path / 'straight'}")
    train(straight)
    log = track.Tracker.log

    def interrupt(self, step, metrics):
        log(self, step, metrics)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(track.Tracker, "log", interrupt)
    config = make_config(tiny_sdxl, *more)
    with pytest.raises(Interrupted):
        train(config)
    monkeypatch.undo()
    train(config)
    assert without_clock(metrics_of(config.output)) == without_clock(metrics_of(straight.output))


def test_a_scorer_that_fails_leaves_a_gap_and_training_goes_on(tiny_sdxl, make_config, options, monkeypatch, capsys):
    import on_policy

    def fail(self, images, prompts):
        raise DiffpoError("the server is gone")

    monkeypatch.setattr(on_policy.Redness, "score", fail)
    config = make_config(tiny_sdxl, *options, "train.steps=2", "train.stop_when.train_scorer=redness")
    train(config)
    assert "server is gone" in capsys.readouterr().out
    row = metrics_of(config.output)[-1]
    assert "samples/redness" not in row and "samples/contrast" in row


def test_a_stopped_run_writes_its_best_look_and_stays_stopped(tiny_sdxl, make_config, options, monkeypatch, capsys):
    def judge(self, look):
        if look.step == 2:
            self.best = look
        elif look.step == 3:
            self.stopped = "It is a hack."
        return look.step == 2

    monkeypatch.setattr(StopRule, "judge", judge)
    rule = ("train.stop_when.train_scorer=redness", "log.samples.every=1", "train.checkpoint_keep=9")
    config = make_config(tiny_sdxl, *options, *rule, "train.steps=9")
    weights = load_file(train(config))
    said = capsys.readouterr().out
    assert "It is a hack." in said and "step 2" in said
    assert len(metrics_of(config.output)) == 3 and (config.output / "checkpoint-000003").is_dir()
    kept = load_file(config.output / "checkpoint-000002" / "pytorch_lora_weights.safetensors")
    assert weights.keys() == kept.keys() and all(torch.equal(weights[name], kept[name]) for name in kept)
    again = load_file(train(config))
    assert len(metrics_of(config.output)) == 3 and all(torch.equal(again[name], kept[name]) for name in kept)
    goes_on = make_config(tiny_sdxl, *options, "log.samples.every=1", "train.steps=4")
    train(goes_on)
    assert len(metrics_of(config.output)) == 4


def test_a_run_that_ended_before_its_first_checkpoint_may_start_again(tiny_sdxl, make_config, options):
    config = make_config(tiny_sdxl, *options, "train.steps=1")
    for name in ("samples", "best"):
        (config.output / name).mkdir(parents=True)
    (config.output / "config.yaml").write_text(config.to_yaml())
    train(config)
    assert len(metrics_of(config.output)) == 1


def test_no_gain_ends_a_run_of_a_few_prompts(tiny_sdxl, make_config, options):
    rule = ("train.stop_when.train_scorer=redness", "train.stop_when.patience=2", "log.samples.every=1")
    config = make_config(tiny_sdxl, *options, *rule, "train.steps=8")
    train(config)
    assert len(metrics_of(config.output)) == 2


class Measures:
    """Stands for `Samples`: its names and the first look."""

    names = ("pick", "clip")

    def __init__(self, base):
        self.base = base


def look(step, pick, clip, seed=0, n=80):
    rng = np.random.default_rng(seed)
    scores = {"pick": rng.normal(pick, 1, n), "clip": rng.normal(clip, 1, n)}
    return Look(step, scores, {"contrast": rng.normal(0.3, 0.1, n)}, rng.random((n, 12), np.float32))


def rule(patience=2, planned=5):
    settings = StopSettings(train_scorer="pick", patience=patience)
    return StopRule(settings, "pick", Measures(look(0, 0, 0)), planned)


def test_the_rule_stops_when_an_unseen_score_falls_while_the_trained_one_rises():
    judged = rule()
    assert judged.judge(look(1, 2, 1, seed=1)) and not judged.stopped and judged.best.step == 1
    assert not judged.judge(look(2, 3, -1.5, seed=2)) and judged.best.step == 1
    assert "step 2" in judged.stopped and "clip" in judged.stopped


def test_the_rule_stops_after_as_many_looks_without_gain_as_its_patience():
    judged = rule()
    steps = [(1, 1.5), (2, 1.5), (3, 3.0), (4, 3.0), (5, 3.0)]
    better = [judged.judge(look(step, clip, clip, seed=step)) for step, clip in steps]
    assert better == [True, False, True, False, False] and "step 3" in judged.stopped


def test_the_state_of_a_rule_survives_a_checkpoint(tmp_path):
    judged, again = rule(), rule()
    judged.judge(look(1, 2, 2, seed=1))
    judged.judge(look(2, 2, 2, seed=2))
    torch.save(judged.state(), tmp_path / "state")
    again.load(torch.load(tmp_path / "state", weights_only=True))
    assert again.best.step == 1 and not again.judge(look(3, 2, 2, seed=3)) and again.stopped


def test_more_planned_looks_make_each_stricter():
    shown = [planned for planned in (1, 400) if rule(planned=planned).judge(look(1, 0.45, 0.45, seed=3))]
    assert shown == [1]


def test_a_rule_needs_pictures_and_the_trained_score(tiny_sdxl, make_config, options):
    with pytest.raises(DiffpoError, match=r"log\.samples"):
        make_config(tiny_sdxl, "train.stop_when.train_scorer=redness")
    with pytest.raises(DiffpoError, match="train_scorer"):
        make_config(tiny_sdxl, *options, "train.stop_when.patience=1")
    with pytest.raises(DiffpoError, match="rednes"):
        train(make_config(tiny_sdxl, *options, "train.stop_when.train_scorer=rednes"))
