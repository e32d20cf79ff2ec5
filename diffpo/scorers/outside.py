"""A scorer from outside the package, with its answers checked: errors name the class and the number."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from ..common.errors import DiffpoError
from ..common.names import hint
from ..common.text import plain
from .careful import CannotScore
from .server.protocol import NAME


def made(what: str, made_by: Callable[..., Any], source: str | None, device: str) -> Any:
    """The object of a class from outside: called with source and device if it takes them. DiffpoError that begins with
    ``what``, if it takes no source or cannot be created."""
    try:
        inspect.signature(made_by).bind(source, device)
        given: tuple = (source, device)
    except (TypeError, ValueError):
        if source is not None:
            raise DiffpoError(f"{what} takes no source: leave out ={plain(source, 100)}") from None
        given = ()
    try:
        return made_by(*given)
    except DiffpoError:
        raise
    except Exception as error:  # whatever its own code runs into
        raise DiffpoError(f"{what} cannot be created: {type(error).__name__}: {plain(error, 300)}") from error


class Outside:
    """The scorer that ``made_by`` makes, see `diffpo.scorers.Scorer`; ``number``: one of its numbers alone.

    Raises DiffpoError that names the class: it cannot be made, or it is no scorer; from ``score``: its answer is not
    one number for each image, and `CannotScore` if its own code raises. The caller checks for NaN and names the prompt.
    """

    def __init__(self, spec: str, made_by: Callable[..., Any], source: str | None, device: str, number: str | None):
        self.spec = spec
        self.inner = made(f"the scorer {spec}", made_by, source, device)
        names: Any = getattr(self.inner, "names", None)
        optional = getattr(self.inner, "optional", ())
        if not callable(getattr(self.inner, "score", None)) or not _are_names(names) or not set(optional) <= set(names):
            raise DiffpoError(
                f"{spec} is not a scorer: it needs score(images, prompts), and names, a tuple of the names of its "
                f"numbers (letters, digits, '.', '_', '-'). An attribute optional may list some of them"
            )
        if number is not None and number not in names:
            raise DiffpoError(f"the scorer {spec} gives no number {number!r}: {hint(number, names)}")
        self.names: tuple[str, ...] = (number,) if number else tuple(names)
        self.optional = frozenset(optional)
        self.reads_prompt = bool(getattr(self.inner, "reads_prompt", True))

    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        try:
            found = self.inner.score(images, prompts)
        except DiffpoError:
            raise
        except Exception as error:  # whatever its own code runs into
            reason = f"{type(error).__name__}: {plain(error, 300)}"
            raise CannotScore(f"the scorer {self.spec} fails with {reason}") from error
        if not isinstance(found, dict):
            raise DiffpoError(f"the scorer {self.spec} returned {type(found).__name__}, not {{name: numbers}}")
        return {name: self._numbers(name, found, len(images)) for name in self.names}

    @property
    def rate(self) -> Any:
        """The class's own `rate`; None if it has none."""
        return getattr(self.inner, "rate", None)

    def _numbers(self, name: str, found: dict[str, Any], n: int) -> np.ndarray:
        if name not in found:
            raise DiffpoError(f"the scorer {self.spec} returned no number {name!r}, which its names list")
        try:
            values = np.asarray(found[name], np.float64)
        except (TypeError, ValueError, RuntimeError) as error:  # text, ragged lists, tensors with gradients or on a GPU
            raise DiffpoError(f"the scorer {self.spec}: {name} holds no numbers: {plain(error, 200)}") from None
        if values.shape != (n,):
            raise DiffpoError(f"the scorer {self.spec}: {name} has shape {values.shape} for {n} images, not ({n},)")
        return values


def _are_names(names: Any) -> bool:
    return (
        isinstance(names, (tuple, list))
        and len(names) == len(set(map(str, names))) > 0
        and all(isinstance(name, str) and NAME.fullmatch(name) for name in names)
    )
