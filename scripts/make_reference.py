"""Writes the reference pages from the code: docs/config.md, docs/cli.md and docs/papers.md.

python scripts/make_reference.py [--check]    (--check: say which pages are not up to date, write nothing)
"""

from __future__ import annotations

import argparse
import re
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import paper_index
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from diffpo.cli import app
from diffpo.config import Config
from diffpo.config.step_scorer import ScorerConfig

DOCS = Path(__file__).parents[1] / "docs"
MADE = "*Made by `python scripts/make_reference.py` from the code. Edit the code, then run it again.*"

CONFIG_HEAD = f"""\
# Config keys

{MADE}

A config is a YAML file with the sections below. On the command line any key can be replaced as `a.b=c`, for example
`train.lr=1e-5` or `objective.reference.policy=ema`; `null` is the empty value. An unknown key is an error that names
the nearest one. A preset (`objective.name`) has its own defaults for some keys of `objective`;
[papers.md](papers.md) lists them. `diffpo check CONFIG` prints what a config amounts to.
"""
CONFIG_TAIL = """
## `diffpo train-scorer`

Its configs have the sections `model` and `data` as above, and these:
"""
CLI_HEAD = f"""\
# Command line

{MADE}

`diffpo VERB --help` prints the same. Verbs that take a CONFIG also take overrides such as `train.lr=1e-5`
([all keys](config.md)). A fault in the input is one message and exit status 2; Ctrl-C saves and ends with status 130.
"""

WORDS = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}
BOUNDS = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if a page is not up to date")
    check = parser.parse_args().check
    stale = []
    for name, text in pages().items():
        if check:
            path = DOCS / name
            stale += [] if path.is_file() and path.read_text(encoding="utf-8") == text else [name]
        else:
            (DOCS / name).write_text(text, encoding="utf-8")
    if stale:
        raise SystemExit(f"not up to date: {', '.join(stale)}; run python scripts/make_reference.py")


def pages() -> dict[str, str]:
    """File name in docs/ -> text. Raises KeyError that names the key or option without a description."""
    return {"config.md": config_page(), "cli.md": cli_page(), "papers.md": paper_index.page()}


def config_page() -> str:
    lines = [CONFIG_HEAD, *config_tables(Config, ""), CONFIG_TAIL]
    lines += config_tables(ScorerConfig, "", skip=("model", "data"), level="###")
    return "\n".join(lines).rstrip() + "\n"


def config_tables(
    model: type[BaseModel], prefix: str, skip: tuple[str, ...] = (), level: str = "##", about: str = ""
) -> Iterator[str]:
    """A table of the plain keys of ``model``, then those of its sections."""
    sections = {name: section(field) for name, field in model.model_fields.items() if section(field)}
    yield f"{level} `{prefix.rstrip('.')}`\n" if prefix else f"{level} Without a section\n"
    if about:
        yield f"{about}\n"
    yield "| key | type | default | meaning |\n| --- | --- | --- | --- |"
    for name, field in model.model_fields.items():
        if name not in sections:
            yield row(f"`{prefix}{name}`", kind(field), default(field), meaning(model, name))
    yield ""
    for name, inner in sections.items():
        text = meaning(model, name)
        if name not in skip:
            yield from config_tables(inner, f"{prefix}{name}.", level=level, about=text)


def section(field: FieldInfo) -> type[BaseModel] | None:
    options = typing.get_args(field.annotation) or (field.annotation,)
    return next((one for one in options if isinstance(one, type) and issubclass(one, BaseModel)), None)


def meaning(model: type[BaseModel], name: str) -> str:
    if description := model.model_fields[name].description:
        return linked(description)
    raise KeyError(f"the config key {model.__name__}.{name} has no description: write one below its field")


def linked(text: str) -> str:
    return re.sub(r"docs/(\w+\.md)", r"[\1](\1)", " ".join(text.split()))


def kind(field: FieldInfo) -> str:
    named, null, _ = words(field.annotation).partition(" or null")
    separator = ", " if named.startswith("list") else " "
    return separator.join(filter(None, [named, limits(field.metadata)])) + null


def limits(notes: Iterable[Any]) -> str:
    """What the notes of a type demand of its values, in words."""
    found = []
    for note in notes:
        found += [f"{sign} {number(getattr(note, name))}" for name, sign in BOUNDS if hasattr(note, name)]
        found += [f"a multiple of {note.multiple_of}"] if hasattr(note, "multiple_of") else []
        found += [f"{note.min_length} or more"] if hasattr(note, "min_length") else []
    return ", ".join(found)


def words(annotation: Any) -> str:
    """A type in words: `list of text`, `a, b or c`, `integer or null`."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin in (types.UnionType, typing.Union):
        named = " or ".join(words(one) for one in inside if one is not type(None))
        return f"{named} or null" if type(None) in inside else named
    if origin is typing.Annotated:
        return " ".join(filter(None, [words(inside[0]), limits(inside[1:])]))
    if origin is list:
        return f"list of {words(inside[0])}" + ("s" if inside[0] in (int, float, Path) else "")
    if origin is dict:
        return "names with values" if inside[1] is Any else f"names with {words(inside[1])}s"
    return WORDS[annotation]


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default_factory() if field.default_factory else field.default
    return f"`{shown(value)}`"


def shown(value: Any) -> str:
    """A value as one writes it in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return number(value) if isinstance(value, float) else str(value)


def number(value: float) -> str:
    """2**63 and 2**-30 as powers; other numbers as they are written."""
    if isinstance(value, int) and value >= 2**20 and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def cli_page() -> str:
    group = typer.main.get_command(app)
    lines = [CLI_HEAD, "| verb | |", "| --- | --- |"]
    lines += [row(f"[{name}](#{name})", " ".join(verb.help.split())) for name, verb in group.commands.items()]
    for name, verb in group.commands.items():
        hints = typing.get_type_hints(verb.callback, include_extras=True)
        usage, rows = [], []
        for parameter in verb.params:
            if parameter.name == "help":
                continue
            text = parameter.help
            if not text:
                raise KeyError(f"diffpo {name}: {parameter.opts[0]} has no help")
            argument = not parameter.opts[0].startswith("-")
            called = (parameter.metavar or parameter.name.upper()) if argument else parameter.opts[0]
            if argument:
                usage.append(called)
            elif parameter.required:
                usage.append(f"{called} {parameter.metavar or parameter.name.upper()}")
            shape = "required" if parameter.required else preset(parameter)
            rows.append(
                row(f"`{called}`", option_kind(hints[parameter.name], parameter), shape, " ".join(text.split()))
            )
        lines += ["", f"## {name}", "", " ".join(verb.help.split()), ""]
        optional = any(not p.required and p.opts[0].startswith("-") for p in verb.params)
        usage += ["[OPTIONS]"] if optional else []
        lines += ["```text", " ".join(["diffpo", name, *usage]), "```", ""]
        lines += ["| argument or option | type | default | |", "| --- | --- | --- | --- |", *rows]
    return "\n".join(lines).rstrip() + "\n"


def preset(parameter: Any) -> str:
    if isinstance(parameter.show_default, str):
        return f"`{parameter.show_default}`"
    value = parameter.default
    return "" if value is None else f"`{shown(value)}`"


def option_kind(hint: Any, parameter: Any) -> str:
    inside, *notes = typing.get_args(hint)
    text = words(inside).removesuffix(" or null")
    limits = []
    for note in notes:
        for name, sign in (("min", "≥"), ("max", "≤")):
            bound = getattr(note, name, None)
            limits += [] if bound is None else [f"{sign} {bound}"]
    if text.startswith("list of ") and parameter.opts[0].startswith("-"):
        text = f"{text.removeprefix('list of ')}, repeatable"
    return " ".join([text, ", ".join(limits)]).strip()


if __name__ == "__main__":
    main()
