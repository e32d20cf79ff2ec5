"""Weighted sums of scorers' numbers."""

import numpy as np
import own_scorers
import pytest
import torch
from PIL import Image

from diffpo import scorers
from diffpo.common.errors import DiffpoError
from diffpo.scorers.ensemble import Sum, Term
from diffpo.scorers.judge import Judge

IMAGES = [Image.new("RGB", (4, 4), (level,) * 3) for level in (10, 20, 40)]
PROMPTS = ["a", "bb", "ccc"]


class Flat:
    """Its number and its slopes are known: the mean of the pixels."""

    names, optional, reads_prompt = ("flat",), frozenset(), False

    def score(self, images, prompts):
        return {"flat": np.array([np.asarray(image).mean() / 255 for image in images])}

    def rate(self, pixels, prompts):
        return {"flat": pixels.mean((1, 2, 3))}


def test_a_sum_is_that_of_the_stated_terms(tmp_path):
    found = scorers.load("sum=own_scorers:Mean*0.5+own_scorers:Long.long.prompt*-2").score(IMAGES, PROMPTS)
    assert found["sum"].tolist() == [0.5 * 10 - 2, 0.5 * 20 - 4, 0.5 * 40 - 6]
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\nterms:\n- {scorer: own_scorers:Mean, mean: 20, std: 10}\n"
        "- {scorer: own_scorers:Long.long.sum, weight: 3, mean: 1}\n"
    )
    scorer = scorers.load(f"sum={file}")
    found = scorer.score(IMAGES, PROMPTS)["mine"]
    assert found == pytest.approx(
        [(v - 20) / 10 + 3 * (v + n - 1) for v, n in zip((10, 20, 40), (1, 2, 3), strict=True)]
    )
    alone = [scorer.score([image], [prompt])["mine"][0] for image, prompt in zip(IMAGES, PROMPTS, strict=True)]
    assert found.tolist() == alone  # no standardising by the batch


def test_a_scorer_with_two_terms_is_asked_once():
    own_scorers.CALLS.clear()
    scorers.load("sum=own_scorers:Mean*2+own_scorers:Mean*3").score(IMAGES, PROMPTS)
    assert len(own_scorers.CALLS) == 3


def test_a_sum_has_slopes_if_its_terms_do():
    flat = Flat()
    both = Sum(
        [Term(scorer="a", weight=3, mean=1, std=2), Term(scorer="b", weight=-1)], [(flat, "flat"), (flat, "flat")]
    )
    pixels = torch.rand(2, 3, 4, 4, requires_grad=True)
    value = both.rate(pixels, PROMPTS[:2])["sum"]
    torch.testing.assert_close(value, 1.5 * (pixels.mean((1, 2, 3)) - 1) - pixels.mean((1, 2, 3)))
    (slope,) = torch.autograd.grad(value.sum(), pixels)
    torch.testing.assert_close(slope, torch.full_like(slope, 0.5 / 48))
    assert not both.reads_prompt
    without = scorers.load("sum=shapes.total*1")
    assert without.rate is None and without.reads_prompt
    with pytest.raises(DiffpoError, match="has no gradient"):
        Judge(["sum=shapes.total*1"]).require_gradients()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("sum", r"needs its terms: write sum=pickscore\*0\.02"),
        ("sum=shapes.total*x", r"'shapes\.total\*x' is not a term"),
        ("sum=shapes*1", r"shapes gives shapes\.total, .*: name one"),
        ("sum=shapes.totl", r"no number 'shapes\.totl': did you mean shapes\.total"),
        ("sum=shapes.right_relation", "missing for some prompts"),
        ("sum=pikscore*1", "did you mean pickscore"),
        ("sum=sum*1", "cannot be a sum"),
    ],
)
def test_what_is_no_sum_is_refused(spec, said):
    with pytest.raises(DiffpoError, match=said):
        scorers.load(spec)
