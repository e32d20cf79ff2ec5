import numpy as np
import pytest
from scipy import stats

from diffpo.evaluation.statistics import (
    holm,
    mean_difference,
    needed,
    needed_more,
    p_beyond,
    p_value,
    wilson,
    win_rate,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (3, 7), (256, 512), (300, 512), (512, 512)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_agrees_with_scipy(successes, n, confidence):
    expected = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson(successes, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_bounds_solve_the_score_equation_for_ties():
    # Wilson's bounds are the p at which (p_hat - p)^2 = z^2 p (1 - p) / n; that also defines them for a half win
    for bound in wilson(10.5, 16):
        assert (10.5 / 16 - bound) ** 2 == pytest.approx(
            stats.norm.ppf(0.975) ** 2 * bound * (1 - bound) / 16, rel=1e-9
        )


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5), (0, 0), (float("nan"), 5)])
def test_wilson_refuses_nonsense(successes, n):
    with pytest.raises(ValueError, match="wilson"):
        wilson(successes, n)


def test_identical_arms_win_exactly_half_and_differ_by_exactly_zero():
    scores = np.random.default_rng(0).random(40)
    rate, difference = win_rate(scores, scores, np.arange(40)), mean_difference(scores, scores, np.arange(40))
    assert rate.value == 0.5 and rate.low + rate.high == pytest.approx(1)
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)


def test_win_rate_counts_ties_half():
    rate = win_rate([0, 0, 0, 0], [1, 1, 0, -1], range(4))
    assert rate.value == 2.5 / 4
    # a tie varies less than a win or a loss: the bounds solve the score equation with the variance that was seen
    variance = np.var([1, 1, 0.5, 0]) / (0.625 * 0.375)  # in units of that of wins and losses alone
    for bound in (rate.low, rate.high):
        errors = abs(rate.value - bound) / np.sqrt(variance * bound * (1 - bound) / 4)
        assert errors == pytest.approx(stats.t.ppf(0.975, 3))


def test_copies_of_a_pair_do_not_narrow_any_interval():
    """Four seeds that agree exactly hold no more than one: the clustered intervals must equal those of one seed."""
    rng = np.random.default_rng(1)
    base, tuned = rng.random(50), rng.random(50) + 0.1
    four = [np.repeat(x, 4) for x in (base, tuned, np.arange(50))]
    once, copied = win_rate(base, tuned, np.arange(50)), win_rate(*four)
    assert copied.low < once.low and copied.high > once.high  # Student's quantile, for an estimated design effect
    assert copied.high - copied.low < 1.04 * (once.high - once.low)
    once, copied = mean_difference(base, tuned, np.arange(50)), mean_difference(*four)
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    # unanimous wins: no variance to estimate a design effect from, and still no more than 50 trials
    assert win_rate(np.zeros(200), np.ones(200), four[2]).low == wilson(50, 50)[0]


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("rounded", [False, True])
def test_the_p_value_is_below_5_percent_exactly_if_the_interval_leaves_out_a_half(seeds, rounded):
    rng, outside = np.random.default_rng(5), []
    for _ in range(60):
        taste = np.repeat(rng.normal(0.3, 1, 30), seeds)
        tuned = taste + rng.normal(size=30 * seeds)
        arms = np.zeros(len(tuned)), np.round(tuned) if rounded else tuned, np.repeat(np.arange(30), seeds)
        rate = win_rate(*arms)
        outside.append(not rate.low <= 0.5 <= rate.high)
        assert (p_value(*arms) < 0.05) == outside[-1]
    assert 5 < sum(outside) < 55


def test_the_p_value_without_ties_is_that_of_the_score_test():
    tuned = np.where(np.arange(50) < 33, 1, -1)
    assert p_value(np.zeros(50), tuned, range(50)) == pytest.approx(2 * stats.norm.sf((33 - 25) / np.sqrt(50 / 4)))
    assert p_value(tuned, tuned, range(50)) == 1
    with pytest.raises(ValueError, match="no pair"):
        p_value([], [], [])


def test_holm_gives_the_adjusted_p_values_of_the_closed_test():
    p = np.array([0.01, 0.04, 0.03, 0.005])
    # rejected exactly if every set of hypotheses with it in has a smallest p-value below level / size (Bonferroni)
    sets = [[i for i in range(4) if bits >> i & 1] for bits in range(1, 16)]
    closed = [max(min(1, len(s) * p[s].min()) for s in sets if i in s) for i in range(4)]
    assert holm(p) == pytest.approx(closed)
    assert holm([0.9, 0.8]).tolist() == [1, 1] and len(holm([])) == 0


@pytest.mark.parametrize(("rate", "power"), [(0.55, 0.8), (0.4, 0.9)])
def test_the_needed_prompts_give_the_wanted_power(rate, power):
    n = needed(rate, power)
    # the exact power of the two-sided score test
    wins = np.arange(n + 1)
    rejected = np.abs(wins - n / 2) > stats.norm.ppf(0.975) * np.sqrt(n / 4)
    assert stats.binom.pmf(wins, n, rate)[rejected].sum() == pytest.approx(power, abs=0.02)
    assert needed(rate, power, design=2) == pytest.approx(2 * n, abs=1)
    with pytest.raises(ValueError, match=r"win rate of 0\.5"):
        needed(0.5)


def test_more_prompts_are_needed_until_the_observed_rate_would_show():
    def pairs(wins, n, copies=1):
        tuned = np.where(np.arange(n) < wins, 1, -1)
        return [np.repeat(x, copies) for x in (np.zeros(n), tuned, np.arange(n))]

    assert needed_more(*pairs(60, 100)) == needed(0.6) - 100
    assert needed_more(*pairs(51, 100)) == needed(0.55) - 100  # smaller than what is worth looking for
    assert needed_more(*pairs(900, 1000)) == 0
    # four seeds that agree hold no more than one
    assert needed_more(*pairs(60, 100, copies=4)) == pytest.approx(needed(0.6) - 100, abs=4)


def test_p_beyond_is_a_t_test_of_the_prompts_means():
    values = np.random.default_rng(6).normal(0.4, 1, size=40)
    expected = stats.ttest_1samp(values, 0.1, alternative="greater").pvalue
    assert p_beyond(values, range(40), 0.1) == pytest.approx(expected)
    assert p_beyond(np.repeat(values, 3), np.repeat(range(40), 3), 0.1) == pytest.approx(expected)
    assert p_beyond([1, 1], [0, 1]) == 0 and p_beyond([1, 1], [0, 0]) == 1 and p_beyond([0, 0], [0, 1]) == 1


def test_bootstrap_agrees_with_the_t_interval_on_normal_data():
    rng = np.random.default_rng(2)
    base = rng.normal(size=400)
    tuned = base + rng.normal(0.3, 1.0, size=400)
    ours = mean_difference(base, tuned, np.arange(400))
    low, high = stats.ttest_rel(tuned, base).confidence_interval()
    assert ours.value == pytest.approx((tuned - base).mean(), rel=1e-12)
    # 5 % of the interval's width: three times the Monte-Carlo error of a 2.5 % quantile from 10,000 resamples
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.05 * (high - low))


def test_bootstrap_covers_the_truth_about_95_percent_of_the_time():
    rng, covered = np.random.default_rng(3), 0
    for _ in range(300):  # three correlated seeds for each of 40 prompts, true difference 0.2
        difference = 0.2 + np.repeat(rng.normal(size=40), 3) + 0.3 * rng.normal(size=120)
        interval = mean_difference(np.zeros(120), difference, np.repeat(np.arange(40), 3), resamples=400)
        covered += interval.low <= 0.2 <= interval.high
    assert 0.89 <= covered / 300 <= 0.98  # 0.94 +- 3.7 binomial standard errors; without clustering it is about 0.74
