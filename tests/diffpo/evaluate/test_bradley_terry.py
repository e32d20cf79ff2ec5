import numpy as np
import pytest
from scipy.optimize import minimize

from diffpo.evaluate.bradley_terry import bradley_terry, win_probabilities, won


def scores_of(strengths, n, seed=0):
    """Gumbel noise makes arm i beat arm j with probability 1 / (1 + exp(s_j - s_i))."""
    return np.random.default_rng(seed).gumbel(size=(n, len(strengths))) + np.asarray(strengths)


def test_strengths_maximise_the_penalised_likelihood():
    scores = np.round(scores_of([0, 0.5, -0.3, 1], 60), 1)  # rounded: with ties
    scores[np.random.default_rng(1).random(scores.shape) < 0.2] = np.nan
    wins = np.zeros((4, 4))
    for i in range(4):
        for j in range(4):
            if i != j:
                wins[i, j] = np.sum(scores[:, i] > scores[:, j]) + np.sum(scores[:, i] == scores[:, j]) / 2 + 0.5

    def loss(s):
        return sum(wins[i, j] * np.logaddexp(0, s[j] - s[i]) for i in range(4) for j in range(4)) + s.sum() ** 2

    best = minimize(loss, np.zeros(4), tol=1e-12).x
    assert [s.value for s in bradley_terry(scores, range(60))] == pytest.approx(best, abs=1e-5)


def test_two_arms_are_the_logit_of_the_win_rate():
    scores = scores_of([0, 0.7], 80)
    wins = np.sum(scores[:, 1] > scores[:, 0])
    logit = np.log((wins + 0.5) / (80 - wins + 0.5))
    low, high = bradley_terry(scores, range(80))
    assert (low.value, high.value) == pytest.approx((-logit / 2, logit / 2), abs=1e-10)
    assert win_probabilities([low, high])[1, 0] == pytest.approx((wins + 0.5) / 81, abs=1e-10)
    # the delta method: the variance of a logit is 1 / (n p (1 - p))
    error = (high.high - high.low) / 2
    assert error == pytest.approx(1.99 * np.sqrt(81 / (wins + 0.5) / (80 - wins + 0.5) * 81 / 81) / 2, rel=0.02)


def test_copies_of_an_item_do_not_narrow_the_intervals():
    scores = scores_of([0, 0.4, 0.8], 50)
    once, copied = bradley_terry(scores, range(50)), bradley_terry(np.repeat(scores, 4, 0), np.repeat(range(50), 4))
    for one, other in zip(once, copied, strict=True):
        assert other.high - other.low == pytest.approx(one.high - one.low, rel=0.05)  # the prior weighs less


def test_an_arm_that_wins_all_and_one_that_is_never_compared_have_finite_strengths():
    scores = scores_of([0, 30, 0], 20)
    scores[:, 2] = np.nan
    loser, winner, unknown = bradley_terry(scores, range(20))
    assert loser.value < unknown.value < winner.value < 10
    with pytest.raises(ValueError, match="two arms"):
        bradley_terry(scores[:, :1], range(20))


def test_wins_are_counted_by_prompt_with_ties_half():
    wins = won([[1, 2, np.nan], [3, 3, 1]], [7, 7])
    assert wins.tolist() == [[[0, 0.5, 1], [1.5, 0, 1], [0, 0, 0]]]


def test_probabilities_of_an_arm_against_itself_are_a_half():
    p = win_probabilities([0.3, -0.2, 1.0])
    assert np.allclose(p + p.T, 1) and p[2, 1] == pytest.approx(1 / (1 + np.exp(-1.2)))
