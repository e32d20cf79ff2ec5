"""Make assets/tiny-turbo: a LoRA that turns assets/tiny-sdxl into a model of 4 calls without guidance. Seeded.

    python scripts/build_tiny_turbo.py targets --work build/turbo     # what the teacher makes of noised samples
    python scripts/build_tiny_turbo.py train --work build/turbo       # the student learns it in one call
    python scripts/build_tiny_turbo.py assemble --work build/turbo    # measure it and write assets/tiny-turbo

The method is plain regression. The teacher (tiny-sdxl with guidance) draws samples. These are noised to the four levels
where the student will be called. From each noised state the teacher's own ODE leads to one picture, which the student
learns to predict in one call. Sampling re-noises that prediction to the next level (solver `renoise`, as LCM, DMD2 and
Turbo models do). An update costs no teacher call, because the targets are made once.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch

from diffpo.commands.guided_model import PromptedModel
from diffpo.common.rng import generator
from diffpo.config import Lora, RolloutSettings
from diffpo.data.prompts import load_prompts
from diffpo.evaluation import generate
from diffpo.evaluation.generation import Generation
from diffpo.models.identity import base_identity
from diffpo.problems.policy import Policy
from diffpo.problems.regression import Conditioning
from diffpo.problems.transitions import sampler_steps
from diffpo.rollout.sampler import Walker
from diffpo.scorers.shapes import ShapesScorer
from diffpo.scorers.step.base import pictures
from diffpo.shapes import heldout_captions
from diffpo.weights import lora as lora_module
from samplers import Grid, sample

ASSETS = Path(__file__).resolve().parents[1] / "assets"
MODEL = ASSETS / "tiny-sdxl"
SEED, GUIDANCE = 31_400, 3.0
CAPTIONS, PER_CAPTION, BATCH = 700, 3, 60  # samples of the teacher
TEACHER_CALLS = 8  # for a whole picture; a later start takes its share, three at least
TURBO = RolloutSettings(step="renoise", steps=4, guidance=1.0)
LORA = Lora(rank=12, targets=["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"])
UPDATES, ROWS, LR, WARMUP = 420, 32, 2e-3, 30


def levels(family) -> list[int]:
    return [step.t for step in sampler_steps(TURBO, family.schedule(), family.prediction)]


@torch.no_grad()
def targets(work: Path) -> None:
    """(levels, n, C, h, w): the noised states, and the pictures that the teacher's ODE makes of them."""
    captions = load_prompts("shapes:train", CAPTIONS)
    teacher = PromptedModel(Generation(str(MODEL), guidance=GUIDANCE, device="cpu"), captions)
    family, schedule = teacher.family, teacher.family.schedule()
    prompts = [captions[i % len(captions)] for i in range(CAPTIONS * PER_CAPTION)]
    states, found, first = [], [], 0
    if (file := work / "targets.pt").exists():
        kept = torch.load(file, weights_only=True)
        states, found, first = [kept["x_t"]], [kept["x_0"]], kept["x_t"].shape[1]
    started = time.perf_counter()
    for start in range(first, len(prompts), BATCH):
        if time.perf_counter() - started > SECONDS:
            break
        part = prompts[start : start + BATCH]
        guided = teacher.at(part)
        draws = [generator(SEED, "turbo", start + i) for i in range(len(part))]
        shape = (len(part), *teacher.shape)
        common = {"schedule": schedule, "prediction": family.prediction, "solver": "dpmpp"}
        noise = torch.stack([torch.randn(teacher.shape, generator=draw) for draw in draws])
        x_0 = sample(guided, noise, steps=TEACHER_CALLS, grid=Grid(schedule, "logsnr", end="zero"), **common)
        rows, ends = [], []
        for t in levels(family):
            eps = torch.stack([torch.randn(teacher.shape, generator=draw) for draw in draws])
            x_t = family.add_noise(x_0, eps, torch.full((shape[0],), t))
            calls = max(3, round(TEACHER_CALLS * (t + 1) / 1000))
            grid = Grid(schedule, "logsnr", end="zero", t_start=(t + 1) / 1000)
            rows.append(x_t)
            ends.append(sample(guided, x_t, steps=calls, grid=grid, **common))
        states.append(torch.stack(rows))
        found.append(torch.stack(ends))
        print(f"{start + len(part)}/{len(prompts)}", end="\r", flush=True)
    made = {"x_t": torch.cat(states, 1), "x_0": torch.cat(found, 1)}
    torch.save({**made, "prompts": prompts[: made["x_t"].shape[1]]}, file)
    print(f"{made['x_t'].shape[1]} of {len(prompts)} samples")


def train(work: Path) -> None:
    """The student's x_0 in one call against the teacher's, mean over the four levels."""
    kept = torch.load(work / "targets.pt", weights_only=True)
    captions = list(dict.fromkeys(kept["prompts"]))
    base = PromptedModel(Generation(str(MODEL), guidance=1.0, device="cpu"), captions)
    network, family = base.network, base.family
    parameters = lora_module.add_lora(network.requires_grad_(False), LORA, [], seed=SEED)
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1.0, (k + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * min(1.0, k / UPDATES)))
    )
    step, log = 0, []
    if (work / "student.pt").exists():
        state = torch.load(work / "student.pt", weights_only=True)
        lora_module.set_lora_state(network, state["lora"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        step, log = state["step"], state["log"]
    times = torch.tensor(levels(family))
    average = {name: weight.detach().clone() for name, weight in lora_module.adapter_parameters(network).items()}
    if step:
        average = state["average"]
    started = time.perf_counter()
    while step < UPDATES and time.perf_counter() - started < SECONDS:
        draw = generator(SEED, "turbo update", step)
        which = torch.randint(len(times), (ROWS,), generator=draw)
        index = torch.randint(len(kept["prompts"]), (ROWS,), generator=draw)
        x_t, target, t = kept["x_t"][which, index], kept["x_0"][which, index], times[which]
        cond = base.encoded.conditions([kept["prompts"][i] for i in index.tolist()], base.device)
        alpha, sigma = family.alpha_sigma(t)
        out = Policy(family, network).output(x_t, t, Conditioning(cond))
        x_0 = (x_t - sigma * out) / alpha  # tiny-sdxl predicts noise
        loss = (x_0 - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for name, weight in lora_module.adapter_parameters(network).items():
                average[name].lerp_(weight, 0.02)
        step += 1
        if step % 100 == 0:
            log.append({"step": step, "loss": loss.item()})
            print(step, f"{loss.item():.4f}", flush=True)
    state = {"lora": lora_module.lora_state(network), "average": average, "step": step, "log": log}
    state |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save(state, work / "student.pt")
    print("finished" if step == UPDATES else f"stopped at {step}: run it again")


@torch.no_grad()
def drawn(model: PromptedModel, captions: list[str], seed: int) -> dict[str, float]:
    """Mean scores of pictures by four re-noising calls."""
    walker, scores = Walker(TURBO, model.family), {}
    for start in range(0, len(captions), 64):
        part = captions[start : start + 64]
        draws = [generator(seed, "turbo picture", start + i) for i in range(len(part))]
        noise = torch.stack([torch.randn(model.shape, generator=draw) for draw in draws])
        given = Conditioning(model.encoded.conditions(part, model.device))
        x_0 = walker.trajectories(Policy(model.family, model.network), noise, draws, given)[:, -1]
        found = ShapesScorer().score(pictures(model.family.decode(x_0)), part)
        for name, values in found.items():
            scores.setdefault(name, []).extend(np.asarray(values, float).tolist())
    return {name: float(np.nanmean(values)) for name, values in scores.items()}


def assemble(work: Path) -> None:
    state = torch.load(work / "student.pt", weights_only=True)
    captions = heldout_captions()[:512]
    model = PromptedModel(Generation(str(MODEL), guidance=1.0, device="cpu"), captions)
    model.family.pipe = pipe = generate.load(Generation(str(MODEL), device="cpu"))  # for its VAE
    model.family.vae_config = dict(pipe.vae.config)
    table = {"base": drawn(model, captions, SEED + 1)}
    lora_module.add_lora(model.network, LORA, [], seed=SEED)
    lora_module.set_lora_state(model.network, state["average"])
    folder = ASSETS / "tiny-turbo"
    folder.mkdir(exist_ok=True)
    about = {"objective": "distillation", "base": base_identity(model.network, "tiny-sdxl"), "step": state["step"]}
    lora_module.save_lora(
        folder / lora_module_file(),
        model.network,
        "unet",
        about,
        {name: weight.half() for name, weight in state["average"].items()},
    )
    table["turbo"] = drawn(model, captions, SEED + 1)
    (work / "scores.json").write_text(json.dumps(table, indent=1))
    for name, row in table.items():
        print(name, {key: round(value, 3) for key, value in row.items()})


def lora_module_file() -> str:
    from diffpo.weights.lora_file import FILE_NAME

    return FILE_NAME


SECONDS = 1e9
STAGES = {"targets": targets, "train": train, "assemble": assemble}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["all", *STAGES])
    parser.add_argument("--work", type=Path, required=True, help="folder for intermediate files")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="train: stop after so long, to go on later")
    args = parser.parse_args()
    SECONDS = args.seconds
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in STAGES if args.stage == "all" else [args.stage]:
        STAGES[stage](args.work)
