"""Reading settings: a YAML file and `a.b=c` overrides, checked by pydantic; an unknown key names the nearest one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from .errors import DiffpoError


class Loader(yaml.SafeLoader):
    """Plain YAML lets the second of two equal keys win without a word; here they are an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key {key.value!r} is there twice,{key.start_mark}"
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parsed(text: str) -> Any:
    """ValueError if it is no YAML."""
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # what Python says of a 13th month, of `!!int` without digits, of endless brackets
        raise ValueError(f"{type(error).__name__}: {error}") from None


def numbers(value: Any) -> Any:
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: numbers(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [numbers(each) for each in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)e[-+]?\d+", value, re.IGNORECASE):
        return float(value)
    if value is None or (isinstance(value, (str, int, float)) and value == value):
        return value
    raise ValueError(f"expected numbers and text, not {_shown(value)}")  # also nan, which equals nothing on resuming


def read(path: str | Path, overrides: Sequence[str], kind: type[BaseModel]) -> Any:
    """Read a YAML file, apply ``overrides`` such as ``train.lr=1e-5`` and validate it as ``kind``.

    Raises DiffpoError that names the file and the key: unreadable file, unknown key, wrong type.
    """
    path = Path(path)
    try:
        settings = parsed(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DiffpoError(
            f"cannot read the config {path}: {error.strerror}; recipes to start from are in configs/"
        ) from None
    except ValueError as error:
        raise DiffpoError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise DiffpoError(f"{path} holds no settings: expected sections such as `model:` and `train:`")
    for override in overrides:
        _apply(settings, override)
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(problem, kind)}" for problem in error.errors())
        raise DiffpoError(f"{path}:\n{problems}") from None
    except RecursionError:
        raise DiffpoError(f"{path}: an alias (*name) stands within what it names") from None


def _apply(settings: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise DiffpoError(f"cannot read the override {override!r}: write section.key=value, e.g. train.lr=1e-5")
    try:
        value = parsed(text)
    except ValueError:
        raise DiffpoError(f"cannot read the value of the override {override!r}: it is not valid YAML") from None
    *sections, last = key.split(".")
    for section in sections:
        if settings.get(section) is None:
            settings[section] = {}
        settings = settings[section]
        if not isinstance(settings, dict):
            raise DiffpoError(f"cannot apply the override {override!r}: {section} is a value, not a section")
    settings[last] = value


def _explain(problem: dict, kind: type[BaseModel]) -> str:
    """One line on one pydantic error: the key as the user writes it, what is wrong, what to write instead."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        *parents, wrong = problem["loc"]
        known = list(_fields(kind, parents))
        near = difflib.get_close_matches(str(wrong), known, n=1, cutoff=0.6)
        last = {name.rsplit(".")[-1]: name for name in reversed(all_keys(kind))}
        everywhere = difflib.get_close_matches(str(wrong), last, n=1, cutoff=0.8)
        if near and str(wrong) not in last:  # a key that belongs into another section is nearer than any misspelling
            hint = f"did you mean {'.'.join([*map(str, parents), near[0]])}?"
        elif everywhere:
            hint = f"did you mean {last[everywhere[0]]}?"
        else:
            hint = f"known keys: {', '.join(known)}"
        return f"unknown key {key}: {hint}"
    if problem["type"] == "missing":
        return f"missing key {key}"
    text = problem["msg"].removeprefix("Value error, ")
    if not key:
        return text
    if isinstance(problem["input"], (dict, BaseModel)):  # settings that do not go together, not one value
        return f"{key}: {text}"
    return f"{key}: {text[0].lower()}{text[1:]} (got {_shown(problem['input'])})"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "a very long number"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _fields(model: type[BaseModel], sections: Sequence) -> dict:
    for name in sections:
        model = _section(model.model_fields[name].annotation)
    return model.model_fields


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field's type names, also one that may be null."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if section := _section(field.annotation):
            keys += all_keys(section, f"{prefix}{name}.")
    return keys
