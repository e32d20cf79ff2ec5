"""Reading settings: a YAML file and `a.b=c` overrides, checked by pydantic; an unknown key names the nearest one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..common import carried
from ..common.errors import DiffpoError
from ..common.names import nearest
from ..common.text import plain, read_text

LIMIT = 2**17  # bytes of a config; the recipes have about 2**11
EXPANDED = 2**18  # characters and values of a config with every alias written out
DEPTH = 32  # values within one another
SHOWN = 20  # faults that a message names


class Loader(yaml.SafeLoader):
    """Plain YAML keeps the second of two equal keys without a warning, and can expand a few aliases to more values than
    fit into memory. Here both are errors."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _measure(node, {})
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # Python's own, of a 13th month, of `!!int` without digits, of endless digits
            raise _refused(f"{type(error).__name__}: {error}", node) from None


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Size and depth of what ``node`` expands to. ``known`` keeps those of each node, because an alias is its anchor's
    node."""
    if id(node) in known:
        size, depth = known[id(node)]
        if not size:
            raise _refused("an alias (*name) is used inside the value that it names", node)
        return size, depth
    known[id(node)] = (0, 0)
    size, depth, seen = 1, 0, set()
    if isinstance(node, yaml.ScalarNode):
        size += len(node.value)
        inner = []
    elif isinstance(node, yaml.MappingNode):
        inner = [each for pair in node.value for each in pair]
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise _refused(f"the key {_shown(key.value)} appears twice", key)
                seen.add(key.value)
    else:
        inner = node.value
    for each in inner:
        more, below = _measure(each, known)
        size, depth = size + more, max(depth, below + 1)
    if size > EXPANDED:
        raise _refused(f"its aliases (*name) stand for more than {EXPANDED:,} characters", node)
    if depth > DEPTH:
        raise _refused(f"values are nested more than {DEPTH} deep", node)
    known[id(node)] = (size, depth)
    return size, depth


def _refused(problem: str, node: yaml.Node) -> yaml.YAMLError:
    mark = node.start_mark
    return yaml.constructor.ConstructorError(problem=f"{problem} (line {mark.line + 1}, column {mark.column + 1})")


def parsed(text: str) -> Any:
    """The values of a YAML text. ValueError if it is not valid YAML, or larger than settings are."""
    if len(text) > LIMIT:
        raise ValueError(f"it has more than {LIMIT} characters, which is too many for settings")
    try:
        return yaml.load(text, Loader)  # noqa: S506 (a SafeLoader)
    except RecursionError:
        raise ValueError("brackets or sections are nested too deep") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def numbers(value: Any) -> Any:
    """``value`` with texts such as "1e-8" as numbers, in lists and sections too. ValueError for anything but numbers,
    text, lists and sections of these."""
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: numbers(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [numbers(each) for each in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+(\.\d*)?|\.\d+)e[-+]?\d+", value, re.IGNORECASE):
        return float(value)
    if value is None or (isinstance(value, (str, int, float)) and value == value):
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError("expected a number below 2**63")
        return value
    raise ValueError(f"expected numbers and text, not {_shown(value)}")  # also nan, which equals nothing on resuming


def read(path: str | Path, overrides: Sequence[str], kind: type[BaseModel], imports: bool = True) -> Any:
    """Read a YAML file, apply ``overrides`` such as ``train.lr=1e-5`` and validate it as ``kind``. ``imports``: see
    `section.may_import`.

    Raises DiffpoError that names the file and the key: unreadable file, unknown key, wrong type.
    """
    path = carried.found(Path(path))
    try:
        text = read_text(path, LIMIT)
    except OSError as error:
        raise DiffpoError(
            f"cannot read the config {path}: {error.strerror}; `diffpo recipes` lists recipes to start from"
        ) from None
    except ValueError as error:  # not text, too large, or a NUL in the name
        raise DiffpoError(f"cannot read the config {path}: {error}") from None
    try:
        settings = parsed(text)
    except ValueError as error:
        raise DiffpoError(f"{path} is not valid YAML: {plain(error, 500)}") from None
    if not isinstance(settings, dict):
        raise DiffpoError(f"{path} holds no settings: expected sections such as `model:` and `train:`")
    for override in overrides:
        _apply(settings, override, path)
    try:
        return kind.model_validate(carried.resolved(settings), context={"imports": imports})
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False)
        problems = [f"  {explain(fault, kind)}" for fault in faults[:SHOWN]]
        if len(faults) > SHOWN:
            problems.append(f"  and {len(faults) - SHOWN} more")
        raise DiffpoError("\n".join([f"{path}:", *problems])) from None


def _apply(settings: dict, override: str, path: Path) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise DiffpoError(f"cannot read the override {_shown(override)}: write section.key=value, e.g. train.lr=1e-5")
    try:
        value = parsed(text)
    except ValueError as error:
        raise DiffpoError(
            f"cannot read the value of the override {_shown(override)} of {path}: it is not valid YAML "
            f"({plain(error, 300)})"
        ) from None
    *sections, last = key.split(".")
    if len(sections) > DEPTH:
        raise DiffpoError(f"cannot apply the override {_shown(override)}: it names more than {DEPTH} sections")
    for section in sections:
        inner = settings.get(section)
        if not isinstance(inner, dict | None):
            what = f"{_shown(section)} is a value, not a section"
            raise DiffpoError(f"cannot apply the override {_shown(override)}: {what}")
        settings[section] = dict(inner or {})  # a copy: an alias of it elsewhere keeps its values
        settings = settings[section]
    settings[last] = value


def explain(problem: ErrorDetails, kind: type[BaseModel]) -> str:
    """One line for one pydantic error: the key as the user writes it, what is wrong, what to write instead."""
    key = plain(".".join(plain(part, 80) for part in problem["loc"]), 200)
    if problem["type"] == "extra_forbidden":
        *parents, wrong = problem["loc"]
        known = list(_fields(kind, parents))
        near = nearest(str(wrong), known)
        last = {name.rsplit(".")[-1]: name for name in reversed(all_keys(kind))}
        elsewhere = nearest(str(wrong), last)
        if near and str(wrong) not in last:  # a key of another section comes before a misspelt one of this section
            hint = f"did you mean {'.'.join([*map(str, parents), near])}?"
        elif elsewhere:
            hint = f"did you mean {last[elsewhere]}?"
        else:
            hint = f"known keys: {', '.join(known)}"
        return f"unknown key {key}: {hint}"
    if problem["type"] == "missing":
        return f"missing key {key}"
    text = plain(problem["msg"].removeprefix("Value error, "))
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
        section = _section(model.model_fields[name].annotation)
        assert section is not None  # noqa: S101 (pydantic has found a key in it)
        model = section
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
