import numpy as np
import pytest
from scipy import stats

from diffpo.evaluate.statistics import diversity, mean_difference, wilson, win_rate


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
    assert (rate.low, rate.high) == wilson(2.5, 4)


def test_copies_of_a_pair_do_not_narrow_any_interval():
    """Four seeds that agree exactly hold no more than one: the clustered intervals must equal those of one seed."""
    rng = np.random.default_rng(1)
    base, tuned = rng.random(50), rng.random(50) + 0.1
    four = [np.repeat(x, 4) for x in (base, tuned, np.arange(50))]
    once, copied = win_rate(base, tuned, np.arange(50)), win_rate(*four)
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    once, copied = mean_difference(base, tuned, np.arange(50)), mean_difference(*four)
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    # unanimous wins: no variance to estimate a design effect from, and still no more than 50 trials
    assert win_rate(np.zeros(200), np.ones(200), four[2]).low == wilson(50, 50)[0]


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


def test_diversity_is_the_mean_distance_of_the_pairs_in_question():
    rng = np.random.default_rng(4)
    images = rng.random((6, 5, 5, 3))
    distance = [[np.sqrt(np.mean((a - b) ** 2)) for b in images] for a in images]
    everything = [distance[i][j] for i in range(6) for j in range(i)]
    assert diversity(images, range(6)) == pytest.approx(np.mean(everything))
    seeds = [distance[0][1], distance[2][3], distance[4][5]]  # two seeds per prompt: only pairs within a prompt
    assert diversity(images, [0, 0, 1, 1, 2, 2]) == pytest.approx(np.mean(seeds))
    assert np.isnan(diversity(images[:1], [0]))
