"""Links from outside the package, named `module:function`."""

import sys

import pytest
import torch

from diffpo import links
from diffpo.common.errors import DiffpoError

MODULE = """
from __future__ import annotations
from typing import TYPE_CHECKING, Annotated
from diffpo.links import Range
from diffpo.links.numerics import log_sigmoid
if TYPE_CHECKING:
    from torch import Tensor

def logistic(chosen: Tensor, rejected: Tensor, *, scale: Annotated[float, Range(0, 5)] = 1.0, offset=0.0) -> Tensor:
    return -log_sigmoid(scale * (chosen - rejected) - offset)

def fine_tuned(error, liked, *, weight): return weight * liked * error
def first(rewards): return -rewards[0]

def misspelt(chosn, rejected): ...
def of_two_kinds(chosen, liked): ...
def of_nothing(*, scale=1.0): ...
def of_anything(**quantities): ...
def unreadable(chosen, *, scale: Annotated[float, Rangg(0)] = 1.0): ...
def summed(chosen, rejected): return (chosen - rejected).sum()
def no_tensor(chosen, rejected): return 0.0
number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "links_from_outside.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    links._link.cache_clear()
    yield "links_from_outside"
    links._link.cache_clear()
    sys.modules.pop("links_from_outside", None)


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    return {"chosen": chosen, "rejected": rejected, "preference": torch.rand(5, generator=generator).double()}


def test_a_link_from_outside_equals_the_same_formula_inside(module, pairs):
    name = f"{module}:logistic"
    assert links.kind(name) == "pair" and links.options(name) == {"scale": 1.0, "offset": 0.0}
    assert torch.equal(links.losses(name, {}, pairs), links.losses("sigmoid", {}, pairs))
    moved = links.losses(name, {"offset": 0.7}, pairs)
    torch.testing.assert_close(moved, links.losses("sigmoid", {"margin": 0.7}, pairs))


def test_options_of_any_name_and_those_without_a_default(module):
    name = f"{module}:fine_tuned"
    values = {"error": torch.tensor([2.0, 3.0]), "liked": torch.tensor([1.0, 0.5])}
    assert links.losses(name, {"weight": -4.0}, values).tolist() == [-8.0, -6.0]
    assert links.losses(f"{module}:first", {}, {"rewards": torch.tensor([[1.0, 2.0], [0, 0]])}).tolist() == [-1, -2]
    with pytest.raises(DiffpoError, match=r"fine_tuned.*weight"):
        links.check(name, {})


@pytest.mark.parametrize(
    ("function", "given", "words"),
    [
        ("logistic", {"scale": 5.0}, ["scale", "below 5", "not 5"]),
        ("logistic", {"scale": 0.0}, ["scale", "above 0"]),
        ("logistic", {"scal": 1.0}, ["'scal'", "did you mean scale"]),
        ("logistic", {"offset": float("inf")}, ["offset", "inf"]),
        ("logstic", {}, ["did you mean logistic"]),
        ("misspelt", {}, ["'chosn'", "did you mean chosen"]),
        ("of_two_kinds", {}, ["chosen, liked"]),
        ("of_nothing", {}, ["one kind"]),
        ("of_anything", {}, ["'quantities'"]),
        ("unreadable", {}, ["Rangg"]),
        ("number", {}, ["is not a function"]),
    ],
)
def test_what_cannot_be_used_is_named(module, function, given, words):
    with pytest.raises(DiffpoError) as error:
        links.check(f"{module}:{function}", given)
    assert all(word in str(error.value) for word in [f"{module}:{function}", *words]), error.value


@pytest.mark.parametrize(("function", "words"), [("summed", r"shape \(\).*\(5,\)"), ("no_tensor", r"float.*\(5,\)")])
def test_a_loss_of_another_shape_is_named(module, function, words, pairs):
    with pytest.raises(DiffpoError, match=rf"{module}:{function} returned {words}"):
        links.losses(f"{module}:{function}", {}, pairs)
