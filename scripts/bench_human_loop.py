"""Three rounds of the human loop on the embedded model, with the oracle clicking in a real browser in a person's place.

    python scripts/bench_human_loop.py [--rounds 3] [--votes 100] [--seed 0] [--n 256] [--out runs/bench-human-loop]

Each round samples two pictures for each of ``--votes`` new prompts with the last LoRA, serves them with the page of
`diffpo annotate` to headless Chromium, votes with the arrow keys for the picture whose total is higher, exports the
votes, trains on from the last LoRA, and compares all LoRAs so far with the base on held-out prompts. The first round
trains at the rate of docs/label.md for 100 votes, the later ones at that of its loop. A finished round is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from diffpo.annotate.assign import Plan
from diffpo.annotate.export import Export
from diffpo.annotate.export import run as export
from diffpo.annotate.session import Session
from diffpo.commands.annotate import Shown, find
from diffpo.common.carried import HOME as ROOT
from diffpo.config import load_config
from diffpo.data.prompts import load_prompts
from diffpo.evaluation import evaluate
from diffpo.evaluation.generation import Generation
from diffpo.evaluation.scoring import Scoring
from diffpo.train.loop import train

sys.path.append(str(ROOT / "tests"))  # how the tests drive a browser

import chromium
from annotate_page import DESKTOP, begin, vote_by_oracle
from annotated import served

MODEL = ROOT / "assets" / "tiny-sdxl"
MADE = {"steps": 10, "guidance": 3.0, "batch_size": 64}
UPDATES, RATES = 50, (5e-4, 2e-4)  # of the first round, and of the others


def vote(folder: Path, number: int, lora: Path | None, args: argparse.Namespace) -> Path:
    """The votes of a round as a table of pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = load_prompts(f"shapes:train:{args.rounds * args.votes}")[number * args.votes : (number + 1) * args.votes]
    (folder / "prompts.txt").write_text("\n".join(texts))
    making = {"model": str(MODEL), "seed": 1000 * (args.seed + 1) + number, **MADE}
    making |= {"lora": str(lora)} if lora else {}
    tasks = find(folder, Shown(making=making, prompts=str(folder / "prompts.txt")))
    session = Session(folder, tasks, Plan(repeat=0.0))
    tasks.save(folder)
    browser = chromium.Browser(folder / "chromium")
    try:
        with served(session) as browser.own:
            begin(browser, browser.own, DESKTOP, "oracle")
            vote_by_oracle(browser, session)
    finally:
        browser.close()
    counts = export(folder, folder / "votes.parquet", Export())
    print(f"round {number + 1}: {counts['rows']} pairs of {counts['votes']} votes", flush=True)
    return folder / "votes.parquet"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--votes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-human-loop"))
    args = parser.parse_args()
    out, runs = args.out.resolve(), []
    for number in range(args.rounds):
        folder = out / f"round-{number + 1}"
        run, table = folder / "run", folder / "votes" / "votes.parquet"
        if not table.exists():
            vote(folder / "votes", number, runs[-1] if runs else None, args)
        settings = {"model.path": MODEL, "data.train": table, "output": run, "data.cache": out / "cache"}
        options = [f"{key}={json.dumps(str(value))}" for key, value in settings.items()]
        options += [f"train.steps={UPDATES}", f"train.lr={RATES[min(number, 1)]}", f"train.seed={args.seed}"]
        options += ["data.validation=null", *([f"lora.start={runs[-1]}"] if runs else [])]
        train(load_config(ROOT / "configs" / "quickstart.yaml", options))
        runs.append(run)
        arms = {"base": Generation(str(MODEL), **MADE, seed=1000)}
        arms |= {
            f"round-{k + 1}": Generation(str(MODEL), lora=str(each), **MADE, seed=1000) for k, each in enumerate(runs)
        }
        found = evaluate.run(out / "eval", arms, "shapes:heldout", args.n, Scoring(train_scorer="shapes.total"))
        for arm in list(arms)[1:]:
            rate = found.row("shapes.total", arm).win_rate
            print(f"{arm} over base: {rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}]", flush=True)


if __name__ == "__main__":
    main()
