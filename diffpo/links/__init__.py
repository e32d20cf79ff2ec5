"""Links: what the errors and rewards of a pair, an image or a list cost. Pure functions of tensors, one loss per group.

A link's positional parameters name the quantities it needs, its keyword-only ones are options (`link_options` of the
config). The quantities, from reward.py:

    pairs    chosen, rejected: rewards (n,); preference: P(chosen is better) (n,); gap: score of the chosen image minus
             the rejected one's (n,); chosen_error, chosen_reference_error, chosen_drift and the same of the rejected
    singles  reward, liked, error, reference_error, drift (n,); baseline: mean reward of the previous update, a scalar
    lists    rewards, scores (k, n), best first

Everything here but calling a link works without torch, so that a config is checked in no time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Literal

from ..common.names import hint
from . import free, lists, pairwise, single, ties

if TYPE_CHECKING:
    from torch import Tensor

LINKS: dict[str, Callable[..., Tensor]] = {
    name: function
    for module in (pairwise, ties, free, single, lists)
    for name, function in vars(module).items()
    if inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_")
}

# what options of that name may be: from, to (not reached), and whether the first is
RANGES = {
    "smoothing": (0.0, 0.5, True),
    "flip": (0.0, 0.5, True),
    "epsilon": (0.0, 0.5, False),
    "threshold": (0.0, 100.0, False),
    "nu": (0.0, float("inf"), False),
    "temperature": (0.0, float("inf"), False),
    "kappa": (0.0, float("inf"), False),
    "scale": (0.0, float("inf"), False),
    "alpha": (0.0, float("inf"), False),
    "mix": (0.0, float("inf"), False),
    "margin": (0.0, float("inf"), True),
    "weight": (0.0, float("inf"), True),
    "desirable_weight": (0.0, float("inf"), True),
    "undesirable_weight": (0.0, float("inf"), True),
}


def names() -> list[str]:
    """All links."""
    return sorted(LINKS)


def get(name: str) -> Callable[..., Tensor]:
    """The link ``name``; ValueError with the nearest name if there is none."""
    if name not in LINKS:
        raise ValueError(f"unknown link {name!r}: {hint(name, names())}")
    return LINKS[name]


@cache
def needs(name: str) -> tuple[str, ...]:
    """The quantities that the link takes, in order."""
    parameters = inspect.signature(get(name)).parameters.values()
    return tuple(each.name for each in parameters if each.kind is not each.KEYWORD_ONLY)


def options(name: str) -> dict[str, float]:
    """The link's options and their defaults."""
    parameters = inspect.signature(get(name)).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}


def kind(name: str) -> Literal["pair", "single", "list"]:
    """What the link compares, as its quantities tell."""
    if "rewards" in needs(name):
        return "list"
    return "pair" if any(each.startswith("chosen") for each in needs(name)) else "single"


def check(name: str, given: Mapping[str, float]) -> None:
    """ValueError that names the link if there is none of that name, or its option that is unknown or out of range."""
    known = options(name)
    for option, value in given.items():
        if option not in known:
            raise ValueError(f"the link {name} has no option {option!r}: {hint(option, known)}")
        low, high, closed = RANGES[option]
        if name == "dspo":
            high = 1.0  # there the gradient turns against the chosen image
        if not (low < value < high or (closed and value == low)):
            bounds = f"{'from' if closed else 'above'} {low:g}"
            bounds += "" if high == float("inf") else f" and below {high:g}"
            raise ValueError(f"the option {option} of the link {name} must be {bounds}, not {value:g}")


def losses(name: str, given: Mapping[str, float], quantities: Mapping[str, Tensor | None]) -> Tensor:
    """The link's losses (n,), gradients attached.

    Args:
        given: options that differ from the defaults.
        quantities: by name; those that the link does not need may be there, None is as good as missing.

    A pair link that does not take ``preference`` itself gets its expectation under the label; for that the quantities
    of both images must be there.

    Raises ValueError that names the unknown link, the option that is unknown or out of range, or what is missing.
    """
    check(name, given)
    wanted = needs(name)
    label_is_open = kind(name) == "pair" and "preference" not in wanted
    swapped = tuple(map(_swapped, wanted)) if label_is_open else ()
    required = {*wanted, *swapped} | ({"preference"} if label_is_open else set())
    if missing := sorted(each for each in required if quantities.get(each) is None):
        raise ValueError(f"the link {name} needs {', '.join(missing)}, which the data or the objective does not give")
    link = get(name)
    loss = link(*(quantities[each] for each in wanted), **given)
    if not label_is_open:
        return loss
    values = (-quantities[each] if each == "gap" else quantities[each] for each in swapped)
    preference = quantities["preference"]
    return preference * loss + (1 - preference) * link(*values, **given)


def _swapped(quantity: str) -> str:
    """The same quantity when chosen and rejected change roles."""
    if quantity.startswith("chosen"):
        return "rejected" + quantity.removeprefix("chosen")
    return "chosen" + quantity.removeprefix("rejected") if quantity.startswith("rejected") else quantity
