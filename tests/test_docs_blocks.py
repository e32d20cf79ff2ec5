"""Every command and every Python block of the documentation, run or at least parsed.

A block names its language (sh, python, yaml, json or text). sh and python blocks are run, page by page, in a temporary
folder with `configs`, `assets`, a few pairs (`my-pairs`) and prompts (`prompts.txt`). Comments right above a block:

- `<!-- needs: gpu -->`, `network`, `weights`, `server` or `<!-- not run: REASON -->`: not run. Its commands are parsed
  all the same (see below), its Python is compiled, and what it imports of the two packages must exist.
- `<!-- continues -->`: this Python block goes on in the namespace of the one before it.
- `<!-- saved as: NAME.py -->`: this Python block becomes a module that later blocks can import.
- `<!-- given: pipe, noise -->`: these names (for a sh block: files) exist before the block; `GIVEN` below makes them.

Of a sh block only the `diffpo` commands run; make, pip, pytest and scripts are checked. Runs use the embedded model:
names of released models, sizes, precisions, scorers and numbers of steps are replaced by small ones (`stand_in`).

All commands are parsed as the page has them: verb and options by the command line itself, config and overrides by
`load_config`, names of solvers and scorers, targets of make, extras of pip, options of scripts. Other programs are
recognised by name. Keys, options and verbs in `inline code` must exist too, and so must the keys of YAML blocks and the
files and tests that a page names.
So a typo in a command or in a key fails here.
"""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from importlib import import_module
from pathlib import Path

import docs_commands
import pytest
import torch
import yaml
from docs_pages import LANGUAGES, NEEDS, PAGES, ROOT, blocks, inline

import samplers
from diffpo.cli import app

RELEASED = (  # stand for models that are not here
    "stabilityai/stable-diffusion-xl-base-1.0",
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
)
TINY = "assets/tiny-sdxl"
SMALL = {  # settings of `stand_in`
    "data.resolution": "32",
    "data.limit": "12",
    "train.precision": "no",
    "train.steps": "2",
    "train.warmup": "0",
    "train.batch_size": "2",
    "train.accumulation": "1",
    "train.eval_pairs": "4",
    "train.gradient_checkpointing": "false",
}
ROLLOUT = {
    "data.prompts": "prompts.txt",
    "objective.rollout.samples": "2",
    "objective.rollout.prompts": "1",
    "objective.rollout.steps": "3",
    "objective.rollout.updates": "1",
    "objective.rollout.keep": "null",
}
PYTHON = [page for page in PAGES if any(block.language in ("python", "sh") and block.runs for block in blocks(page))]


@pytest.mark.parametrize("page", PAGES)
def test_blocks_and_marks_are_of_known_kinds(page):
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block.place}: name the block's language, one of {', '.join(LANGUAGES)}"
        for mark in block.marks:
            kind, _, rest = mark.partition(": ")
            texts = {"not run", "given", "saved as"}
            known = rest in NEEDS if kind == "needs" else bool(rest) if kind in texts else mark == "continues"
            assert known, f"{block.place}: the comment {mark!r} is none that this test knows"


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for block in blocks(page):
        if block.saved_as:  # commands may name it
            (tmp_path / block.saved_as).write_text(block.text)
        for words in block.commands() if block.language == "sh" else []:
            try:
                docs_commands.check(words)
            except Exception as error:
                pytest.fail(f"{block.place}: {' '.join(words)}\n{type(error).__name__}: {error}")


@pytest.mark.parametrize("page", PAGES)
def test_python_compiles_and_data_is_read(page):
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, block.place, "exec")
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("diffpo", "samplers"):
                    missing = [one.name for one in node.names if not hasattr(import_module(node.module), one.name)]
                    assert not missing, f"{block.place}: {node.module} has no {', '.join(missing)}"
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "yaml":
            settings = yaml.safe_load(block.text)
            settings = {"objective": settings["settings"]} if "settings" in settings else settings  # a preset's file
            unknown = set(dotted(settings)) - docs_commands.keys()
            assert not unknown, f"{block.place}: no such key: {', '.join(sorted(unknown))}"


def dotted(settings: dict, prefix: str = ""):
    for name, value in settings.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict) and name not in ("optimizer_args", "link_options"):
            yield from dotted(value, f"{prefix}{name}.")


@pytest.mark.parametrize("page", PAGES)
def test_inline_code_names_what_exists(page):
    sections = "model|data|lora|objective|train|log|scorer|forward|inversion|rollout|reference"
    for span in inline(page):
        key = re.match(rf"((?:{sections})\.[a-z_0-9.]+)(?:=|: |$)", span)
        if key and not key[1].endswith((".json", ".jsonl", ".parquet", ".csv", ".txt", ".py")):
            assert key[1] in docs_commands.keys(), f"{page}: no config key is called {key[1]}"
        verb = re.match(r"diffpo ([a-z-]+)", span)
        assert not verb or verb[1] in docs_commands.verbs(), f"{page}: diffpo has no verb {verb[1]}"
        if verb:
            strange = set(re.findall(r"(?<!\S)--[a-z-]+", span)) - docs_commands.flags()
            assert not strange, f"{page}: `{span}`: no verb has the option {', '.join(strange)}"


@pytest.mark.parametrize("page", PAGES)
def test_files_and_tests_that_are_named_exist(page):
    for span in inline(page):
        if re.fullmatch(r"(tests|scripts|configs|assets|docs|diffpo|samplers)/[\w./*-]+", span):
            assert list(ROOT.glob(span.rstrip("/"))), f"{page}: there is no {span}"
        elif re.fullmatch(r"test_\w+\.py", span):
            assert list(ROOT.glob(f"tests/**/{span}")), f"{page}: there is no {span}"
        elif re.fullmatch(r"test_\w+\*?", span):
            assert f"def {span.rstrip('*')}" in all_tests(), f"{page}: there is no test {span}"


@cache
def all_tests() -> str:
    return "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))


@pytest.mark.parametrize("page", PYTHON)
def test_blocks_run(page, tmp_path, tmp_path_factory, monkeypatch):
    """All blocks of a page in one folder, in order, since later ones use what earlier ones made."""
    make_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("diffpo.commands.calibration_problem.REFERENCE_CALLS", 10)
    monkeypatch.setitem(SMALL, "data.cache", str(tmp_path_factory.getbasetemp() / "cache-of-pages"))
    namespace: dict = {}
    for block in blocks(page):
        if not block.runs or block.language not in ("python", "sh"):
            continue
        try:
            if block.language == "python":
                namespace = namespace if block.continues else {}
                namespace |= {name: GIVEN[name]() for name in block.given}
                if block.saved_as:
                    Path(block.saved_as).write_text(block.text)
                exec(compile(released(block.text), block.place, "exec"), namespace)
                continue
            for name in block.given:
                GIVEN[name]()
            for words in block.commands():
                if words[0].endswith("diffpo"):
                    app(stand_in(words[1:]), standalone_mode=False)
        except Exception as error:
            pytest.fail(f"{block.place}: {type(error).__name__}: {error}\n{block.text}")


def released(text: str) -> str:
    for name in RELEASED:
        text = text.replace(name, TINY)
    return text


def stand_in(arguments: list[str]) -> list[str]:
    """The command on the embedded model, with little to do."""
    verb, *rest = [released(word) for word in arguments]
    if verb in ("generate", "eval"):
        pairs = zip(rest[::2], rest[1::2], strict=True)  # all options of these verbs have a value
        kept = [word for pair in pairs if pair[0] not in ("--scorers", "--train-scorer") for word in pair]
        scored = ["--scorers", "shapes"] if verb == "eval" else []
        calls = [] if "--plan" in rest else ["--steps", "2"]
        return [verb, *kept, *scored, "--n", "2", *calls]
    if verb == "label":
        pairs = zip(rest[::2], rest[1::2], strict=True)
        kept = [word for pair in pairs if pair[0] != "--scorers" for word in pair]
        return [verb, *kept, "--scorers", "shapes.total", "--n", "2", "--images-per-prompt", "2", "--steps", "2"]
    if verb == "calibrate":
        return [verb, *rest, "--prompts", "shapes:train:4", "--method", "classical", "--n", "1", "--heldout", "1"]
    if verb not in docs_commands.CONFIGS:
        return [verb, *rest]
    config = yaml.safe_load((ROOT / next(word for word in rest if word.endswith(".yaml"))).read_text())
    given = [word.partition("=")[0] for word in rest if "=" in word]
    rollout = config.get("objective", {}).get("rollout", {})
    small = SMALL | (ROLLOUT if rollout else {}) | ({"objective.rollout.start": "1"} if "start" in rollout else {})
    if not config["model"]["path"].startswith("assets/") and "model.path" not in given:
        small |= {"model.path": TINY, "model.variant": "null", "model.vae": "null"}
    if any(key.startswith("log.samples.") for key in given):
        small |= {"log.samples.n": "2", "log.samples.steps": "2"}
    if verb == "loop":
        rest += ["--heldout", "prompts.txt", "--rounds", "1", "--n", "2", "--images-per-prompt", "2", "--steps", "2"]
    if verb == "train-scorer":
        small = {key: value for key, value in small.items() if key != "train.gradient_checkpointing"}
    return [verb, *rest, *(f"{key}={value}" for key, value in small.items())]


def make_folder(folder) -> None:
    """`configs`, `assets`, `my-pairs` in the README's format, `prompts.txt`."""
    import pyarrow.parquet as pq

    for name in ("configs", "assets"):
        (folder / name).symlink_to(ROOT / name)
    pairs = folder / "my-pairs"
    pairs.mkdir()
    rows = pq.read_table(ROOT / "assets/shapes-preferences/train.parquet").slice(0, 16).to_pylist()
    lines = []
    for number, row in enumerate(row for row in rows if row["label_0"] != 0.5):
        names = [f"{number:04}_good.png", f"{number:04}_bad.png"]
        for name, image in zip(names if row["label_0"] > 0.5 else names[::-1], ("jpg_0", "jpg_1"), strict=True):
            (pairs / name).write_bytes(row[image]["bytes"] if isinstance(row[image], dict) else row[image])
        lines.append({"prompt": row["caption"], "chosen_file_name": names[0], "rejected_file_name": names[1]})
    (pairs / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "prompts.txt").write_text("\n".join(row["caption"] for row in rows[:4]))


def pipeline():
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(ROOT / TINY)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run():
    """`runs/mine`, trained as the README does."""
    if not Path("runs/mine").exists():
        app(
            stand_in("train configs/sdxl_diffusion_dpo.yaml data.train=my-pairs output=runs/mine".split()),
            standalone_mode=False,
        )


def other():
    """`runs/other`, a second LoRA of the same model."""
    words = "train configs/sdxl_diffusion_dpo.yaml data.train=my-pairs train.seed=1 output=runs/other"
    if not Path("runs/other").exists():
        app(stand_in(words.split()), standalone_mode=False)


def favourites():
    """The better pictures of `my-pairs`, each with its text beside it."""
    folder = Path("favourites")
    if not folder.exists():
        folder.mkdir()
        for line in Path("my-pairs/metadata.jsonl").read_text().splitlines():
            row = json.loads(line)
            name = row["chosen_file_name"]
            (folder / name).write_bytes(Path("my-pairs", name).read_bytes())
            (folder / name).with_suffix(".txt").write_text(row["prompt"] + "\n")


def votes():
    """`runs/votes`, as `diffpo annotate my-pairs` leaves it."""
    from annotated import cast, make_session, mask

    if not Path("runs/votes").exists():
        Path("runs/votes").mkdir(parents=True)
        session = make_session(Path("runs/votes").absolute(), Path("my-pairs").absolute())
        for k, given in enumerate(session.next("ada", 9, [])["tasks"]):
            cast(session, given, 0, f"vote-{k:04d}", marks={"0": mask((32, 32), (0, 0, 16, 16))})


def network(x, t):
    return 0.1 * x


GIVEN = {
    "run": run,
    "votes": votes,
    "other": other,
    "favourites": favourites,
    "pipe": pipeline,
    "samplers": lambda: samplers,
    "model": lambda: network,
    "uncond_model": lambda: network,
    "noise": lambda: torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    "x": lambda: torch.ones(2, 4, 8, 8),
    "output": lambda: torch.full((2, 4, 8, 8), 0.1),
    "reference_output": lambda: torch.full((2, 4, 8, 8), 0.2),
    "schedule": samplers.VPDiscrete.scaled_linear,
    "betas": lambda: torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64).tolist(),
}
