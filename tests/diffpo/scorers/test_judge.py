import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffpo.common.errors import DiffpoError
from diffpo.rollout import labels
from diffpo.scorers import judge


class Fake:
    names = ("shapes.a", "shapes.b", "shapes.maybe")
    optional = frozenset({"shapes.maybe"})

    def __init__(self, **numbers):
        self.numbers = {f"shapes.{name}": np.array(values) for name, values in numbers.items()}

    def score(self, images, prompts):
        return self.numbers


@pytest.fixture
def judged(monkeypatch):
    def scores(specs, **numbers):
        monkeypatch.setattr(judge.scorers, "load", lambda spec, device: Fake(**numbers))
        return judge.Judge(specs).scores([Image.new("RGB", (4, 4))] * 2, ["red cat", "blue dog"])

    return scores


def test_each_name_gives_its_column(judged):
    found = judged(["shapes.b", "shapes.maybe", "shapes.a"], a=[1, 2], b=[3, 4], maybe=[np.nan, 0.5])
    assert found.tolist() == [[3, 0, 1], [4, 0.5, 2]]


def test_what_a_scorer_must_not_return_names_scorer_and_prompt(judged):
    with pytest.raises(DiffpoError, match=r"shapes\.a returned nan .*'blue dog'"):
        judged(["shapes.a"], a=[1, np.nan])
    with pytest.raises(DiffpoError, match=r"shapes\.a returned shape \(3,\) for 2 images, .*'red cat'"):
        judged(["shapes.a"], a=[1, 2, 3])
    with pytest.raises(DiffpoError, match=r"no number 'shapes\.mayb': did you mean shapes\.maybe"):
        judged(["shapes.mayb"])
    with pytest.raises(DiffpoError, match="unknown scorer 'shape': did you mean shapes"):
        judge.Judge(["shape.a"])


def test_pareto_dominance_by_hand():
    scores = torch.tensor([[1.0, 1.0], [2.0, 1.0], [0.0, 3.0], [2.0, 1.0], [2.0, 4.0]])
    # 1 and 3 beat 0 (equal in the second, better in the first); 4 beats all; 2 is better and worse than 0, 1, 3
    assert judge.pairs(scores) == [(1, 0), (3, 0), (4, 0), (4, 1), (4, 2), (4, 3)]
    assert judge.better(scores[1], scores[3]) == 0 and judge.better(scores[0], scores[1]) == -1


def test_standardised_scores_are_the_mean_of_the_z_scores():
    scores = torch.tensor([[0.0, 5.0], [2.0, 5.0]], dtype=torch.float64)
    assert judge.standardised(scores).tolist() == [-0.5, 0.5]


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def row(label, first="images/00003-0.png", second="images/00003-2.png"):
    return {"prompt": "cat", "image_0": first, "image_1": second, "label_0": label}


def test_labels_say_who_is_better(tmp_path):
    found = labels.read_labels(write(tmp_path / "l.jsonl", [row(1), row(0), row(0.5), row(None), row(0.2)]))
    assert [(label.group, label.chosen, label.rejected, label.preference) for label in found] == [
        ("00003", 0, 2, 1),
        ("00003", 2, 0, 1),
        ("00003", 2, 0, 0.8),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(None)], "no pair is judged"),
        ([row(0.5)], "all 1 judged pairs are ties"),
        ([row(1), row(2)], ":2: label_0 is 2"),
        ([row(True)], ":1: label_0 is True"),
        ([{"prompt": "cat"}], ":1: expected"),
        ([row(1, second="images/00004-1.png")], "two images of one prompt"),
        ([row(1, first="cat.png")], "not an image of `diffpo collect`"),
    ],
)
def test_bad_labels_are_named(tmp_path, rows, message):
    with pytest.raises(DiffpoError, match=message):
        labels.read_labels(write(tmp_path / "labels.jsonl", rows))


def test_missing_labels_say_where_they_come_from(tmp_path):
    with pytest.raises(DiffpoError, match="diffpo collect CONFIG"):
        labels.read_labels(tmp_path / "none.jsonl")


@pytest.mark.parametrize("how", ["utf-8-sig", "utf-16", "crlf"])
def test_labels_as_people_save_them(tmp_path, how):
    rows = [row(1), row(0, "images\\00003-0.png", "images\\00003-1.png")]
    text = "\r\n".join(json.dumps({**each, "prompt": "caf\xe9"}, ensure_ascii=False) for each in rows)
    (tmp_path / "l.jsonl").write_bytes(text.encode("utf-8" if how == "crlf" else how))
    found = labels.read_labels(tmp_path / "l.jsonl")
    assert [(label.prompt, label.chosen, label.rejected) for label in found] == [("caf\xe9", 0, 2), ("caf\xe9", 1, 0)]
