"""`diffpo label` on folders of pictures whose quality is known: what is written, and what bad input costs."""

import json

import numpy as np
import own_scorers
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from diffpo import cli, shapes
from diffpo.common.errors import DiffpoError
from diffpo.config import Data
from diffpo.data.groups import load_groups
from diffpo.evaluation import items
from diffpo.labelling import label
from diffpo.labelling.label import Labelling
from diffpo.labelling.pictures import loaded_as
from diffpo.labelling.rows import Choice
from diffpo.scorers.careful import CannotScore
from diffpo.scorers.shapes import ShapesScorer

CAPTIONS = shapes.heldout_captions(6)
NOISE = (0, 4, 12, 24)  # of the four pictures of each prompt, from the best to the worst


@pytest.fixture
def folder(tmp_path):
    """Two arms with two pictures of each prompt: seeds 0, 1 of `one` are noisy by 12 and 0, of `two` by 24 and 4."""
    rng = np.random.default_rng(0)
    for index, caption in enumerate(CAPTIONS):
        clean = shapes.render(shapes.parse(caption), rng).astype(float)
        for arm, seed, noise in (("one", 0, 12), ("one", 1, 0), ("two", 0, 24), ("two", 1, 4)):
            path = tmp_path / "pictures" / "images" / arm / f"{index:05d}_{seed}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.clip(clean + rng.normal(0, 1, clean.shape) * noise, 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
    return tmp_path


def labelled(folder, choice=None, out="out", scorers=("shapes.appearance",), n=None, **how):
    arms = items.in_folder(folder / "pictures")
    how = Labelling(tuple(scorers), choice=choice or Choice(), **how)
    return label.run(folder / out, arms, how, folder / "prompts.txt", n)


def table(folder, out="out"):
    return pq.read_table(folder / out / "labels.parquet").to_pylist()


def noise_of(row, i):
    return {("one", 0): 12, ("one", 1): 0, ("two", 0): 24, ("two", 1): 4}[row[f"arm_{i}"], row[f"seed_{i}"]]


def test_pairs_are_the_cleanest_against_the_noisiest(folder):
    found = labelled(folder)
    rows = table(folder)
    assert [row["caption"] for row in rows] == CAPTIONS and found.counts["rows"] == 6
    for row in rows:
        assert sorted(noise_of(row, i) for i in (0, 1)) == [0, 24]
        assert row["label_0"] == (noise_of(row, 0) == 0) == 1 - row["label_1"]
        pictures = [Image.open(path) for path in _files(folder, row)]
        own = ShapesScorer().score(pictures, [row["caption"]] * 2)["shapes.appearance"]
        assert [row["shapes.appearance_0"], row["shapes.appearance_1"]] == own.tolist()
        assert [row[f"jpg_{i}"] for i in (0, 1)] == [path.read_bytes() for path in _files(folder, row)]
    about = json.loads((folder / "out/label.json").read_text())
    assert about["settings"]["scorers"] == ["shapes.appearance"] and about["pictures"] == 24
    assert Image.open(folder / "out/label.png").width > 300


def _files(folder, row):
    return [
        folder / "pictures/images" / row[f"arm_{i}"] / f"{row['prompt_id']:05d}_{row[f'seed_{i}']}.png" for i in (0, 1)
    ]


def test_training_reads_all_three_forms(folder):
    read = {}
    for form, want in (("pairs", "pair"), ("rankings", "list"), ("likes", "single")):
        labelled(folder, Choice(form))
        data = Data(train=str(folder / "out/labels.parquet"), resolution=32)
        read[form] = load_groups(data, data.train, "train", want)
    assert len(read["pairs"]) == 6 and read["pairs"].scored
    assert all(group.scores[0] > group.scores[1] for group in read["pairs"].groups)
    lists = read["rankings"].groups
    assert [group.scores for group in lists] == [pytest.approx((1, 2 / 3, 1 / 3, 0))] * 6  # win rates of four
    assert {group.images for group in lists} == {(1, 3, 0, 2)}  # by their noise: 0, 4, 12, 24
    liked = [group.preference for group in read["likes"].groups]
    assert liked == [0, 1, 0, 1] * 6


def test_a_killed_run_goes_on_and_gives_the_same_file(folder, monkeypatch):
    labelled(folder, out="straight", scorers=["own_scorers:Mean"])
    own_scorers.CALLS.clear()
    monkeypatch.setattr(own_scorers, "STOP", [16])
    with pytest.raises(KeyboardInterrupt):
        labelled(folder, scorers=["own_scorers:Mean"])
    assert not (folder / "out/labels.parquet").exists()
    own_scorers.CALLS.clear()
    labelled(folder, scorers=["own_scorers:Mean"])
    assert 0 < len(own_scorers.CALLS) < 24  # what was scored is not scored again
    files = [(folder / out / "labels.parquet").read_bytes() for out in ("straight", "out")]
    assert files[0] == files[1]
    own_scorers.CALLS.clear()
    labelled(folder, Choice("rankings"), scorers=["own_scorers:Mean"])  # another form scores nothing
    assert not own_scorers.CALLS


def test_rows_say_which_of_them_were_flipped(folder):
    labelled(folder)
    plain = table(folder)
    labelled(folder, Choice(flip=0.5, seed=1))
    found = table(folder)
    assert sum(row["flipped"] for row in found) == 3
    for before, after in zip(plain, found, strict=True):
        assert (before["label_0"] != after["label_0"]) == after["flipped"]
        assert before["score_0"] == after["score_0"]


def test_numbers_that_a_prompt_does_not_ask_for_are_left_out_of_it(folder):
    labelled(folder, scorers=["shapes.appearance", "shapes.right_relation"])
    for row in table(folder):
        asked = shapes.parse(row["caption"]).relation is not None
        assert (row["shapes.right_relation_0"] is not None and not np.isnan(row["shapes.right_relation_0"])) == asked


def test_what_cannot_be_judged_costs_only_itself(folder):
    home = folder / "pictures/images"
    (home / "one/00000_0.png").write_bytes((home / "one/00000_0.png").read_bytes()[:60])
    for name in ("one/00001_0.png", "one/00001_1.png", "two/00001_0.png"):
        (home / name).unlink()
    Image.new("RGB", (32, 32)).save(home / "two/00002_1.png")  # black: NaN by the scorer
    found = labelled(folder, Choice(which="all"), scorers=["own_scorers:Long.long.sum"])
    said = "\n".join(found.left_out)
    assert "1 pictures of the arm one cannot be read" in said and "one/00000_0.png" in said
    assert "long.sum is NaN for 1 pictures of the arm two" in said
    assert (
        f"1 of 6 prompts have fewer than two pictures with all numbers and are left out, such as '{CAPTIONS[1][:20]}"
        in said
    )
    counts = {index: sum(row["prompt_id"] == index for row in table(folder)) for index in range(6)}
    assert counts == {0: 3, 1: 0, 2: 3, 3: 6, 4: 6, 5: 6}


def test_a_scorer_that_gives_up_writes_no_labels(folder, monkeypatch):
    labelled(folder)
    before = (folder / "out/labels.parquet").read_bytes()
    monkeypatch.setattr("diffpo.scorers.careful.HOPELESS", 4)

    def fail(self, images, prompts):
        raise CannotScore("the server is gone")

    monkeypatch.setattr(own_scorers.Failing, "score", fail)
    with pytest.raises(DiffpoError, match=r"own_scorers:Failing gave up.*the same command continues"):
        labelled(folder, scorers=["shapes.appearance", "own_scorers:Failing"])
    assert (folder / "out/labels.parquet").read_bytes() == before


@pytest.mark.parametrize(
    ("spec", "whole"),
    [
        ("shapes.total", "shapes"),
        ("hps2.0", "hps2.0"),
        ("pickscore=some/folder", "pickscore=some/folder"),
        ("own_scorers:Long.long.sum", "own_scorers:Long.long.sum"),
        ("http://127.0.0.1:8000/clip", "http://127.0.0.1:8000/clip"),
    ],
)
def test_a_number_belongs_to_a_scorer(spec, whole):
    assert loaded_as(spec) == whole


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--scorers", "shapes"], "shapes.total"),
        (["--scorers", "shapes.totl"], "shapes.total"),
        (["--scorers", "shapes.total", "--scorers", "shapes.total"], "twice"),
        (["--scorers", "shapes.total", "--rule", "mean"], "win-rate"),
        (["--scorers", "shapes.total", "--scorers", "shapes.following", "--rule", "score"], "sum="),
        (["--scorers", "shapes.total", "--as", "likes", "--captions", "perturbed"], "--captions"),
        (["--scorers", "shapes.total", "--captions", "hybrid"], "--captioner"),
        (["--scorers", "shapes.total", "--filter", "0.1"], "--model"),
        (["--scorers", "shapes.total", "--margin", "2"], "--margin"),
        (["--scorers", "shapes.total", "--prompts", "empty.txt"], "empty.txt has no prompts"),
    ],
)
def test_one_message_names_what_is_wrong(folder, monkeypatch, options, named):
    monkeypatch.chdir(folder)
    (folder / "empty.txt").write_text("\n\n")
    given = ["--prompts", "prompts.txt"] if "--prompts" not in options else []
    result = CliRunner().invoke(cli.app, ["label", "--images", "pictures", "--out", "out", *given, *options])
    assert isinstance(result.exception, DiffpoError) and named in str(result.exception)


def test_a_file_of_somebody_else_is_not_overwritten(folder):
    (folder / "out").mkdir()
    (folder / "out/labels.parquet").write_bytes(b"mine")
    with pytest.raises(DiffpoError, match=r"labels\.parquet was not written by `diffpo label`"):
        labelled(folder)
    assert (folder / "out/labels.parquet").read_bytes() == b"mine"
