"""Likelihoods, inpainting and --base-calls on the embedded model.

python scripts/bench_adjacent.py likelihood --lora runs/quickstart [--pairs 64] [--calls 30]
python scripts/bench_adjacent.py inpaint [--prompts 256]
python scripts/bench_adjacent.py arms --out runs/base-first       # a folder of `diffpo eval`

likelihood  log p of both pictures of validation pairs, with their captions and without guidance, by the base model and
            with the LoRA: how far training moved each, and in which pairs it moved the better picture further up.
            Latents are noised to the plan's first time. Both models see the same noise and the same random signs.
inpaint     the left half of a picture of the base model is kept, the right half drawn anew, and the whole is scored
            by the oracle. Pasting the right half of another picture of the same prompt is the rival.
arms        of every two arms: the change of the scores and of the diversity between the seeds of a prompt.

Intervals are 95 %: the studentised bootstrap over prompts of diffpo.evaluation.statistics.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from diffpo.commands.guided_model import PromptedModel
from diffpo.common.images import decode
from diffpo.common.rng import generator
from diffpo.data.prompts import load_prompts
from diffpo.evaluation import generate, manifest, signals
from diffpo.evaluation.generation import Generation
from diffpo.evaluation.statistics import mean_difference, win_rate
from diffpo.scorers.shapes import ShapesScorer
from diffpo.scorers.step.base import pictures
from samplers import build_plan, inpaint, likelihood

ROOT = Path(__file__).resolve().parents[1]
MODEL = str(ROOT / "assets" / "tiny-sdxl")
PAIRS = ROOT / "assets" / "shapes-preferences" / "validation.parquet"
SEED, BATCH = 41_000, 32


def with_vae(model: PromptedModel):
    model.family.pipe = pipe = generate.load(Generation(MODEL, device="cpu"))
    model.family.vae_config = dict(pipe.vae.config)
    return model


def noises(shape, purpose: str, first: int, n: int) -> torch.Tensor:
    return torch.stack([torch.randn(shape, generator=generator(SEED, purpose, first + i)) for i in range(n)])


def estimate(found) -> str:
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def log_probs(model: PromptedModel, x_0: torch.Tensor, captions: list[str], calls: int) -> np.ndarray:
    schedule = model.family.schedule()
    ends = {"t_start": schedule.t_min, "t_end": schedule.t_max, "end": "t_end"}
    plan, found = build_plan(schedule, "abm", calls, prediction=model.family.prediction, **ends), []
    for first in range(0, len(x_0), BATCH):
        part = slice(first, first + BATCH)
        eps = noises(x_0.shape[1:], "level", first, len(x_0[part]))
        x = float(plan.alpha[0]) * x_0[part] + float(plan.sigma[0]) * eps
        draws = [generator(SEED, "signs", first + i) for i in range(len(x))]
        found.append(likelihood.log_prob(plan, model.at(captions[part]), x, generator=draws).log_prob)
    return torch.cat(found).numpy()


def measure_likelihood(lora: str, pairs: int, calls: int) -> dict:
    rows = [row for row in pq.read_table(PAIRS).to_pylist() if row["has_label"] and row["label_0"] != row["label_1"]]
    rows = rows[:pairs]
    captions = [row["caption"] for row in rows]
    better = [int(row["label_1"] > row["label_0"]) for row in rows]
    base = with_vae(PromptedModel(Generation(MODEL, guidance=1.0, device="cpu"), captions))
    tuned = PromptedModel(Generation(MODEL, lora=lora, guidance=1.0, device="cpu"), captions)
    logs = {}
    for what, which in (("chosen", better), ("rejected", [1 - each for each in better])):
        images = [decode(row[f"jpg_{k}"]) for row, k in zip(rows, which, strict=True)]
        pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])
        x_0 = base.family.scale_latents(base.family.encode_image(pixels)["mean"])
        for name, model in (("base", base), ("tuned", tuned)):
            logs[name, what] = log_probs(model, x_0, captions, calls)
            print(
                f"{name} {what}: mean log p {logs[name, what].mean():.2f} nats of {x_0[0].numel()} numbers", flush=True
            )
    change = {what: logs["tuned", what] - logs["base", what] for what in ("chosen", "rejected")}
    zero = np.zeros(len(rows))
    return {
        **{f"change of {what}": estimate(mean_difference(zero, change[what], captions)) for what in change},
        "chosen minus rejected": estimate(mean_difference(change["rejected"], change["chosen"], captions)),
        "chosen moved further up": estimate(win_rate(change["rejected"], change["chosen"], captions)),
        "base: chosen is likelier": estimate(win_rate(logs["base", "rejected"], logs["base", "chosen"], captions)),
        "pairs": len(rows),
    }


def scored(model: PromptedModel, x_0: torch.Tensor, captions: list[str]) -> dict[str, np.ndarray]:
    found = ShapesScorer().score(pictures(model.family.decode(x_0)), captions)
    return {name: np.asarray(found[f"shapes.{name}"], float) for name in ("total", "following")}


@torch.no_grad()
def measure_inpainting(prompts: int, calls: int, guidance: float = 3.0) -> dict:
    captions = load_prompts("shapes:heldout", prompts)
    model = with_vae(PromptedModel(Generation(MODEL, guidance=guidance, device="cpu"), captions))
    schedule, kind = model.family.schedule(), model.family.prediction
    plain = build_plan(schedule, None, calls, prediction=kind, guidance=guidance, images=True)
    ddim, long = (build_plan(schedule, "ddim", n, prediction=kind, eta=1.0) for n in (calls, 5 * calls - 4))
    arms = {"dpmpp, 1 round": (build_plan(schedule, "dpmpp", calls, prediction=kind), 1)}
    arms |= {f"ddim eta 1, {rounds} rounds": (ddim, rounds) for rounds in (1, 2, 5)}
    arms["ddim eta 1, 1 round, calls of 5"] = (long, 1)
    mask = torch.zeros(model.shape, dtype=torch.bool)
    mask[..., : model.shape[-1] // 2] = True
    scores: dict[str, list] = {}
    for first in range(0, len(captions), BATCH):
        part = captions[first : first + BATCH]
        at, n = model.at(part), len(part)
        whole, other = (plain.run(at, noises(model.shape, name, first, n)) for name in ("whole", "other"))
        made = {"the whole picture": whole, "pasted": torch.where(mask, whole, other)}
        for name, (plan, rounds) in arms.items():
            draws = [generator(SEED, "inpaint", first + i) for i in range(n)]
            x = noises(model.shape, "inpaint start", first, n)
            made[name] = inpaint(plan, at, x, whole.masked_fill(~mask, torch.nan), rounds=rounds, generator=draws)
        for name, x_0 in made.items():
            scores.setdefault(name, []).append(scored(model, x_0, part))
        print(f"{first + n}/{len(captions)}", end="\r", flush=True)
    joined = {
        name: {key: np.concatenate([p[key] for p in parts]) for key in parts[0]} for name, parts in scores.items()
    }
    table = {}
    for name, values in joined.items():
        reference = joined["the whole picture"]
        table[name] = {key: float(each.mean()) for key, each in values.items()}
        table[name] |= {
            f"{key} difference": estimate(mean_difference(reference[key], values[key], captions)) for key in values
        }
    return table


def compare_arms(folder: Path) -> dict:
    """The second arm minus the first, and its win rate by `total`."""
    rows, scores = manifest.read_manifest(folder), pq.read_table(folder / "scores.parquet").to_pandas()
    found, table = {}, {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = sorted((row for row in rows if row["arm"] == arm), key=lambda row: (row["index"], row["seed"]))
        features = signals.features([Image.open(folder / row["file"]) for row in own])
        found[arm] = {"diversity": signals.diversity(features, [row["index"] for row in own])}
        mine = scores[scores["arm"] == arm].sort_values(["prompt_id", "seed"])
        for name in ("total", "following", "appearance"):
            found[arm][name] = mine[mine["scorer"].str.endswith(name)]["value"].to_numpy()
    for first, second in itertools.combinations(found, 2):
        table[f"{second} - {first}"] = line = {}
        for name, values in found[second].items():
            other = found[first][name]
            ids = np.arange(len(values)) // (len(values) // len(found[first]["diversity"]))
            line[name] = f"{other.mean():.4f} -> {values.mean():.4f}: {estimate(mean_difference(other, values, ids))}"
            if name == "total":
                line["wins"] = estimate(win_rate(other, values, ids))
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["likelihood", "inpaint", "arms"])
    parser.add_argument("--lora", help="likelihood: the LoRA")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--calls", type=int, help="by default 30 for likelihoods, 20 for inpainting")
    parser.add_argument("--out", type=Path, help="arms: the folder of `diffpo eval`")
    args = parser.parse_args()
    if args.what == "arms":
        result = compare_arms(args.out)
    elif args.what == "likelihood":
        result = measure_likelihood(args.lora, args.pairs, args.calls or 30)
    else:
        result = measure_inpainting(args.prompts, args.calls or 20)
    print(json.dumps(result, indent=1))
