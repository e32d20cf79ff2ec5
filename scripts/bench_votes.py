"""What a vote is worth: win rate over the base after training on so many oracle votes, some of them wrong.

python scripts/bench_votes.py [--out runs/bench-votes] [--seeds 0 1 2] [--minutes 4] [--tune] [--auto] [--report]

The pool are the pairs of assets/shapes-preferences without ties; a vote is the oracle's order of a pair's totals, and a
share of the clicks is wrong. Assignment: `random`; or `active`, where half of the votes are random, a model is trained
on them, and the other half are the pairs of `CANDIDATES` further ones that this model is least sure of (smallest mean
margin). The model that is measured is trained from the base on all votes.

Every finished cell is kept in OUT/results, by its content, and not run again. `--minutes` stops after the cell that is
running then. `--auto` runs the cells with `objective.beta: auto` instead: three quarters of the votes are trained on,
and the others are the held-out pairs. `--tune` compares `VARIANTS` on seed 100 alone (for more than 100 votes the first
two); `SETTINGS` were chosen there. `--report` prints the table.
"""

import argparse
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from objective_bench import job
from objective_bench.data import MODEL, PAIRS

from diffpo.common import tables
from diffpo.common.carried import HOME as ROOT

CANDIDATES, DRAWS, PROMPTS, TUNING = 600, 4, 256, 100
# by the number of votes; chosen with --tune on seed 100, by the win rate in total
SETTINGS = {
    100: {"objective.name": "diffusion_dpo", "objective.beta": "500", "train.steps": "50", "train.lr": "5e-4"},
    300: {"objective.name": "diffusion_dpo", "objective.beta": "500", "train.steps": "50", "train.lr": "5e-4"},
    1000: {"objective.name": "diffusion_dpo", "objective.beta": "500", "train.steps": "100", "train.lr": "5e-4"},
}
AUTO = {"objective.beta": "auto"}  # in place of the beta of `SETTINGS`
VARIANTS = (
    {"train.steps": "100"},
    {"train.steps": "50"},
    {"train.steps": "25"},
    {"train.steps": "100", "objective.beta": "2000"},
    {"train.steps": "100", "objective.name": "ipo"},
    {"train.steps": "100", "train.lr": "2e-4"},
    {"train.steps": "50", "train.lr": "2e-4"},
)
# the order in which cells are run: what the table needs most comes first
ORDER = [(n, "random", 0.0) for n in (100, 300, 1000)]
ORDER += [(100, "active", 0.0), (100, "random", 0.25), (300, "random", 0.25), (1000, "random", 0.25)]
ORDER += [(300, "active", 0.0), (100, "random", 0.1), (300, "random", 0.1), (1000, "random", 0.1)]
ORDER += [(1000, "active", 0.0), (100, "active", 0.25), (300, "active", 0.25), (1000, "active", 0.25)]
ORDER += [(100, "active", 0.1), (300, "active", 0.1), (1000, "active", 0.1)]


@dataclass(frozen=True)
class Cell:
    """One training and its measurement. ``wrong``: share of the votes that are turned round."""

    votes: int
    assignment: str
    wrong: float
    seed: int
    settings: tuple[tuple[str, str], ...]

    @property
    def auto(self) -> bool:
        return dict(self.settings)["objective.beta"] == "auto"

    @property
    def key(self) -> str:
        return sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def cell(votes: int, assignment: str, wrong: float, seed: int, change: dict[str, str] | None = None) -> Cell:
    settings = SETTINGS[votes] | (change or {})
    return Cell(votes, assignment, wrong, seed, tuple(sorted(settings.items())))


def pool() -> list[dict]:
    """The pairs that the oracle does not call equal, labelled by its totals (the data's own flips are undone)."""
    import pyarrow.parquet as pq

    rows = [row for row in pq.read_table(PAIRS).to_pylist() if row["label_0"] != 0.5]
    return [{**row, "label_0": float(row["score_0"] > row["score_1"])} for row in rows]


def voted(rows: list[dict], wrong: float, seed: int) -> list[dict]:
    """The rows as people click them: exactly a share ``wrong`` is turned round."""
    turned = np.random.default_rng([seed, 1]).permutation(len(rows))[: round(wrong * len(rows))]
    flip = {*turned.tolist()}
    return [{**row, "label_0": 1 - row["label_0"] if k in flip else row["label_0"]} for k, row in enumerate(rows)]


def write(path: Path, rows: list[dict]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = ("caption", "jpg_0", "jpg_1", "label_0")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([{name: row[name] for name in columns} for row in rows]), path)
    return path


def configured(out: Path, data: Path, run: Path, one: Cell, held_out: Path | None = None):
    from diffpo.config import load_config

    own = [f"{key}={value}" for key, value in one.settings]
    own += [f"model.path={MODEL}", f"data.train={data}", f"data.cache={out / 'cache'}"]
    own += [f"data.validation={held_out or 'null'}", "train.eval_every=1000"]
    own += [f"train.seed={one.seed}", "train.checkpoint_every=1000", f"output={run}"]
    return load_config(ROOT / "configs" / "quickstart.yaml", own)


def train(config) -> Path:
    from diffpo.train.loop import train

    if config.objective.beta != "auto":  # whose finished trials are kept after an interruption
        shutil.rmtree(config.output, ignore_errors=True)
    train(config)
    return config.output


def chosen(one: Cell, out: Path) -> list[dict]:
    """The votes of a cell."""
    rows = pool()
    order = np.random.default_rng([one.seed, 0]).permutation(len(rows)).tolist()
    if one.assignment == "random":
        return voted([rows[k] for k in order[: one.votes]], one.wrong, one.seed)
    half = one.votes // 2
    first = voted([rows[k] for k in order[:half]], one.wrong, one.seed)
    work = out / "work" / one.key
    config = configured(out, write(work / "first.parquet", first), work / "first", one)
    run = train(config)
    rest = [rows[k] for k in order[half : half + CANDIDATES + one.votes - half]]
    margins = sureness(config, run, write(work / "rest.parquet", rest))
    asked = np.argsort(np.abs(margins), kind="stable")[: one.votes - half].tolist()
    shutil.rmtree(work)
    return first + voted([rest[k] for k in asked], one.wrong, one.seed + 10_000)


def sureness(config, run: Path, data: Path) -> np.ndarray:
    """The mean margin u of the run's LoRA for every pair of ``data``, (n,), over one timestep of each quarter."""
    import torch

    from diffpo import models
    from diffpo.data.batches import Batches
    from diffpo.data.groups import load_groups
    from diffpo.objective import reference
    from diffpo.objective.reward import Objective, score
    from diffpo.problems.forward import Forward
    from diffpo.problems.policy import Policy
    from diffpo.weights import trained

    family = models.load(config.model, config.train.precision, config.data.resolution)
    family.load_encoders()
    batches = Batches(load_groups(config.data, str(data), "train"), config.data, family)
    family.free_encoders()
    weights = trained.load(config, family, "cpu")
    weights.begin(config, family)
    weights.restore(run, family.component)
    policy, source = Policy(family, weights.network), Forward(family)
    objective = Objective(
        config.objective,
        reference.make(config.objective.reference, policy),
        lambda t: torch.ones_like(t, dtype=torch.float32),
    )
    total, width = len(batches.groups), family.train_timesteps // DRAWS
    margins = torch.zeros(total, dtype=torch.float64)
    with torch.no_grad():
        for draw in range(DRAWS):
            for start in range(0, total, 32):
                own = list(range(start, min(start + 32, total)))
                ranges = [(draw * width, (draw + 1) * width)] * len(own)
                batch = batches.batch(own, [draw * total + k for k in own], "eval", ranges)
                margins[own] += score(policy, objective, source(batch)).margin.double() / DRAWS
    return margins.numpy()


def run(one: Cell, out: Path) -> dict:
    """The result of a cell, from OUT/results or made now."""
    file = out / "results" / f"{one.key}.json"
    if file.exists():
        return json.loads(file.read_text())
    started, work = time.perf_counter(), out / "work" / f"{one.key}-run"
    votes, held_out = chosen(one, out), None
    if one.auto:
        held_out = write(work / "held_out.parquet", votes[-(len(votes) // 4) :])
        votes = votes[: -(len(votes) // 4)]
    lora = train(configured(out, write(work / "votes.parquet", votes), work / "run", one, held_out))
    tuned = job.draw(MODEL.name, lora, range(PROMPTS))["scores"]
    compared = job.compare(base(out), tuned, PROMPTS)
    result = {**asdict(one), "seconds": time.perf_counter() - started, "compared": compared}
    if one.auto:
        result["beta"] = json.loads((lora / "beta.json").read_text())
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1))
    part.replace(file)
    shutil.rmtree(work)
    return result


def base(out: Path) -> dict:
    file = out / "base.json"
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(job.draw(MODEL.name, None, range(PROMPTS))["scores"]))
    return json.loads(file.read_text())


def line(result: dict) -> str:
    total = result["compared"]["total"]["win"]
    what = f"{result['votes']} {result['assignment']} {result['wrong']:.0%} seed {result['seed']}"
    what += f" beta {result['beta']['chosen']:g} of auto" if "beta" in result else ""
    return f"{what}: {total[0]:.1%} [{total[1]:.1%}, {total[2]:.1%}] in {result['seconds']:.0f} s"


def report(out: Path, seeds: list[int]) -> str:
    """The table of what was measured, one line for each number of votes, assignment and share of wrong clicks."""
    found = [json.loads(path.read_text()) for path in sorted((out / "results").glob("*.json"))]
    lines = [
        "| votes | assignment | wrong clicks | win rate by seed [95 %] | mean |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows: list[tuple[int, str, float, dict[str, str]]] = [(*one, {}) for one in ORDER]
    rows += [(votes, "random", 0.0, AUTO) for votes in SETTINGS]
    for votes, assignment, wrong, change in sorted(rows, key=lambda each: (each[0], each[1] == "active", each[2])):
        wanted = {cell(votes, assignment, wrong, seed, change).key for seed in seeds}
        own = [each for each in found if Cell(**{**_fields(each)}).key in wanted]
        if own:
            own.sort(key=lambda each: each["seed"])
            wins = [each["compared"]["total"]["win"] for each in own]
            cells = ", ".join(f"{100 * w:.0f} [{100 * low:.0f}, {100 * high:.0f}]" for w, low, high in wins)
            mean = np.mean([win[0] for win in wins])
            if change:
                assignment += f", beta auto ({', '.join(format(each['beta']['chosen'], 'g') for each in own)})"
            lines.append(tables.row([f"{votes:,}", assignment, f"{wrong:.0%}", cells, f"{mean:.1%} (n={len(wins)})"]))
    return "\n".join(lines)


def _fields(result: dict) -> dict:
    settings = tuple((key, value) for key, value in result["settings"])
    return {key: result[key] for key in ("votes", "assignment", "wrong", "seed")} | {"settings": settings}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-votes"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no cell after so many minutes")
    parser.add_argument("--votes", type=int, nargs="+", default=sorted(SETTINGS), help="only these numbers of votes")
    parser.add_argument("--assignment", nargs="+", default=["random", "active"], help="only these")
    parser.add_argument("--wrong", type=float, nargs="+", default=[0.0, 0.1, 0.25], help="only these shares")
    parser.add_argument("--tune", action="store_true", help="the variants, on seed 100, with random assignment")
    parser.add_argument("--auto", action="store_true", help="with objective.beta=auto, right clicks and random pairs")
    parser.add_argument("--report", action="store_true", help="print the table of what is finished")
    args = parser.parse_args(arguments)
    out, end = args.out.resolve(), time.perf_counter() + 60 * args.minutes
    if args.report:
        print(report(out, args.seeds))
        return
    wanted = [one for one in ORDER if one[0] in args.votes and one[1] in args.assignment and one[2] in args.wrong]
    cells = [cell(*one, seed) for one in wanted for seed in args.seeds]
    if args.tune:
        tried = {votes: VARIANTS if votes == 100 else VARIANTS[:2] for votes in args.votes}
        cells = [cell(votes, "random", 0.0, TUNING, change) for votes, own in tried.items() for change in own]
    if args.auto:
        cells = [cell(votes, "random", 0.0, seed, AUTO) for votes in args.votes for seed in args.seeds]
    for one in cells:
        if (out / "results" / f"{one.key}.json").exists() and not args.tune:
            continue
        if time.perf_counter() > end:
            print("the time is over; the same command goes on")
            return
        print(line(run(one, out)), dict(one.settings) if args.tune else "", flush=True)
    print("all cells are finished")


if __name__ == "__main__":
    main()
