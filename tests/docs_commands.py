"""Checks of a documented command that do not run it: is it spelt as the program would read it?"""

from __future__ import annotations

import re
import tomllib
import typing
from functools import cache
from pathlib import Path

import typer
from docs_pages import ROOT
from pydantic import BaseModel

import samplers
from diffpo import scorers
from diffpo.cli import app
from diffpo.config import Config, load_config
from diffpo.config.step_scorer import ScorerConfig

CONFIGS = dict.fromkeys(("train", "check", "collect", "loop"), Config) | {"train-scorer": ScorerConfig}  # that read one
ELSEWHERE = ("git", "hf", "ssh", "source", "pre-commit", "huggingface-cli")  # programs of others: names alone


def check(words: list[str]) -> None:
    """AssertionError or an error of the program itself if the command is not one."""
    if words[0] == "accelerate":
        if "--config_file" in words:
            assert (ROOT / words[words.index("--config_file") + 1]).is_file(), "no such accelerate config"
        at = words.index("-m")
        assert words[1] == "launch" and words[at + 1] == "diffpo.cli"
        check_diffpo(words[at + 2 :])
    elif Path(words[0]).name == "diffpo":
        check_diffpo(words[1:])
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(word for word in words[1:] if "=" not in word) <= set(targets), "no such target"
    elif Path(words[0]).name == "pip" or words[:3] == ["python", "-m", "pip"]:
        check_pip(words)
    elif words[0] == "python" and words[1:3] == ["-m", "pytest"]:
        for word in (word for word in words[3:] if "/" in word):
            assert (ROOT / word.partition("::")[0]).exists(), f"no such test: {word}"
    elif Path(words[0]).name.startswith("python"):
        check_script(words[1:])
    else:
        assert words[0] in ELSEWHERE, f"an unknown program: {words[0]}"


def check_diffpo(arguments: list[str]) -> None:
    verb, given = parse(arguments)
    if verb in CONFIGS:
        load_config(ROOT / given["config"], given["overrides"] or [], CONFIGS[verb])
    if given.get("solver"):
        assert given["solver"] in samplers.SOLVERS, f"no such solver: {given['solver']}"
    for name in [*(given.get("scorers") or []), *([given["scorer"]] if "scorer" in given else [])]:
        scorers.parse(name)


def parse(arguments: list[str]) -> tuple[str, dict]:
    """The verb and its parsed arguments; typer's own error if they are none. Nothing is run."""
    group = typer.main.get_command(app)
    found: dict = {}
    for command in group.commands.values():
        command.callback = found.update
    if "--help" not in arguments:
        group.main(arguments, standalone_mode=False)
    return arguments[0], found


def check_pip(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        name, _, extras = word.removesuffix("]").partition("[")
        if name in ("diffpo", "."):
            assert set(filter(None, extras.split(","))) <= set(project["optional-dependencies"]), "no such extra"
        if word.endswith(".txt"):
            assert (ROOT / word).is_file()


def check_script(words: list[str]) -> None:
    path = ROOT / words[0]
    assert path.is_file(), f"no such script: {words[0]}"
    text = path.read_text() + "".join(file.read_text() for file in ROOT.glob("scripts/*_bench/*.py"))
    for flag in (word.partition("=")[0] for word in words[1:] if word.startswith("--")):
        assert f'"{flag}"' in text, f"{words[0]} has no option {flag}"


@cache
def keys() -> frozenset[str]:
    """Every key of a config, sections included, with and without `objective.` in front."""
    found = {name for model in (Config, ScorerConfig) for name in _keys(model, "")}
    return frozenset(found | {name.removeprefix("objective.") for name in found})


def _keys(model: type[BaseModel], prefix: str):
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for option in typing.get_args(field.annotation) or (field.annotation,):
            if isinstance(option, type) and issubclass(option, BaseModel):
                yield from _keys(option, f"{prefix}{name}.")


@cache
def flags() -> frozenset[str]:
    """Every option of the command line."""
    verbs = typer.main.get_command(app).commands.values()
    return frozenset(flag for verb in verbs for parameter in verb.params for flag in parameter.opts)


def verbs() -> list[str]:
    return list(typer.main.get_command(app).commands)
