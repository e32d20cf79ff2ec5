"""How often the 95 % intervals hold the truth, and how often the tests are wrong, over simulated experiments.

python scripts/bench_statistics.py [--experiments 2000] [--seed 1] [--only win difference strength alarms]

Prints the tables of docs/statistics.md. Every experiment draws the scores of arms on some prompts and asks the same
functions as `diffpo eval`. An interval is good if it holds the truth in 93 % to 97 % of the experiments. The error of
such a share is sqrt(0.95 x 0.05 / experiments): 0.5 % for 2,000.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import sqrt

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

from diffpo.common.tables import Table
from diffpo.evaluation.bradley_terry import bradley_terry
from diffpo.evaluation.hacking import hacking
from diffpo.evaluation.measured import Measured
from diffpo.evaluation.statistics import Estimate, holm, mean_difference, p_value, win_rate

GOOD = (0.93, 0.97)
SIZES = (30, 100, 500)  # prompts


@dataclass(frozen=True)
class Design:
    """Prompts with ``seeds`` pictures each, or one to ``seeds`` by turns if ``uneven``. ``alike``: the correlation of
    the seeds of a prompt."""

    seeds: int = 1
    alike: float = 0.0
    uneven: bool = False

    def prompts(self, n: int) -> np.ndarray:
        counts = np.arange(n) % self.seeds + 1 if self.uneven else np.full(n, self.seeds)
        return np.repeat(np.arange(n), counts)

    def normal(self, rng: np.random.Generator, prompt_id: np.ndarray, columns: int = 1) -> np.ndarray:
        """(n, columns) standard normal, correlated within each prompt."""
        own = rng.normal(size=(len(prompt_id), columns))
        return sqrt(self.alike) * rng.normal(size=(prompt_id[-1] + 1, columns))[prompt_id] + sqrt(1 - self.alike) * own

    def __str__(self) -> str:
        if self.seeds == 1:
            return "1 seed"
        return f"{'1 to ' if self.uneven else ''}{self.seeds} seeds, correlation {self.alike}"


DESIGNS = (Design(), Design(4, 0.0), Design(4, 0.5), Design(4, 1.0), Design(4, 0.5, uneven=True))


@dataclass(frozen=True)
class Scores:
    """A distribution of tuned - base: ``quantile`` of a uniform number, and the truth."""

    name: str
    quantile: Callable[[np.ndarray], np.ndarray]
    mean: float = float("nan")
    rate: float = float("nan")  # of positive numbers, ties half


def shifted(rate: float) -> Scores:
    """Normal differences that are positive with probability ``rate``."""
    return Scores(f"rate {rate}", lambda u: ndtri(u) + ndtri(rate), rate=rate)


def tied(rate: float, ties: float) -> Scores:
    """Wins, ties and losses."""
    lost = 1 - rate - ties / 2

    def quantile(u: np.ndarray) -> np.ndarray:
        return (u >= lost + ties) - 1.0 * (u < lost)

    return Scores(f"rate {rate}, {ties:.0%} ties", quantile, rate=rate)


RATES = (shifted(0.5), shifted(0.65), shifted(0.85), tied(0.5, 0.3), tied(0.6, 0.6))
LOGNORMAL = 0.75  # sigma, for a skewness of 3.3
DIFFERENCES = (
    Scores("normal", ndtri, 0.0),
    Scores("exponential (skewness 2)", lambda u: -np.log1p(-u), 1.0),
    Scores("log-normal (skewness 3.3)", lambda u: np.exp(LOGNORMAL * ndtri(u)), float(np.exp(LOGNORMAL**2 / 2))),
    Scores("heavy tails (Student's t, 4)", lambda u: stdtrit(4, u), 0.0),
    Scores(
        "half are 0, others normal", lambda u: np.where(u < 0.5, 0.0, ndtri(2 * np.clip(u, 0.5, 1) - 1) + 0.5), 0.25
    ),
)


def draws(
    scores: Scores, design: Design, n: int, experiments: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Differences and prompts of each experiment."""
    rng, prompt_id = np.random.default_rng(seed), design.prompts(n)
    for _ in range(experiments):
        yield scores.quantile(ndtr(design.normal(rng, prompt_id)[:, 0])), prompt_id


def holds(estimate: Estimate, truth: float) -> bool:
    return estimate.low <= truth <= estimate.high


def win_coverage(scores: Scores, design: Design, n: int, experiments: int, seed: int) -> float:
    found = [holds(win_rate(0 * d, d, ids), scores.rate) for d, ids in draws(scores, design, n, experiments, seed)]
    return float(np.mean(found))


def difference_coverage(scores: Scores, design: Design, n: int, experiments: int, seed: int) -> float:
    options = {"resamples": 1000}
    found = [
        holds(mean_difference(0 * d, d, ids, seed=k, **options), scores.mean)
        for k, (d, ids) in enumerate(draws(scores, design, n, experiments, seed))
    ]
    return float(np.mean(found))


def strength_coverage(strengths: tuple[float, ...], design: Design, n: int, experiments: int, seed: int) -> float:
    """Of all arms together. Gumbel scores make arm i beat arm j with the probability of the Bradley-Terry model."""
    rng, prompt_id, truth = np.random.default_rng(seed), design.prompts(n), np.array(strengths)
    found = []
    for _ in range(experiments):
        gumbel = -np.log(-np.log(ndtr(design.normal(rng, prompt_id, len(truth)))))
        found += [
            holds(e, s) for e, s in zip(bradley_terry(gumbel + truth, prompt_id), truth - truth.mean(), strict=True)
        ]
    return float(np.mean(found))


def false_differences(arms: int, design: Design, n: int, experiments: int, seed: int) -> float:
    """Share of experiments on equal arms in which Holm's correction leaves any two of them different."""
    rng, prompt_id, wrong = np.random.default_rng(seed), design.prompts(n), 0
    for _ in range(experiments):
        scores = design.normal(rng, prompt_id, arms)
        p = [p_value(scores[:, i], scores[:, j], prompt_id) for i in range(arms) for j in range(i)]
        wrong += bool((holm(p) < 0.05).any())
    return wrong / experiments


def false_stops(up: bool, down: bool, looks: int, n: int, experiments: int, seed: int) -> float:
    """Share of runs in which the stop rule of training speaks of hacking at any of ``looks`` looks.

    Every look scores the same prompts; the policy moves, so that scores of neighbouring looks correlate by 0.9. Either
    the trained score is really up and nothing else has changed, or two unseen scores are really down and the trained
    one has not changed, or neither.
    """
    rng, wrong, names = np.random.default_rng(seed), 0, ("trained", "first", "second")
    moved = np.array([1.0 * up, -1.0 * down, -1.0 * down])
    for _ in range(experiments):
        base, policy = rng.normal(size=(n, 3)), rng.normal(size=(n, 3))
        spread, diversity = rng.normal(0.3, 0.05, size=(2, n)), rng.normal(1, 0.2, size=n)
        for _ in range(looks):
            policy = 0.9 * policy + sqrt(1 - 0.81) * rng.normal(size=(n, 3))
            scores = {k: {"base": base[:, c], "now": policy[:, c] + moved[c]} for c, k in enumerate(names)}
            measured = Measured(
                scores,
                np.arange(n),
                "base",
                "trained",
                signals={"sharpness": {"base": spread[0], "now": spread[0] + rng.normal(0, 0.05, n)}},
                diversity={"base": diversity, "now": 0.9 * diversity + rng.normal(0, 0.1, n)},  # at the margin
            )
            if hacking(measured, alpha=0.05 / looks):
                wrong += 1
                break
    return wrong / experiments


def coverage_table(name: str, kinds: tuple, cover: Callable[..., float], designs, experiments: int, seed: int) -> Table:
    table, outside = Table([name, "seeds of a prompt", *(f"{n} prompts" for n in SIZES)]), 0
    for kind in kinds:
        for design in designs:
            shares = [cover(kind, design, n, experiments, seed) for n in SIZES]
            outside += sum(not GOOD[0] <= share <= GOOD[1] for share in shares)
            marked = [f"{share:.1%}" + ("" if GOOD[0] <= share <= GOOD[1] else " *") for share in shares]
            table.rows.append([getattr(kind, "name", kind), design, *marked])
            print(table.rows[-1], flush=True)
    print(f"\n{table.markdown()}\n\n{outside} of {len(table.rows) * len(SIZES)} are outside 93 % to 97 %\n", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=["win", "difference", "strength", "alarms"])
    args = parser.parse_args()
    many = {"experiments": args.experiments, "seed": args.seed}
    if "win" in args.only:
        coverage_table("win rate", RATES, win_coverage, DESIGNS, **many)
    if "difference" in args.only:
        coverage_table(
            "mean difference", DIFFERENCES, difference_coverage, (DESIGNS[0], DESIGNS[2], DESIGNS[4]), **many
        )
    if "strength" in args.only:
        arms = ((0.0, 0.0), (0.0, 1.5), (0.0, 2.5), (0.0, 0.3, 0.6, 1.0))
        coverage_table("log-strengths", arms, strength_coverage, (DESIGNS[0], DESIGNS[2]), **many)
    if "alarms" in args.only:
        table = Table(["what is tested", "prompts", "false alarms", "promised"])
        for arms in (2, 5):
            for design in (DESIGNS[0], DESIGNS[2]):
                for n in SIZES[:2]:
                    share = false_differences(arms, design, n, **many)
                    table.rows.append([f"any difference among {arms} equal arms, {design}", n, f"{share:.1%}", "5 %"])
                    print(table.rows[-1], flush=True)
        cases = {"trained up, nothing else": (1, 0), "others down, trained not up": (0, 1), "nothing moves": (0, 0)}
        for name, (up, down) in cases.items():
            for n in SIZES[:2]:
                share = false_stops(bool(up), bool(down), 20, n, **many)
                table.rows.append([f"hacking at any of 20 looks: {name}", n, f"{share:.1%}", "5 %"])
                print(table.rows[-1], flush=True)
        print(f"\n{table.markdown()}")


if __name__ == "__main__":
    main()
