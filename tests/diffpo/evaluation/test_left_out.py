"""What cannot be compared: said, counted, and the rest compared."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from noisy_arms import CAPTIONS, compare, save_arm

from diffpo.common.errors import DiffpoError
from diffpo.evaluation import scoring
from diffpo.scorers.careful import CannotScore


def test_nan_is_counted_and_the_rest_compared(folder, monkeypatch, capsys):
    class Broken:
        names = ("shapes",)
        optional = frozenset()

        def score(self, images, prompts):
            bright = [np.asarray(image).mean() for image in images]
            return {"shapes": np.where([prompt == CAPTIONS[7] for prompt in prompts], np.nan, bright)}

    monkeypatch.setattr(scoring.scorers, "load", lambda *_: Broken())
    result = compare(folder)
    assert result.row("shapes").n == 11 and 7 not in [entry["prompt_id"] for entry in result.by_prompt["tuned"]]
    said = capsys.readouterr().out
    assert re.search(r"shapes is NaN for 1 pictures of the arm tuned.*tuned/00007_0\.png \(prompt 7", said)
    stored = pq.read_table(folder / "eval" / "scores.parquet").to_pandas()
    assert stored[stored.value.isna()].prompt_id.tolist() == [7, 7]
    assert len(json.loads((folder / "eval" / "summary.json").read_text())["left_out"]) == 2


def test_a_missing_image_of_one_arm_is_counted(folder, capsys):
    (folder / "images" / "tuned" / "00003_0.png").unlink()
    assert compare(folder).row("shapes.total").n == 11
    assert "tuned lacks 1 of 12 prompts and seeds (prompt 3, seed 0" in capsys.readouterr().out


def test_a_truncated_image_is_counted(folder, capsys):
    path = folder / "images" / "tuned" / "00003_0.png"
    path.write_bytes(path.read_bytes()[:200])
    assert compare(folder).row("shapes.total").n == 11
    assert re.search(r"1 pictures of the arm tuned cannot be read.*00003_0\.png", capsys.readouterr().out)


def test_an_arm_without_a_picture_that_can_be_read_is_refused(folder):
    for path in (folder / "images" / "tuned").iterdir():
        path.write_bytes(b"x")
    with pytest.raises(DiffpoError, match=r"nothing to compare: 12 pictures of the arm tuned cannot.*00000_0\.png"):
        compare(folder)


class Fragile:
    """Brightness; it fails on pictures of one prompt, or after so many pictures altogether."""

    names, optional, reads_prompt = ("fragile",), frozenset(), True

    def __init__(self, source):
        self.prompt, self.most = (CAPTIONS[2], 10**9) if source == "prompt" else (None, 5)
        self.seen = 0

    def score(self, images, prompts):
        self.seen += len(images)
        if self.seen > self.most:
            raise DiffpoError("the server is gone")
        if self.prompt in prompts:
            raise CannotScore("it is too strange")
        return {"fragile": [float(np.asarray(image).mean()) for image in images]}


@pytest.fixture
def fragile(monkeypatch):
    load = scoring.scorers.load
    monkeypatch.setattr(
        scoring.scorers,
        "load",
        lambda spec, *rest: Fragile(spec[8:]) if spec.startswith("fragile:") else load(spec, *rest),
    )


def left_out(folder):
    return json.loads((folder / "eval" / "summary.json").read_text())["left_out"]


def test_a_picture_that_a_scorer_fails_on_costs_only_itself(folder, fragile, capsys):
    result = compare(folder, scorers=("fragile:prompt", "shapes"))
    assert result.row("fragile").n == 11 and result.row("shapes.total").n == 12
    said = [f"the scorer fragile:prompt fails on 1 pictures of the arm {arm}" for arm in ("base", "tuned")]
    assert [line.partition(",")[0] for line in left_out(folder)] == said
    assert all(line in capsys.readouterr().out for line in left_out(folder)[:1])
    assert "00002_0.png (it is too strange)" in left_out(folder)[0] and "it is too strange" in page(folder)


def page(folder):
    return (folder / "eval" / "report.html").read_text("utf-8")


def test_a_scorer_that_gives_up_leaves_the_others_and_its_finished_numbers(folder, fragile, monkeypatch):
    monkeypatch.setattr(scoring, "BATCH", 4)
    result = compare(folder, scorers=("fragile:server", "shapes"))
    assert result.primary == "shapes.total" and "fragile:server" in result.verdict.sentence
    assert {row.scorer.partition(".")[0] for row in result.rows} == {"shapes"}
    assert left_out(folder) == [
        "the scorer fragile:server gave up, and its scores are left out: the server is gone. The same command "
        "continues it"
    ]
    kept = b"".join(path.read_bytes() for path in (folder / "eval" / ".scores").iterdir()).decode()
    assert kept.count("fragile") == 4
    with pytest.raises(DiffpoError, match="nothing to compare: the scorer fragile:server gave up"):
        compare(folder, scorers=("fragile:server",))


def test_an_arm_without_readable_pictures_leaves_the_others(folder, capsys):
    save_arm(folder, "third", [np.zeros((32, 32, 3), np.uint8)] * 12)
    for path in (folder / "images" / "third").iterdir():
        path.write_bytes(b"x")
    result = compare(folder)
    assert result.arms == ("base", "tuned") and result.row("shapes.total").n == 12
    assert "no picture of the arm third can be read; this arm is left out" in left_out(folder)
    assert "third" not in result.verdict.sentence


def test_files_that_are_no_pictures_of_a_prompt_cost_only_themselves(folder):
    (folder / "images" / "tuned" / "contact sheet.png").write_bytes((folder / "images/tuned/00000_0.png").read_bytes())
    (folder / "images" / "tuned" / "99_0.png").write_bytes(b"x")
    assert compare(folder).row("shapes.total").n == 12
    said = left_out(folder)
    assert len(said) == 2 and "1 pictures are left out (99_0.png), there are only 12 prompts" in said[0]
    assert "1 pictures are left out (contact sheet.png), they have no text" in said[1]


def test_pictures_that_are_not_those_of_their_manifest_are_left_out(folder):
    rows = [
        {"arm": arm, "index": k, "seed": 0, "prompt": prompt, "file": f"images/{arm}/{k:05d}_0.png"}
        for arm in ("base", "tuned")
        for k, prompt in enumerate(CAPTIONS)
    ]
    rows[14]["sha256"] = "0" * 64
    (folder / "images" / "base" / "00000_0.png").unlink()
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compare(folder).row("shapes.total").n == 10
    assert [line.partition(": ")[2].partition(":")[0] for line in left_out(folder)[:2]] == [
        "1 pictures are missing, or are not those that manifest.jsonl describes"
    ] * 2
