"""Does the displacement score find the pairs whose better picture gets worse?

python scripts/bench_displacement.py [--out runs/bench-displacement] [--pairs 400] [--single 150] [--seeds 0 1 2]
python scripts/bench_displacement.py --filter [--out runs/bench-displacement] [--seeds 0 1 2]

For pairs of assets/shapes-preferences both scores of `diffpo.labelling.displacement` are set against the change of the
better picture's denoising error (mean over `DRAWS` draws of noise that neither the score nor training has seen):

alone     after one step of gradient descent on this pair alone, from the base, on the weights of a fresh LoRA;
together  after 100 updates of configs/quickstart.yaml on all pairs, for each training seed.

Spearman's correlation; 95 % interval of a bootstrap over captions. Finished stages are kept in OUT.

With --filter, for each seed: `FROM` pairs are drawn, and a model is trained on the half of them with the smaller score
(as `diffpo label --filter 0.5`), and another on a random half, both by the recipe of bench_votes for 300 votes. Win
rates of both over the base, and of the first over the second, by the oracle's total on bench_votes' held-out prompts.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import bench_votes
import numpy as np
import torch
from objective_bench import job
from objective_bench.data import MODEL
from scipy.stats import spearmanr

from diffpo import models
from diffpo.common.parts import Parts
from diffpo.config import Data, Model
from diffpo.data.batches import Batches
from diffpo.data.groups import load_groups
from diffpo.evaluation.statistics import win_rate
from diffpo.labelling.displacement import Filter, score_pairs
from diffpo.objective.reward import squared_error
from diffpo.problems.forward import Forward
from diffpo.weights import trained

DRAWS, STEP, BETA, ROWS, FROM = 8, 2e-3, 500.0, 32, 400
RECIPE = {"train.steps": "100"}


class Measured:
    """The pairs with the network: errors of the better pictures, on fixed draws."""

    def __init__(self, data: Data, config) -> None:
        self.family = models.load(config.model, "no", data.resolution)
        self.family.load_encoders()
        self.groups = load_groups(data, str(data.train), "train")
        self.batches = Batches(self.groups, data, self.family)
        self.family.free_encoders()
        self.weights = trained.load(config, self.family, "cpu")
        self.parameters = self.weights.begin(config, self.family)
        self.source, self.width = Forward(self.family), self.family.train_timesteps // 4

    def regression(self, pairs: list[int], draw: int, purpose: str):
        """Noise number ``draw``; its quarter of the timesteps is draw modulo 4."""
        quarter = draw % 4
        ranges = [(quarter * self.width, (quarter + 1) * self.width)] * len(pairs)
        places = [draw * len(self.groups) + k for k in pairs]
        return self.source(self.batches.batch(pairs, places, purpose, ranges))

    def errors(self, pairs: list[int], base: bool) -> np.ndarray:
        """(n,): of the better pictures, means over `DRAWS` draws."""
        total, network = torch.zeros(len(pairs)), self.weights.network
        for draw in range(DRAWS):
            for start in range(0, len(pairs), ROWS):
                part, own = pairs[start : start + ROWS], self.regression(pairs[start : start + ROWS], draw, "held out")
                n = len(part)
                cond = {name: value[:n] for name, value in own.conditioning.cond.items()}
                with torch.no_grad():
                    if base:
                        with self.weights.switched(None):
                            found = self.family.predict(network, own.x_t[:n], own.t[:n], cond)
                    else:
                        found = self.family.predict(network, own.x_t[:n], own.t[:n], cond)
                total[start : start + n] += squared_error(found, own.target[:n]) / DRAWS
        return total.numpy()

    def alone(self, pair: int) -> float:
        """The change of the better picture's error after one step on this pair."""
        start = [parameter.detach().clone() for parameter in self.parameters]
        before = self.errors([pair], base=True)[0]
        loss = torch.zeros(())
        for draw in range(4):
            own = self.regression([pair], draw, "step")
            found = squared_error(
                self.family.predict(self.weights.network, own.x_t, own.t, own.conditioning.cond), own.target
            )
            # at the base u = 0, where the gradient of -log sigma(u) is that of beta / 4 times the difference
            loss = loss + BETA / 4 * (found[0] - found[1]) / 4
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                if gradient is not None:
                    parameter -= STEP * gradient
        change = float(self.errors([pair], base=False)[0] - before)
        with torch.no_grad():
            for parameter, value in zip(self.parameters, start, strict=True):
                parameter.copy_(value)
        return change


def correlation(score: np.ndarray, change: np.ndarray, captions: list[str]) -> dict:
    """Spearman's, with a bootstrap over captions, and the mean change of the top and of the bottom quarter."""
    _, cluster = np.unique(captions, return_inverse=True)
    members = [np.flatnonzero(cluster == k) for k in range(cluster.max() + 1)]
    rng, found = np.random.default_rng(0), []
    for _ in range(2000):
        own = np.concatenate([members[k] for k in rng.integers(len(members), size=len(members))])
        found.append(spearmanr(score[own], change[own]).statistic)
    order, quarter = np.argsort(score), len(score) // 4
    return {
        "spearman": float(spearmanr(score, change).statistic),
        "interval": np.quantile(found, [0.025, 0.975]).tolist(),
        "n": len(score),
        "rises": float((change > 0).mean()),
        "bottom": float(change[order[:quarter]].mean()),
        "top": float(change[order[-quarter:]].mean()),
    }


def kept(path: Path, make):
    """What ``make`` gives, as JSON in ``path``."""
    if not path.exists():
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def _data(source: Path, out: Path) -> Data:
    return Data(train=str(source), resolution=32, cache=str(out / "cache"))


def scored(source: Path, out: Path) -> np.ndarray:
    """(n, 2) of the pairs in ``source``: the scores of hidden features and of gradients."""
    data, parts = _data(source, out), Parts(out / "scores", "scores")
    keys = score_pairs(data, Filter(0.0, Model(path=str(MODEL))), parts)
    return np.array([parts.rows[keys[k]] for k in sorted(keys)])


def filtered(out: Path, seed: int) -> dict:
    """Win rates [value, low, high] of the two trainings of a seed over the base, and of the first over the second."""
    rows = bench_votes.pool()
    draw = np.random.default_rng([seed, 2])
    rows = [rows[k] for k in draw.permutation(len(rows))[:FROM]]
    gradient = scored(bench_votes.write(out / f"from-{seed}.parquet", rows), out)[:, 1]
    assert len(gradient) == FROM
    halves = {"kept": np.argsort(gradient, kind="stable")[: FROM // 2], "random": draw.permutation(FROM)[: FROM // 2]}
    one, totals, found = bench_votes.cell(300, "random", 0.0, seed), {}, {}
    for name, half in halves.items():
        file = bench_votes.write(out / f"{name}-{seed}.parquet", [rows[k] for k in sorted(half.tolist())])
        lora = bench_votes.train(bench_votes.configured(out, file, out / f"filter-{name}-{seed}", one))
        tuned = job.draw(MODEL.name, lora, range(bench_votes.PROMPTS))["scores"]
        found[name] = job.compare(bench_votes.base(out), tuned, bench_votes.PROMPTS)["total"]["win"]
        totals[name] = np.array(tuned["shapes.total"])
    rate = win_rate(totals["random"], totals["kept"], np.arange(bench_votes.PROMPTS))
    return {**found, "kept over random": [rate.value, rate.low, rate.high]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-displacement"))
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--single", type=int, default=150, help="pairs that are also trained on alone")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--filter", action="store_true", help="train on filtered and on random pairs instead")
    args = parser.parse_args(arguments)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.filter:
        for seed in args.seeds:
            found = kept(out / f"filtered-{seed}.json", lambda seed=seed: filtered(out, seed))
            shown = "; ".join(f"{name} {v:.1%} [{low:.1%}, {high:.1%}]" for name, (v, low, high) in found.items())
            print(f"seed {seed}: {shown}", flush=True)
        return
    rows = bench_votes.pool()
    rows = [rows[k] for k in np.random.default_rng(0).permutation(len(rows))[: args.pairs]]
    source = bench_votes.write(out / "pairs.parquet", rows)
    pairs = scored(source, out)
    config = bench_votes.configured(out, source, out / "run", bench_votes.cell(1000, "random", 0.0, 0, RECIPE))
    measured = Measured(_data(source, out), config)
    captions = [group.captions[0] for group in measured.groups.groups]
    every = list(range(len(captions)))
    changes = {
        f"alone ({args.single} pairs)": kept(
            out / f"alone-{args.single}.json", lambda: [measured.alone(k) for k in every[: args.single]]
        )
    }
    for seed in args.seeds:

        def together(seed: int = seed) -> list[float]:
            one = bench_votes.cell(1000, "random", 0.0, seed, RECIPE)
            all_pairs = bench_votes.write(out / "all.parquet", bench_votes.pool())
            folder = bench_votes.train(bench_votes.configured(out, all_pairs, out / f"run-{seed}", one))
            fresh = measured.weights.state()
            measured.weights.restore(folder, measured.family.component)
            found = (measured.errors(every, base=False) - measured.errors(every, base=True)).tolist()
            measured.weights.set_state(fresh)
            return found

        changes[f"together, seed {seed}"] = kept(out / f"together-{seed}.json", together)
    print(f"gradient > 0 for {(pairs[:, 1] > 0).mean():.1%} of {len(pairs)} pairs")
    for name, values in changes.items():
        change = np.array(values)
        for column, score in enumerate(("hidden", "gradient")):
            found = correlation(pairs[: len(change), column], change, captions[: len(change)])
            low, high = found["interval"]
            print(
                f"{name}, {score}: {found['spearman']:+.2f} [{low:+.2f}, {high:+.2f}], n={found['n']}, the error rises "
                f"for {found['rises']:.1%}; mean change of the lowest quarter {found['bottom']:+.2e}, of the highest "
                f"{found['top']:+.2e}"
            )


if __name__ == "__main__":
    main()
