"""The model card beside a finished or exported LoRA: what it is, how to use it, how it was made, how it went."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import methods
from ..common import tables
from ..common.errors import DiffpoError
from ..common.files import write_atomic
from ..common.text import markdown, plain, read_text
from ..config import Config
from ..evaluation.charts import read_metrics
from ..evaluation.manifest import read_manifest
from ..models import family_class, pipeline_class
from ..models.file_header import is_one
from ..weights import full
from ..weights.header import number
from ..weights.lora_file import FILE_NAME
from . import pictures

SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "error/chosen_delta", "error/rejected_delta")

LORA, MERGED = "A preference LoRA for {}", "{} with a preference LoRA merged in"
TITLE = {"merged": MERGED, "single": MERGED, "full": "{}, fine-tuned on preferences"}

MEANING = (
    "Rewards and errors are measured against the base model on noised training images. They show that training worked, "
    "not that pictures are better. Scores of `diffpo eval` compare pictures of the base model and of the tuned one, "
    "from the same prompts and noise, with 95 % intervals."
)
USE = """```python
from diffusers import {cls}{more}

pipe = {cls}.{load}
{lora}image = pipe("a prompt").images[0]
```"""


def write_card(config: Config, about: dict[str, Any], size: str, output: Path) -> None:
    """Write ``output``/README.md; ``size`` says how much there was to learn from.

    Training numbers are means over the last 50 updates in metrics.jsonl.
    """
    table = training_table(output)
    base, method = base_name(config.model.path), methods.label(config.objective.name)
    if config.lora is None:
        network = full.WholeNetwork.find(output)
        assert network is not None  # noqa: S101 (the run has just written it)
        kind, title = json.loads((network / "config.json").read_text(encoding="utf-8"))["_class_name"], TITLE["full"]
        trained, tags, more = "all weights", [], ", " + kind
        load = f'pipe.{network.name} = {kind}.from_pretrained("FOLDER_OF_THIS_FILE", subfolder="{network.name}")'
    else:
        kind = {"lora": "", "dora": "DoRA of ", "lokr": "LoKr of "}[config.lora.kind]
        trained, tags, more, title = f"{kind}rank {config.lora.rank}", ["lora"], "", LORA
        load = f'pipe.load_lora_weights("FOLDER_OF_THIS_FILE", weight_name="{FILE_NAME}")'
        if config.lora.kind == "lokr":  # which diffusers' pipelines do not read, and its networks do
            part = family_class(config.model).component
            file = f'"FOLDER_OF_THIS_FILE", weight_name="{FILE_NAME}", prefix="{part}"'
            load = f"pipe.{part}.load_lora_adapter({file})"
    tags += ["text-to-image", "preference-optimization", method]
    write_atomic(
        output / "README.md",
        f"""{_front_matter(tags, base)}

# {title.format(markdown(base))}

Trained by diffpo with {method} (beta {config.objective.strength:g}) on {size} of
{markdown(config.data.train or config.data.prompts)}, {config.train.steps} updates of
{about["pairs_per_update"]} groups, learning rate {config.train.lr:g}, {trained}, {config.data.resolution} px.

{_use(config.model.path, pipeline_class(config.model), load, more)}

{table}

{_users(config)}Rewards and errors are measured against the base model on noised training images; they
say that training worked, not that pictures are better. For that, compare samples: `diffpo eval`.

Base {about["base"]["hash"]}, data {about["data_hash"]}. All settings are in `config.yaml`:
`diffpo train config.yaml output=NEW_FOLDER` repeats the run.
""".encode(),
    )


def _front_matter(tags: list[str], base: str = "", relation: str = "", more: Sequence[str] = ()) -> str:
    """The hub's YAML header. ``base`` is text from elsewhere: a string of JSON, which YAML reads as it is. ``more``:
    further lines."""
    lines = [f"base_model: {json.dumps(plain(base), ensure_ascii=False)}"] if base else []
    lines += [f"base_model_relation: {relation}"] if relation else []
    return "\n".join(["---", *lines, "library_name: diffusers", f"tags: [{', '.join(tags)}]", *more, "---"])


def training_table(folder: Path, step: int | None = None) -> str:
    """What the metrics.jsonl of a run's ``folder`` says up to ``step``, as a Markdown table; empty without one."""
    rows = [row for row in read_metrics(folder) if step is None or row["step"] <= step]
    table = tables.Table(["training", ""])
    for name in SHOWN:
        values = [row[name] for row in rows[-50:] if name in row]
        if values:
            table.rows.append((name, f"{sum(values) / len(values):.4g}"))
    held_out = next((row for row in reversed(rows) if "eval/accuracy" in row), None)
    if held_out:
        pairs = f" ({held_out['eval/pairs']:.0f} pairs)" if "eval/pairs" in held_out else ""
        table.rows.append((f"held-out pair accuracy{pairs}", f"{held_out['eval/accuracy']:.3f}"))
    return table.markdown() if rows else ""


def _users(config: Config) -> str:
    if config.objective.steered:
        weights = " ".join(f"{name}:{1 / len(config.data.columns.rewards):.2g}" for name in config.data.columns.rewards)
        return (
            "Loaded like this it weighs no reward in particular. To weigh the rewards that it was trained with:\n"
            f'`diffpo generate --model MODEL --lora FOLDER_OF_THIS_FILE --steer "{weights}"`.\n\n'
        )
    if not config.objective.users:
        return ""
    return (
        "Loaded like this it is not personalised. To personalise it for a user, give a few pairs of that user:\n"
        "`diffpo generate --model MODEL --lora FOLDER_OF_THIS_FILE --user-pairs PAIRS`.\n\n"
    )


@dataclass(frozen=True)
class Shown:
    """What a card shows of an export: ``usage``, how to load it; ``tables`` of what was measured; its ``pictures``."""

    usage: str
    tables: list[str]
    pictures: list[pictures.Pair]


def export_card(model: str, about: dict[str, Any], form: str, shown: Shown, lora_hash: str) -> str:
    """The card of an export as ``form`` (of `export.Export`, or full: a merged model without a LoRA). ``about`` is what
    is `header.known` of how it was trained, ``model`` its base."""
    relation = "finetune" if form in TITLE else "adapter"  # the hub's words
    tags = [*(["lora"] if relation == "adapter" else []), "text-to-image", "preference-optimization"]
    tags += [about["objective"]] if "objective" in about else []
    whose = "Its weights have" if form == "full" else "The LoRA's file has"
    named = (model, relation) if is_hub_id(model) else ("", "")  # the hub refuses a base that it does not have
    parts = [
        _front_matter(tags, *named, pictures.gallery(shown.pictures)),
        f"# {TITLE.get(form, LORA).format(markdown(base_name(model)))}",
        f"{_made(about)} {whose} sha256 {lora_hash}.",
        shown.usage,
        *([pictures.table(shown.pictures)] if shown.pictures else []),
        *[table for table in shown.tables if table],
        *([MEANING] if any(shown.tables) else []),
        "Licence: not chosen yet. Add `license:` to the header; the base model's licence holds for this too.",
    ]
    return "\n\n".join(parts) + "\n"


def _made(about: dict[str, Any]) -> str:
    """How it was trained, as far as ``about`` says it."""
    if "objective" not in about:
        return "It does not say how it was trained."
    text = f"Trained by diffpo with {about['objective']}"
    if "beta" in about:
        text += f" (beta {about['beta']:g})"
    step, each, sources = about.get("step"), about.get("pairs_per_update"), []
    if step is not None:
        text += f", {step} updates"
    if each is not None:
        text += f" of {each} groups" if step is not None else f", updates of {each} groups"
    sources += [f"{step * each} in all"] if step is not None and each is not None else []
    sources += [f"data {about['data_hash']}"] if "data_hash" in about else []
    sources += [f"base {about['base']['hash']}"] if "hash" in about.get("base", {}) else []
    return text + (f" ({', '.join(sources)})." if sources else ".")


def usage(form: str, name: str, model: str, pipeline: str, users: bool, part: str | None = None) -> str:
    """How to load the file ``name`` (or the merged pipeline) of a model and its ``pipeline``'s class; ``users``: the
    LoRA was trained with users; ``part``: of a LoKr, which diffusers' pipelines do not read, and their parts do."""
    name = plain(name).replace("`", "'")
    if form == "kohya":
        text = f"Put `{name}` where ComfyUI, A1111 or Forge look for LoRAs; strength 1 is the trained strength."
    elif form == "comfyui":
        text = f"Put `{name}` where ComfyUI or Forge look for LoRAs; strength 1 is the trained strength."
    elif form == "merged":
        text = USE.format(cls="DiffusionPipeline", more="", load="from_pretrained('THIS_FOLDER')", lora="")
    elif form == "single":
        text = (
            f"Put `{name}` where ComfyUI, A1111 or Forge look for checkpoints (a transformer alone: for diffusion "
            f"models). `diffpo` takes it as `--model` and as `model.path`."
        )
    else:
        load = f"pipe.{part}.load_lora_adapter" if part else "pipe.load_lora_weights"
        prefix = f', prefix="{part}"' if part else ""
        text = _use(model, pipeline, f'{load}("THIS_FOLDER", weight_name="{name}"{prefix})')
    if not users:
        return text
    text += "\n\nIt was trained with users; loaded like this it is not personalised."
    if form == "diffusers":
        text += " To personalise it: `diffpo generate --model MODEL --lora THIS_FOLDER --user-pairs PAIRS`."
    return text


def _use(model: str, pipeline: str, load: str, more: str = "") -> str:
    """Loading ``model`` by diffusers and then, with ``load``, what was trained."""
    if is_one(model):
        return USE.format(
            cls=pipeline, more=more, load=f"from_single_file({plain(base_name(model))!r})", lora=f"{load}\n"
        )
    source = plain(model) if is_hub_id(model) else "FOLDER_OF_THE_BASE_MODEL"
    return USE.format(cls="DiffusionPipeline", more=more, load=f"from_pretrained({source!r})", lora=f"{load}\n")


def is_hub_id(model: str) -> bool:
    """Whether ``model`` can name a model on the hub, and is no folder or file here."""
    named = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model, re.ASCII) and len(model) <= 96  # the hub's limit
    return bool(named) and not os.path.isdir(model) and not is_one(model)


def base_name(model: str) -> str:
    """A model's name for others: without its path on this disk, which is private."""
    return model if is_hub_id(model) else os.path.basename(os.path.abspath(os.path.expanduser(model)))


def evaluation_table(folder: Path, lora_hash: str) -> str:
    """The summary.json of a folder of `diffpo eval` as a Markdown table. DiffpoError if there is none, or if its
    pictures are another LoRA's."""
    try:
        summary = json.loads(read_text(folder / "summary.json"))
        if not isinstance(summary["rows"], list):
            raise TypeError("rows is no list")
        columns = ["score", "base", "tuned", "tuned - base", "win rate", "pictures", "trained on"]
        table = tables.Table(columns, [_cells(row) for row in summary["rows"]]).markdown()
        prompts = _number(summary["prompts"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DiffpoError(
            f"cannot read summary.json in {folder} ({error}): give a folder that `diffpo eval` has finished"
        ) from None
    tuned = [row for row in read_manifest(folder) if row["arm"] == "tuned"]
    if not tuned:  # it scored pictures from elsewhere
        return f"{table}\n\nThe pictures were made outside this evaluation, so their LoRA is not recorded."
    if any(row.get("lora_hash") != lora_hash for row in tuned):
        raise DiffpoError(f"the results in {folder} belong to another LoRA, {tuned[0].get('lora')}; evaluate this one")
    settings = [tuned[0].get(key, "unknown") for key in ("steps", "solver", "guidance", "dtype")]
    steps, solver, guidance, dtype = (f"{each:g}" if number(each) else markdown(each, 40) for each in settings)
    how = f"{steps} steps of {solver}, guidance {guidance}, {dtype}"
    return f"{table}\n\n{prompts:g} prompts, {how}."


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    (difference, low, high), (wins, least, most) = (
        [_number(row[name][key]) for key in ("value", "low", "high")] for name in ("difference", "win_rate")
    )
    return (
        markdown(row["scorer"]),
        f"{_number(row['base']):.4g}",
        f"{_number(row['tuned']):.4g}",
        f"{difference:+.4g} ({low:.4g} to {high:.4g})",
        f"{wins:.1%} ({least:.1%} to {most:.1%})",
        f"{_number(row['n']):g}",
        markdown(row["training_signal"], 40),
    )


def _number(value: Any) -> float:
    if not number(value):
        raise ValueError(f"{plain(repr(value), 40)} is no number")
    return value
