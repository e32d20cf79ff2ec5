"""Links: what the errors and rewards of a pair, an image or a list cost. Pure functions of tensors, one loss per group.

A link's positional parameters name the quantities that it needs. Its keyword-only parameters are its options
(`link_options` of the config), with the values that are allowed: ``flip: Annotated[float, Range(0, 0.5)] = 0.1``.
The quantities (objective/reward.py computes them):

    pairs    chosen, rejected: rewards (n,); preference: P(chosen is better) (n,); gap: score of the chosen image minus
             the rejected one's (n,); chosen_error, chosen_reference_error, chosen_drift and the same of the rejected;
             reference_margin: the reference's part of u, (beta/2) (its error of the rejected - of the chosen)
    singles  reward, liked, error, reference_error, drift (n,); baseline: mean reward of the previous update, a scalar;
             advantage (n,); log_ratio (n,), (beta/2) k omega (behaviour_error - error); behaviour_error, _drift (n,);
             behaviour_kl (n,), (beta/2) k omega behaviour_drift; step_weight, step_std (n,): k and the standard
             deviation of a sampler's step; prediction, behaviour_prediction, target (d, n); x_0_scale (n,): errors of
             x_0 in units of the output's
    lists    rewards, scores, advantages, log_ratios (k, n), best first

A link of your own is named `package.module:function`. Reading a config that names one imports that module. Everything
here but calling a link works without torch, so a config is checked quickly.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Literal, get_type_hints

from ..common.errors import DiffpoError
from ..common.imports import load_attribute
from ..common.names import hint
from ..common.text import plain
from . import advantages, free, lists, pairwise, single, ties
from .ranges import Range

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LINKS", "QUANTITIES", "Range", "check", "get", "kind", "losses", "names", "needs", "options"]

LINKS: dict[str, Callable[..., Tensor]] = {
    name: function
    for module in (pairwise, ties, free, single, advantages, lists)
    for name, function in vars(module).items()
    if inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_")
}

Kind = Literal["pair", "single", "list"]
_SIDE = ("{}", "{}_error", "{}_reference_error", "{}_drift")
QUANTITIES: dict[Kind, tuple[str, ...]] = {
    "pair": (
        *(each.format(side) for side in ("chosen", "rejected") for each in _SIDE),
        *("preference", "gap", "reference_margin"),
    ),
    "single": (
        *("reward", "liked", "error", "reference_error", "drift", "baseline"),
        *("advantage", "log_ratio", "behaviour_error", "behaviour_drift", "behaviour_kl", "step_weight", "step_std"),
        *("prediction", "behaviour_prediction", "target", "x_0_scale"),
    ),
    "list": ("rewards", "scores", "advantages", "log_ratios"),
}


@dataclass(frozen=True)
class Link:
    """A link as its signature describes it.

    Attributes:
        kind: what it compares.
        needs: the quantities that it takes, in order.
        options: the names of its options and their defaults (`inspect.Parameter.empty` if it has none).
        ranges: the allowed values of the options that declare them.
    """

    function: Callable[..., Tensor]
    kind: Kind
    needs: tuple[str, ...]
    options: Mapping[str, float]
    ranges: Mapping[str, Range]


def names() -> list[str]:
    """All links of this package."""
    return sorted(LINKS)


def get(name: str) -> Callable[..., Tensor]:
    """The function of the link ``name``; DiffpoError with the nearest name if there is none."""
    return _link(name).function


def needs(name: str) -> tuple[str, ...]:
    """The quantities that the link takes, in order."""
    return _link(name).needs


def options(name: str) -> dict[str, float]:
    """The link's options and their defaults."""
    return dict(_link(name).options)


def kind(name: str) -> Kind:
    """What the link compares, by the quantities that it takes."""
    return _link(name).kind


def check(name: str, given: Mapping[str, float]) -> None:
    """DiffpoError that names the link if it does not exist, or an option that is unknown, missing or out of range."""
    link = _link(name)
    for option, value in given.items():
        if option not in link.options:
            raise DiffpoError(f"the link {name} has no option {option!r}: {hint(option, link.options)}")
        if not math.isfinite(value):
            raise DiffpoError(f"the option {option} of the link {name} must be a finite number, not {value:g}")
        if option in link.ranges and value not in link.ranges[option]:
            raise DiffpoError(f"the option {option} of the link {name} must be {link.ranges[option]}, not {value:g}")
    for option, default in link.options.items():
        if default is inspect.Parameter.empty and option not in given:
            raise DiffpoError(f"the link {name} needs the option {option}: set link_options={{{option}: NUMBER}}")


def losses(name: str, given: Mapping[str, float], quantities: Mapping[str, Tensor | None]) -> Tensor:
    """The link's losses (n,), gradients attached.

    Args:
        given: options that differ from the defaults.
        quantities: by name; those that the link does not need are ignored, and None counts as missing.

    A pair link that does not take ``preference`` itself gets its expectation under the label; for that the quantities
    of both images must be there.

    Raises DiffpoError that names the link: it is unknown, an option is unknown or out of range, a quantity is missing,
    or it returns anything but one loss per group.
    """
    check(name, given)
    link = _link(name)
    label_is_open = link.kind == "pair" and "preference" not in link.needs
    swapped = tuple(map(_swapped, link.needs)) if label_is_open else ()
    required = {*link.needs, *swapped} | ({"preference"} if label_is_open else set())
    there = {each: value for each in required if (value := quantities.get(each)) is not None}
    if missing := sorted(required - there.keys()):
        raise DiffpoError(f"the link {name} needs {', '.join(missing)}, which the data and the objective lack")
    loss = link.function(*(there[each] for each in link.needs), **given)
    expected = next(there[each] for each in link.needs if each != "baseline").shape[-1:]
    if getattr(loss, "shape", None) != expected:
        found = f"shape {tuple(loss.shape)}" if hasattr(loss, "shape") else type(loss).__name__
        raise DiffpoError(
            f"the link {name} returned {found}, but must return one loss for each group, shape {tuple(expected)}"
        )
    if not label_is_open:
        return loss
    values = (-there[each] if each in ("gap", "reference_margin") else there[each] for each in swapped)
    preference = there["preference"]
    return preference * loss + (1 - preference) * link.function(*values, **given)


@cache
def _link(name: str) -> Link:
    if ":" in name:
        return _described(name, load_attribute(name, "link", "a function of tensors, see diffpo/links", callable))
    if name not in LINKS:
        raise DiffpoError(f"unknown link {name!r}: {hint(name, names())}")
    return _described(name, LINKS[name])


def _described(name: str, function: Callable[..., Tensor]) -> Link:
    """DiffpoError if the signature names anything but quantities of one kind and options."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise DiffpoError(f"cannot read the signature of the link {name}: {plain(error, 200)}") from None
    needed = tuple(each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD))
    every = [quantity for group in QUANTITIES.values() for quantity in group]
    for each in parameters:
        if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) or (each.name in needed and each.name not in every):
            raise DiffpoError(
                f"the link {name} has the parameter {each.name!r}, which is not a quantity ({hint(each.name, every)}). "
                f"Put options after a * in its signature"
            )
    kinds = [kind for kind, group in QUANTITIES.items() if set(needed) <= {*group}]
    if not kinds or not {*needed} - {"baseline"}:
        groups = "; ".join(f"{kind}: {', '.join(group)}" for kind, group in QUANTITIES.items())
        raise DiffpoError(f"the link {name} must take quantities of one kind ({groups}), not {', '.join(needed)}")
    known = {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}
    return Link(function, kinds[0], needed, known, _ranges(name, function, list(known)))


def _ranges(name: str, function: Callable[..., Tensor], known: list[str]) -> dict[str, Range]:
    """The ranges of the options, from their annotations. Those of the tensors need not be readable without torch."""
    written = getattr(function, "__annotations__", {})
    options = SimpleNamespace(__annotations__={option: written[option] for option in known if option in written})
    try:
        hints = get_type_hints(options, getattr(function, "__globals__", {}), include_extras=True)
    except Exception as error:  # whatever an annotation runs into
        raise DiffpoError(f"the options of the link {name} have annotations that cannot be read: {error}") from None
    declared = {option: getattr(hint, "__metadata__", ()) for option, hint in hints.items()}
    return {option: each for option, found in declared.items() for each in found if isinstance(each, Range)}


def _swapped(quantity: str) -> str:
    """The same quantity when chosen and rejected change roles."""
    if quantity.startswith("chosen"):
        return "rejected" + quantity.removeprefix("chosen")
    return "chosen" + quantity.removeprefix("rejected") if quantity.startswith("rejected") else quantity
