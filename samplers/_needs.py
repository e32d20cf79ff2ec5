"""Packages that a part of `samplers` needs beyond torch and numpy: they are imported when that part is used."""

import importlib


def needs(module: str, what: str):
    """The module `module`, which `what` needs.

    Raises:
        ImportError: its package is not installed; the message says how to install it.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ImportError(f"{what} needs the package {package}: pip install {package}", name=error.name) from None
