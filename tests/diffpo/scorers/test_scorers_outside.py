"""Scorers from outside the package, named `module:Class`, wherever a scorer can be named."""

import sys

import numpy as np
import pytest
import torch
from http_scorers import served
from PIL import Image

from diffpo import scorers
from diffpo.common.errors import DiffpoError
from diffpo.scorers.judge import Judge
from diffpo.scorers.step.base import is_folder

MODULE = """
import numpy as np

class Level:
    names = ("level", "level.odd")
    optional = frozenset({"level.odd"})
    def __init__(self, source, device):
        self.factor, self.device = float(source or 1), device
    def score(self, images, prompts):
        level = np.array([np.asarray(image).mean() for image in images]) * self.factor
        return {"level": level, "level.odd": np.where(np.arange(len(images)) % 2, level, np.nan)}

class Words:
    names = ["words"]
    def score(self, images, prompts):
        return {"words": [len(prompt.split()) for prompt in prompts]}

class Answer(Words):
    answer = {}
    def score(self, images, prompts):
        return self.answer

class Short(Answer): answer = {"words": [1.0]}
class Texts(Answer): answer = {"words": ["a", "b"]}
class Other(Answer): answer = {"word": [1.0, 2.0]}
class Bare(Answer): answer = [1.0, 2.0]
class Nan(Answer): answer = {"words": [1.0, float("nan")]}
class Nameless: score = Words.score
class Misnamed(Words): names = ("two words",)
class Stray(Words): optional = {"letters"}
class Broken(Words):
    def __init__(self): raise OSError("no weights")
word = 3
"""
IMAGES = [Image.new("L", (4, 4), value).convert("RGB") for value in (10, 30)]
PROMPTS = ["a red cat", "dog"]
M = "scorers_from_outside"


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / f"{M}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop(M, None)


def test_a_class_is_made_with_source_and_device_or_with_nothing():
    scorer = scorers.load(f"{M}:Level=2.5", "cpu")
    assert scorer.inner.device == "cpu" and scorer.optional == {"level.odd"}
    assert scorer.score(IMAGES, PROMPTS)["level"].tolist() == [25.0, 75.0]
    words = scorers.load(f"{M}:Words").score(IMAGES, PROMPTS)
    assert words["words"].dtype == np.float64 and words["words"].tolist() == [3.0, 1.0]
    assert scorers.load(f"{M}:Level.level").names == ("level",)


def test_the_judge_and_the_server_take_it():
    judge = Judge([f"{M}:Words", f"{M}:Level.level.odd=2", "shapes.total", f"{M}:Level.level=2"][:2])
    assert judge.names == ["words", "level.odd"]
    assert torch.equal(judge.scores(IMAGES, PROMPTS), torch.tensor([[3.0, 0.0], [1.0, 60.0]], dtype=torch.float64))
    with served(scorers.load(f"{M}:Level")) as server:
        assert server.about["scorer"] == f"{M}:Level" and server.about["names"] == ["level", "level.odd"]
        assert scorers.load(server.url).score(IMAGES, PROMPTS)["level"].tolist() == [10.0, 30.0]
    assert not is_folder(f"{M}:Level.level")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Levl", ["did you mean Level"]),
        ("word", ["is not a class"]),
        ("Words=4", ["takes no source", "=4"]),
        ("Broken", ["OSError", "no weights"]),
        ("Nameless", ["names"]),
        ("Misnamed", ["names"]),
        ("Stray", ["optional"]),
        ("Level.lvel", ["'lvel'", "did you mean level"]),
    ],
)
def test_what_is_no_scorer_is_named(name, words):
    for make in (scorers.load, lambda spec: Judge([spec])):
        with pytest.raises(DiffpoError) as error:
            make(f"{M}:{name}")
        whole = [f"{M}:{name.partition('=')[0].partition('.')[0]}", *words]
        assert all(word in str(error.value) for word in whole), error.value


@pytest.mark.parametrize(
    ("name", "words"),
    [("Short", "words has shape (1,) for 2"), ("Texts", "words holds no"), ("Other", "'words'"), ("Bare", "list")],
)
def test_an_answer_that_is_not_one_number_for_each_image_is_named(name, words):
    with pytest.raises(DiffpoError) as error:
        scorers.load(f"{M}:{name}").score(IMAGES, PROMPTS)
    assert f"{M}:{name}" in str(error.value) and words in str(error.value)


def test_nan_names_the_class_the_number_and_the_prompt():
    with pytest.raises(DiffpoError, match=rf"{M}:Nan \(words\) returned nan .*'dog'"):
        Judge([f"{M}:Nan"]).scores(IMAGES, PROMPTS)
    with pytest.raises(DiffpoError, match=rf"{M}:Level gives level, level\.odd; .*{M}:Level\.level"):
        Judge([f"{M}:Level"])


def test_a_number_of_a_scorer_of_this_package_is_not_the_scorer():
    with pytest.raises(DiffpoError, match=r"shapes\.total .* write shapes"):
        scorers.load("shapes.total")
