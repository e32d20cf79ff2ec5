"""Python objects named in settings, as `package.module:attribute`.

Importing a module runs it. So a name is taken from the user's config or command line only, never from a file that
describes a model or a LoRA.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from .errors import DiffpoError
from .names import nearest
from .text import plain


def search_working_directory() -> None:
    """Let Python find modules in the working directory too, after all others: the installed command does not."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())


def load_attribute(spec: str, key: str, kind: str, fits: Callable[[Any], bool]) -> Any:
    """The object that ``spec`` names: `package.module:attribute`, or `package.module.attribute` without a colon.

    The module is found as for ``python -m``, but the working directory comes last: a file there hides no installed
    package.

    Args:
        key: what the name was given for, e.g. "train.optimizer"; it begins the message.
        kind: what is expected, e.g. "a class derived from torch.optim.Optimizer".
        fits: whether an object is of that kind.

    Raises DiffpoError: the module cannot be imported, has no such attribute (with the nearest name of that kind), or
    the attribute is of another kind.
    """
    given = f"{key} {plain(spec, 200)!r}"
    name, _, attribute = spec.rpartition(":" if ":" in spec else ".")
    if not (attribute.isidentifier() and all(part.isidentifier() for part in name.split("."))):
        raise DiffpoError(f"{given} cannot be imported: write package.module:attribute, the name of {kind}")
    search_working_directory()
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:  # a module that is imported may raise anything
        reason = plain(f"{type(error).__name__}: {error}", 300)
        raise DiffpoError(f"{given} cannot be imported: {reason}; is its package installed?") from None
    try:
        found = getattr(module, attribute)
    except AttributeError:
        known = [each for each, value in vars(module).items() if each[0] != "_" and fits(value)]
        near = nearest(attribute, known)
        advice = f"; did you mean {near}?" if near else ""
        place = plain(getattr(module, "__file__", None) or name, 200)
        raise DiffpoError(f"{given} cannot be imported: {place} has no attribute {attribute!r}{advice}") from None
    except (Exception, SystemExit) as error:  # a module may load its parts on demand
        reason = plain(f"{type(error).__name__}: {error}", 300)
        raise DiffpoError(f"{given} cannot be imported: {reason}") from None
    if not fits(found):
        raise DiffpoError(f"{given} is not {kind}")
    return found
