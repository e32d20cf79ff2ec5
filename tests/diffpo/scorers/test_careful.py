"""Failures on single pictures cost those pictures alone; a scorer that never succeeds is given up."""

import numpy as np
import pytest
from PIL import Image

from diffpo import scorers
from diffpo.scorers.careful import HOPELESS, CannotScore, Careful


class Picky:
    """The width; it fails on a batch with a picture of width 3. ``calls``: the sizes of its batches."""

    names = ("width",)

    def __init__(self):
        self.calls = []

    def score(self, images, prompts):
        self.calls.append(len(images))
        if any(image.width == 3 for image in images):
            raise CannotScore(f"too narrow for {prompts[0]}")
        return {"width": [image.width for image in images]}


def pictures(*widths):
    return [Image.new("RGB", (width, 2)) for width in widths]


def test_only_the_pictures_that_fail_are_lost():
    careful = Careful(scorer := Picky())
    found = careful.score(pictures(1, 3, 5), ["a", "b", "c"])
    np.testing.assert_array_equal(found.numbers["width"], [1, np.nan, 5])
    assert found.failed == {1: "too narrow for b"} and scorer.calls == [3, 1, 1, 1]
    assert careful.score(pictures(7, 8), ["a", "b"]).failed == {} and scorer.calls[4:] == [2]


def test_one_that_fails_on_everything_is_given_up():
    careful, many = Careful(Picky()), pictures(*[3] * HOPELESS)
    with pytest.raises(CannotScore, match="too narrow"):
        careful.score(many, ["p"] * HOPELESS)
    careful = Careful(Picky())
    careful.score(pictures(1), ["p"])  # once it has scored something, it is not
    assert len(careful.score(many, ["p"] * HOPELESS).failed) == HOPELESS


def test_a_class_from_outside_may_raise_anything():
    failing = scorers.load("own_scorers:Failing")
    with pytest.raises(CannotScore, match=r"own_scorers:Failing fails with ZeroDivisionError: division by zero"):
        failing.score(pictures(1), ["p"])


def test_captions_decide_whether_the_shapes_scorer_can_judge():
    shapes = scorers.load("shapes")
    image = [Image.new("RGB", (32, 32), "red")]
    with pytest.raises(CannotScore, match="embedded world only"):
        shapes.score(image, ["a photograph"])
    found = Careful(shapes).score(image * 2, ["a photograph", "a red circle on a white background"])
    assert [*found.failed] == [0] and np.isfinite(found.numbers["shapes.total"][1])
    shapes.check_prompts(["a photograph", "a red circle on a white background"])


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("hpsv2", "hps for HPS v2.1"),
        ("HPSv2.1", "hps for HPS v2.1"),
        ("vqascore", "judge=FILE.yaml"),
        ("dinov2", "--features"),
        ("fid", "diffpo distance"),
        ("pikscore", "did you mean pickscore"),
    ],
)
def test_other_names_of_known_numbers_are_explained(name, advice):
    with pytest.raises(scorers.DiffpoError, match=advice):
        scorers.parse(name)
