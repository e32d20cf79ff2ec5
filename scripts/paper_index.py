"""The text of docs/papers.md, the index of published methods, from the presets. `make_reference.py` writes the page."""

import importlib
import re
from pathlib import Path

import yaml

from diffpo import links, methods
from diffpo.common.tables import Table
from diffpo.config import ObjectiveSettings

PAGE = Path(__file__).parents[1] / "docs" / "papers.md"

# settings that a preset leaves to the user: which scorer judges
YOURS = {
    "trajectory": {"rollout": {"scorers": ["pickscore"]}},
    "samples": {"rollout": {"scorers": ["pickscore"]}},
    "reward": {"rollout": {"scorers": ["pickscore"]}},
    "pool": {"rollout": {"step_scorer": "runs/step-scorer"}},
}

GROUPS = {
    "samples": "Samples made while training",
    "pair": "Pairs",
    "single": "Single images, liked or not",
    "list": "Ranked lists",
    "free": "Without a reference",
}

HEAD = """\
# Paper index

*Made by `python scripts/make_reference.py` from the presets. Edit those, then run it again.*

Every method is a preset of the same few choices, selected by `objective.name`. Keys that you write beside the name
replace the preset's choices; [composition.md](composition.md) explains how to combine them.

Notation. `err` = mean over C, h, w of (prediction - target)^2; `r = (beta/2) k omega(t) (err_ref - err)`, the implicit
reward, with k = 1 unless the source gives each problem its own factor; `u = r_chosen - r_rejected`; `sigma` the
logistic function. **beta always means this one**: where a paper writes it otherwise, "published" has the paper's number
and "notes" the conversion. Published hyper-parameters are those of the released code where there is one. "Not verified"
marks what could not be checked against the source.
"""


def settings(name: str) -> ObjectiveSettings:
    """The preset with values for what it leaves to the user."""
    yours = YOURS.get(methods.load(name).settings.get("source"), {})
    return ObjectiveSettings.model_validate({"name": name, **yours})


def group(found: ObjectiveSettings) -> str:
    if found.on_policy:
        return "samples"
    return "free" if found.reference.policy == "none" else links.kind(found.link)


def special(name: str) -> str:
    """The docstring of the method's file, without the method's name."""
    text = importlib.import_module(f"diffpo.methods.{name}").__doc__.strip()
    first, colon, rest = text.partition(": ")
    return rest if colon and len(first) < 50 else text


def cited(text: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def table(names: list[str]) -> str:
    rows = []
    for name in names:
        found, preset = settings(name), methods.load(name)
        source = found.source if found.error == "squared" else f"{found.source}, {found.error} error"
        link = "none" if found.source == "reward" else found.link
        cells = [f"[{name}](#{name})", cited(preset.paper.split(";")[0]), source, link, found.reference.policy]
        rows.append([*cells, special(name).rstrip(".").replace("|", "\\|")])
    return Table(["method", "paper", "source", "link", "reference", "what is special"], rows).markdown()


def entry(name: str) -> list[str]:
    preset = methods.load(name)
    yours = YOURS.get(preset.settings.get("source"), {})
    chosen = yaml.safe_dump({"objective": {"name": name, **yours}}, sort_keys=False, default_flow_style=None).strip()
    out = yaml.safe_dump(dict(preset.settings), sort_keys=False, default_flow_style=True, width=10**6).strip()
    lines = [f"### {name}", "", f"*{preset.title}.* {cited(preset.paper)}.", "", f"Loss: `{preset.equation}`", ""]
    lines += ["```yaml", chosen, f"# the preset: {out}", "```", ""]
    lines += [f"- published, {model}: {text}" for model, text in preset.published.items()]
    lines += [f"- results: {preset.results}"] if preset.results else []
    lines += [f"- notes: {preset.notes}"] if preset.notes else []
    return [*lines, ""]


def page() -> str:
    by_group = {key: [] for key in GROUPS}
    for name in methods.names():
        by_group[group(settings(name))].append(name)
    lines = [HEAD]
    for key, title in GROUPS.items():
        lines += [f"## {title}", "", table(by_group[key]), ""]
    lines += ["## The methods, one by one", ""]
    for name in methods.names():
        lines += entry(name)
    return "\n".join(lines).rstrip() + "\n"
