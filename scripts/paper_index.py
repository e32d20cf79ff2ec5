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


LEFT = "Parts of methods, and methods, that are not here, with the reason."
LEFT_OUT = {
    "XPO": (
        "Xie et al. 2024, arXiv 2405.21046",
        "its bonus lowers the likelihood of the reference's sample, in a pair of one sample of each of the two. Here a "
        "round has one sampler, and -log p of a sample is an error without an upper bound, so the bonus pays for "
        "destroying the reference's pictures. `online_dpo` with several seeds explores instead.",
    ),
    "RSO": (
        "Liu et al. 2023, arXiv 2309.06657",
        "it accepts a sample of the reference with probability exp((score - best score)/beta). That needs many samples "
        "for an accepted one, and a picture costs 20 calls and more. Its loss is `link: hinge`; best and worst of the "
        "reference's samples are `source: samples` with `rollout.sampler: reference`.",
    ),
    "OFS-DPO's regulariser": (
        "Qi et al. 2024, arXiv 2406.05534",
        "the term between the fast and the slow LoRA could not be checked against the paper's text, and no code was in "
        "reach. The slow copy is here as the reference of `ofs_dpo`, and COFS-DPO's combination of domains is "
        "`diffpo combine LORA@WEIGHT LORA@WEIGHT`.",
    ),
    "KTO's estimate from mismatched captions": (
        "Ethayarajh et al. 2024, arXiv 2402.01306",
        "it takes one more pass for each image, and the loss would depend on how an update is cut into batches. The "
        "baseline is the mean reward of the update before.",
    ),
    "PAL's reward model": (
        "Chen et al. 2024, arXiv 2406.08469",
        "scorers are trained by `diffpo train-scorer`, for all users together. The mixture of prototypes is in `pal`.",
    ),
}

BESIDE = "What lies beside preference optimisation: sampling, distillation and others."
ADJACENT = {  # what it is -> source, where it is or why it is not
    "Likelihoods by the probability-flow ODE": (
        "Song et al. 2021, arXiv 2011.13456",
        "`samplers.likelihood.log_prob` ([README](../samplers/README.md#likelihoods)).",
    ),
    "Inpainting by replacement": (
        "Song et al. 2021, arXiv 2011.13456; rounds: Lugmayr et al. 2022, arXiv 2201.09865",
        "`samplers.inpaint`, with its bias ([README](../samplers/README.md#inpainting)).",
    ),
    "Diversity distillation": (
        "Gandikota and Bau 2025, arXiv 2503.10637",
        "`diffpo generate --base-calls 1`, measured in [evaluate.md](evaluate.md#the-base-model-for-the-first-calls).",
    ),
    "Few-step distillation: DMD2, consistency models": (
        "Yin et al. 2024, arXiv 2405.14867; Song et al. 2023, arXiv 2303.01469",
        "not here. It trains a student on its teacher and knows no preferences. DMD2 needs a third network and a "
        "discriminator; a consistency model saves the teacher's ODE, which is cheap for the embedded model. `pso` "
        "starts from a student that exists: assets/tiny-turbo, by `scripts/build_tiny_turbo.py`. There each noised "
        "state is regressed in one call onto the picture to which the guided teacher's whole ODE leads. For released "
        "models use published LCM, DMD2 or Turbo weights, or diffusers' script of consistency distillation.",
    ),
    "DiffIER": (
        "arXiv 2508.13628",
        "not here. It lessens an error of each step by several iterations before the step. An iteration costs a model "
        "call, and here calls are what samplers are compared by. `diffpo calibrate` fits a plan of the same number "
        "of calls to a guidance scale, and `samplers.Guidance` has an interval. It was not tried.",
    ),
    "ILF: imitation learning from language feedback": (
        "Scheurer et al. 2023, arXiv 2303.16755",
        "not here. A round refines a sample as a text asks, keeps the best refinement and trains on it. For pictures "
        "that is an editing model and a judge of edits. Refined pictures from elsewhere are data: `sft` on them, or "
        "`diffusion_dpo` on pairs of a refined picture and its original.",
    ),
    "PTQ4DM": (
        "Shang et al. 2022, arXiv 2211.15736",
        "not here. It chooses the time steps at which the activations of an 8-bit network are calibrated. "
        "`model.base_weights` quantises frozen weights only, and needs no calibration. Export the merged model for a "
        "quantiser of activations.",
    ),
    "SFD: score forgetting distillation": (
        "Chen et al. 2024, arXiv 2409.11219",
        "not here. It distils a one-step student in which one caption's score becomes another's, with three networks. "
        "Two things here are near it, and neither was measured as unlearning: `diffusion_dpo` on pairs whose rejected "
        "picture shows what is to be forgotten, as the pair loss of DUO (Park et al. 2024, arXiv 2407.21035); and "
        "`diffusion_npo` (`flipped`), which steers away from it and leaves the weights as they are.",
    ),
    "Ensembles for inverse problems": (
        "Zheng et al. 2024, arXiv 2409.20175",
        "not here. Many samples are moved together by a Kalman update with a measurement of each. There are no "
        "measurements in this package. `plan.step` is a pure function of a state, so such a loop needs no change of "
        "it. For a mask there is `samplers.inpaint`, for a differentiable measurement `samplers.gradients`.",
    ),
}


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
    lines += ["## Decided against", "", LEFT, ""]
    lines += [f"- **{name}** ({cited(paper)}): {reason}" for name, (paper, reason) in LEFT_OUT.items()]
    lines += ["", "## Adjacent systems", "", BESIDE, ""]
    lines += [f"- **{name}** ({cited(paper)}): {where}" for name, (paper, where) in ADJACENT.items()]
    return "\n".join(lines).rstrip() + "\n"
