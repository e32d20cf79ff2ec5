"""The promises of docs/statistics.md, over fewer experiments. Bounds are three standard errors of the shares."""

from math import sqrt

import bench_statistics as bench
import numpy as np
import pytest

from diffpo.evaluation.statistics import mean_difference, win_rate

CLUSTERED = bench.Design(4, 0.5)
N = 400


def near(share, promise=0.95, experiments=N, slack=0.015):
    """``slack``: what few prompts cost even with all experiments in the world."""
    return abs(share - promise) <= slack + 3 * sqrt(promise * (1 - promise) / experiments)


@pytest.mark.parametrize("scores", [bench.shifted(0.65), bench.tied(0.6, 0.6)], ids=lambda scores: scores.name)
def test_intervals_of_the_win_rate_hold_the_truth(scores):
    assert near(bench.win_coverage(scores, CLUSTERED, 30, N, 7))


def test_intervals_of_a_skewed_difference_hold_the_truth():
    assert near(bench.difference_coverage(bench.DIFFERENCES[1], bench.Design(), 30, N, 8))


def test_intervals_of_strengths_hold_the_truth():
    assert near(bench.strength_coverage((0.0, 0.5, 1.0), CLUSTERED, 30, N, 9), slack=0.02)


def test_the_check_can_fail():
    """Seeds of a prompt taken for prompts of their own give intervals that are too narrow."""
    found = []
    for differences, ids in bench.draws(bench.shifted(0.65), CLUSTERED, 30, N, 7):
        found.append(bench.holds(win_rate(0 * differences, differences, np.arange(len(ids))), 0.65))
    assert not near(np.mean(found))
    exponential, found = bench.DIFFERENCES[1], []
    for differences, ids in bench.draws(exponential, CLUSTERED, 30, N // 4, 7):
        interval = mean_difference(0 * differences, differences, np.arange(len(ids)), resamples=300)
        found.append(bench.holds(interval, exponential.mean))
    assert not near(np.mean(found), experiments=N // 4)


@pytest.mark.parametrize(
    ("alarms", "experiments"),
    [
        (lambda n: bench.false_differences(4, CLUSTERED, 30, n, 10), 200),
        (lambda n: bench.false_stops(True, False, 4, 30, n, 11), 60),
    ],
    ids=["differences", "stops"],
)
def test_false_alarms_are_as_rare_as_promised(alarms, experiments):
    assert alarms(experiments) <= 0.05 + 3 * sqrt(0.05 * 0.95 / experiments)
