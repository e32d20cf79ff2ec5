"""The bench of the methods: results belong to their content, the tuned setting is the best that was tried, and data of
every regime are what they are called."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from objective_bench import chart, data, job, report, results, store, tune
from objective_bench.methods import METHODS, named
from objective_bench.recipes import KNOBS, RECIPES
from PIL import Image

from diffpo.shapes import score

WINS = [[0.5, 0.45, 0.55], [0.7, 0.6, 0.8]]
SETTING = job.Setting(Path("here"), budget=100, n=4, n_curve=2)
DPO = named("diffusion_dpo", METHODS)


def test_key_depends_on_content_alone():
    key = store.key(DPO, 0, SETTING)
    assert store.key(replace(DPO, name="renamed", note="new"), 0, replace(SETTING, folder=Path("elsewhere"))) == key
    others = {
        "seed": (DPO, 1, SETTING),
        "budget": (DPO, 0, replace(SETTING, budget=101)),
        "prompts": (DPO, 0, replace(SETTING, n=5)),
        "regime": (DPO, 0, replace(SETTING, regime="real")),
        "model": (DPO, 0, replace(SETTING, model="tiny-dit")),
        "preset": (replace(DPO, preset="cdpo"), 0, SETTING),
        "override": (replace(DPO, overrides=(*DPO.overrides, "train.lr=1e-3")), 0, SETTING),
        "data": (replace(DPO, overrides=(*DPO.overrides, "data.train=$DATA/flipped-20.parquet")), 0, SETTING),
        "updates": (replace(DPO, updates=7), 0, SETTING),
        "second stage": (replace(DPO, then=DPO), 0, SETTING),
        "another second stage": (replace(DPO, then=replace(DPO, preset="cdpo")), 0, SETTING),
    }
    keys = {name: store.key(*content) for name, content in others.items()}
    assert len({key, *keys.values()}) == 1 + len(keys), keys


def test_stages_share_the_budget():
    then = replace(DPO, preset="cdpo")
    (first, own), (second, rest) = job.stages(replace(DPO, then=then), SETTING)
    assert (first, second) == (DPO, then) and own == rest == replace(SETTING, budget=50)
    assert job.stages(DPO, SETTING) == [(DPO, SETTING)]


def test_measurement_of_weights_is_paid_once(tmp_path, monkeypatch):
    """256 pairs are measured before the first update, 512 calls. An update of 16 pairs: 64 forward, 32 backward."""

    def logged(config):
        (tmp_path / "run").mkdir()
        before = 512 * (config.objective.weighting == "measured")
        return [{"calls/forward": before + 64 * i, "calls/backward": 32 * i} for i in range(1, config.train.steps + 1)]

    monkeypatch.setattr(job, "logged", logged)
    setting = replace(SETTING, folder=tmp_path, budget=12_800)
    weighted = replace(DPO, overrides=(*DPO.overrides, "objective.weighting=measured"))
    assert job.affordable(DPO, setting, tmp_path / "run") == 12_800 // 128
    assert job.affordable(weighted, setting, tmp_path / "run") == (12_800 - 512) // 128


def test_a_win_rate_is_the_newest_and_spans_the_intervals_of_the_seeds():
    earlier = results.Earlier({"spo": {"total": [0.6, 0.5, 0.7]}, "inpo": {"total": [0.4, 0.3, 0.5]}}, {}, {})
    runs = [{"curve": [{"total": {"win": [0.1, 0.0, 0.2]}}, {"total": {"win": win}}]} for win in WINS]
    assert report.win("spo", "total", {"spo": runs}, earlier) == pytest.approx((0.6, 0.45, 0.8))
    assert report.win("inpo", "total", {"spo": runs}, earlier) == (0.4, 0.3, 0.5)


def test_picture_has_a_row_for_each_method(tmp_path):
    """Rows are equally high, so the height is affine in their number."""
    heights = {}
    for count in (2, 4, 8):
        lines = [chart.Line(f"method_{i}", dict.fromkeys(report.SCORES, (0.5, 0.4, 0.6))) for i in range(count)]
        chart.methods(lines, tmp_path / "chart.png")
        heights[count] = Image.open(tmp_path / "chart.png").height
    assert heights[8] - heights[4] == pytest.approx(2 * (heights[4] - heights[2]), abs=2)


def test_key_has_no_place_of_this_machine():
    """A scorer that the bench trained itself stands in its folder, which may be anywhere."""
    trained = named("spo_trained", METHODS)
    assert store.key(trained, 0, SETTING) == store.key(trained, 0, replace(SETTING, folder=Path("/other/place")))


def test_results_are_read_as_they_were_written_and_only_if_they_belong_to_the_job(tmp_path):
    total = np.array([0.0, 0.123456, 0.75, 1.0])
    result = {"method": DPO.name, "key": store.key(DPO, 0, SETTING), "win": [1 / 3, 0.25], "steps": 100, "total": total}
    path = store.file(DPO.name, 0, SETTING, tmp_path)
    store.keep(result, path)
    found = store.kept(DPO, 0, SETTING, tmp_path)
    assert found["win"] == [0.3333, 0.25] and found["steps"] == 100
    np.testing.assert_allclose(found["total"], total, atol=0.5 / store.LEVELS)
    assert store.kept(DPO, 0, replace(SETTING, budget=200), tmp_path) is None  # the file is there, of another content
    assert store.kept(DPO, 1, SETTING, tmp_path) is None


def test_file_of_512_prompts_is_small():
    assert len(store.packed(np.linspace(0, 1, 512))) < 1400


def tried(settings, win, **own):
    line = {"method": "spo", "regime": "own", "model": "tiny-sdxl", "seed": store.TUNING}
    return {**line, "settings": settings, "win": [win, 0, 1], **own}


def test_chosen_setting_is_the_best_of_its_method_and_data():
    lines = [
        tried(["lr=1"], 0.5),
        tried(["lr=2"], 0.6),
        tried(["lr=3"], 0.6),
        tried(["lr=4"], 0.9, regime="real"),
        tried(["lr=5"], 0.9, method="inpo"),
        tried(["lr=6"], 0.9, model="tiny-dit"),
        tried(["lr=7"], 0.9, seed=0),  # a seed of the comparison chooses nothing
    ]
    assert store.chosen("spo", "own", "tiny-sdxl", lines) == ("lr=2",)
    assert store.chosen("spo", "others", "tiny-sdxl", lines) is None


@pytest.mark.parametrize("preset", KNOBS)
def test_grid_has_eight_different_trials(preset):
    recipe = next(one for one in RECIPES if one.preset == preset)
    tasks = tune.grid(recipe, SETTING)
    keys = {store.key(tried, seed, setting) for tried, seed, setting, _ in tasks}  # reads each config
    assert len(tasks) == len({tried.name for tried, *_ in tasks}) == len(keys) == 8
    assert {seed for _, seed, _, _ in tasks} == {store.TUNING}
    assert all(tried.overrides[: recipe.common] == recipe.overrides[: recipe.common] for tried, *_ in tasks)


def picture(content):
    return Image.open(io.BytesIO(content)).convert("RGB")


def test_real_pairs_are_rendered_scenes_and_the_worse_picture_of_a_pair():
    rows, again = data.real(captions=3), data.real(captions=3)
    assert [row["jpg_0"] for row in rows] == [row["jpg_0"] for row in again] and len(rows) == 12
    assert len({row["jpg_0"] for row in rows}) == 12
    for row in rows:
        totals = [score(picture(row[f"jpg_{i}"]), row["caption"])["total"] for i in range(2)]
        assert totals == pytest.approx([row["score_0"], row["score_1"]], abs=1e-6)
        assert score(picture(row["jpg_0"]), row["caption"])["following"] > 0.99


def test_other_models_draw_two_pictures_of_a_caption_each():
    rows = data.others(captions=2, models=data.OTHERS[2:])  # the distilled one and the transformer
    assert len(rows) == 4 and len({row[f"jpg_{i}"] for row in rows for i in range(2)}) == 8
    for own in (rows[:2], rows[2:]):
        better, worse = [row["score_0"] for row in own], [row["score_1"] for row in own]
        assert better == sorted(better, reverse=True) and worse == sorted(worse) and better[-1] >= worse[-1]
        assert all(row["label_0"] == (0.5 if row["score_0"] - row["score_1"] < data.TIE else 1) for row in own)
    row = rows[0]
    assert score(picture(row["jpg_1"]), row["caption"])["total"] == pytest.approx(row["score_1"], abs=1e-6)
