"""How several numbers become one judgement, against counting by hand, closed forms and limits."""

import itertools
import math

import numpy as np
import pytest
import torch

from diffpo.common.errors import DiffpoError
from diffpo.labelling.aggregate import RULES, agreement, judge, scales
from diffpo.scorers.judge import better

RNG = np.random.default_rng(0)
SCORES = RNG.integers(0, 4, (5, 3)).astype(float)  # with ties
ONES = np.ones(3)


def test_a_win_rate_is_the_share_of_won_comparisons():
    found = judge(SCORES, "win-rate", ONES)
    for i in range(5):
        wins = 0.0
        for j, number in itertools.product(range(5), range(3)):
            if i != j:
                wins += (SCORES[i, number] > SCORES[j, number]) + 0.5 * (SCORES[i, number] == SCORES[j, number])
        assert found.worth[i] == pytest.approx(wins / (4 * 3))
    assert found.worth.sum() == pytest.approx(5 / 2)  # every comparison has one win
    single = judge(np.array([[0.3], [-2.0], [9.0]]), "win-rate", ONES[:1])
    assert single.worth.tolist() == [0.5, 0.0, 1.0] and single.order == [2, 0, 1]


def test_bradley_terry_is_the_mean_probability_and_becomes_the_win_rate():
    scale = np.array([1.0, 2.0, 0.5])
    found = judge(SCORES, "bradley-terry", scale)
    for i, j in itertools.permutations(range(5), 2):
        each = [1 / (1 + math.exp(-(SCORES[i, s] - SCORES[j, s]) / scale[s])) for s in range(3)]
        assert found.beats[i, j] == pytest.approx(sum(each) / 3)
    hard = judge(SCORES, "bradley-terry", 1e-6 * ONES)
    np.testing.assert_allclose(hard.beats, judge(SCORES, "win-rate", ONES).beats, atol=1e-12)


def test_a_majority_may_go_round_in_a_circle():
    circle = np.array([[3.0, 1, 2], [2, 3, 1], [1, 2, 3]])  # each beats the next by two numbers of three
    found = judge(circle, "majority", ONES)
    assert found.beats[0, 1] == found.beats[1, 2] == found.beats[2, 0] == 1
    assert found.worth.tolist() == [0.5, 0.5, 0.5]
    even = judge(np.array([[1.0, 0.0], [0.0, 1.0]]), "majority", ONES[:2])
    assert even.beats[0, 1] == 0.5


def test_pareto_is_the_dominance_that_d3po_uses():
    found, tensor = judge(SCORES, "pareto", ONES), torch.tensor(SCORES)
    for i, j in itertools.permutations(range(5), 2):
        assert 2 * found.beats[i, j] - 1 == better(tensor[i], tensor[j])


def test_a_score_keeps_its_unit_and_is_one_number():
    found = judge(np.array([[20.0], [22.5], [20.0]]), "score", ONES[:1])
    assert found.worth.tolist() == [20, 22.5, 20] and found.gaps[1, 0] == 2.5
    assert found.beats[1].tolist() == [1, 0.5, 1] and found.beats[0, 2] == 0.5
    with pytest.raises(DiffpoError, match="sum="):
        judge(SCORES, "score", ONES)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "score"])
def test_what_one_gains_the_other_loses(rule):
    found = judge(SCORES, rule, scales([SCORES]))
    np.testing.assert_allclose(found.beats + found.beats.T, 1)
    np.testing.assert_allclose(found.gaps, -found.gaps.T)
    again = judge(SCORES[::-1], rule, scales([SCORES]))  # no picture has an advantage from its place
    np.testing.assert_allclose(again.worth[::-1], found.worth)


def test_a_scale_is_the_root_mean_square_difference_within_a_prompt():
    tables = [np.array([[0.0, 5], [3, 5]]), np.array([[100.0, 5], [104, 5]])]
    assert scales(tables).tolist() == [pytest.approx(math.sqrt((9 + 16) / 2)), 1]


def test_agreement_counts_the_pairs_that_both_order():
    tables = [np.array([[1.0, 1, np.nan], [2, 3, np.nan], [3, 2, np.nan]]), np.array([[0.0, 1, 1], [1, 1, 2]])]
    found = agreement(tables, ["a", "b", "c"])
    estimate, pairs = found["a", "b"]  # of prompt 0: alike, alike, not; in prompt 1 b says nothing
    assert pairs == 3 and estimate.value == pytest.approx(2 / 3) and estimate.low < 2 / 3 < estimate.high
    assert found["a", "c"][1] == 1 and ("b", "c") not in found
