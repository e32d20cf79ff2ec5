"""Denoising paths: x_0 at every call, checked where its value is known, and resumed like the pictures."""

from pathlib import Path

import numpy as np
import pytest
from on_policy import Brightness
from PIL import Image

from diffpo.common.errors import DiffpoError
from diffpo.evaluation import arms, evaluate, generate, paths, report_pictures, scoring
from diffpo.evaluation.generation import Generation

DIT = Path(__file__).parents[3] / "assets" / "tiny-dit"
PROMPTS = [
    "a red circle on a white background",
    "a blue square on a white background",
    "two green circles on a gray background",
]


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.fixture(params=["epsilon", "v_prediction", "flow"])
def model(request, tiny_sd, tiny_sd_v):
    return {"epsilon": tiny_sd, "v_prediction": tiny_sd_v, "flow": DIT}[request.param]


@pytest.mark.parametrize("steps", [1, 3])
def test_the_last_x_0_of_ddim_is_the_picture(model, tmp_path, steps):
    """DDIM's last step goes to sigma = 0, where the state is x_0. Batches, guidance and the other pictures do not
    matter, and only the first prompts have a path, with their first seed."""
    how = Generation(model, steps=steps, solver="ddim", guidance=3.0, images_per_prompt=2, batch_size=3, paths=2)
    rows = generate.run({"base": how}, PROMPTS, tmp_path)
    for row in rows:
        found = paths.beside(tmp_path / row["file"])
        assert len(found) == (steps if row["index"] < 2 and row["seed"] == 0 else 0)
        if found:
            assert np.abs(pixels(found[-1]) - pixels(tmp_path / row["file"])).max() <= 1
            assert steps == 1 or np.abs(pixels(found[0]) - pixels(found[-1])).max() > 1
    assert not np.array_equal(pixels(paths.beside(tmp_path / rows[0]["file"])[-1]), pixels(tmp_path / rows[2]["file"]))


def test_paths_leave_the_pictures_as_they_are_and_are_resumed(tiny_sd, tmp_path):
    def run(**options):
        how = Generation(tiny_sd, steps=3, guidance=3.0, **options)
        return generate.run({"base": how}, PROMPTS, tmp_path)

    before = run()
    written = (tmp_path / before[0]["file"]).stat().st_mtime_ns
    assert run(paths=1) == before and not paths.beside(tmp_path / before[1]["file"])
    found = paths.beside(tmp_path / before[0]["file"])
    kept = [path.read_bytes() for path in found]
    assert [path.name for path in found] == ["000.png", "001.png", "002.png"]
    found[1].unlink()  # interrupted
    assert run(paths=1) == before and [path.read_bytes() for path in found] == kept
    assert (tmp_path / before[0]["file"]).stat().st_mtime_ns == written
    times = [path.stat().st_mtime_ns for path in found]
    assert run(paths=1) == before and [path.stat().st_mtime_ns for path in found] == times  # nothing is left to do
    (tmp_path / before[0]["file"]).unlink()
    found[0].write_bytes(b"of older settings")
    assert run() == before and not paths.beside(tmp_path / before[0]["file"])  # not beside a picture made anew


def test_the_report_shows_the_path_of_every_arm(tiny_sd, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring.scorers, "load", lambda *_: Brightness())
    named = {"base": Generation(tiny_sd, steps=3, paths=1), "fast": Generation(tiny_sd, steps=2, paths=1)}
    evaluation = evaluate.run(tmp_path, named, PROMPTS)
    (shown,) = report_pictures.denoising(evaluation, report_pictures.Thumbnails(6))
    assert [(arm, calls, [k for k, _ in each]) for arm, calls, each in shown["rows"]] == [
        ("base", 3, [1, 2, 3]),
        ("fast", 2, [1, 2]),
    ]
    page = (tmp_path / "report.html").read_text("utf-8")
    assert all(uri in page for _, _, each in shown["rows"] for _, uri in each) and "Denoising paths" in page


def test_paths_outside_of_a_folder_of_pictures_are_not_looked_for(tmp_path):
    assert paths.beside(tmp_path / "some" / "where" / "0.png") == []


def test_a_number_of_paths_below_zero_is_refused(tiny_sd):
    with pytest.raises(DiffpoError, match="paths must be at least 0"):
        Generation(tiny_sd, paths=-1)
    with pytest.raises(DiffpoError, match="unknown setting 'paths'"):
        arms.read_arms(["a=paths=3"], {"model": str(tiny_sd)})
