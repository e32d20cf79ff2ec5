"""Agreement against published examples that can be computed by hand."""

from math import isnan

import pytest

from diffpo.annotate import agreement
from diffpo.annotate.store import Vote


def vote(annotator, task, ranks, repeat=0, bad=False, order=(0, 1)):
    return Vote(f"{annotator}{task}{repeat}", annotator, task, ranks, bad, repeat, order, 0, 0.0)


def test_cohens_kappa_of_the_two_readers_of_fifty_proposals():
    # both yes 20, only the first 5, only the second 10, both no 15: p_o = 0.7, p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5
    one = ["yes"] * 25 + ["no"] * 25
    other = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert agreement.cohen_kappa(one, other) == pytest.approx(0.4)
    assert agreement.cohen_kappa(one, one) == 1
    assert isnan(agreement.cohen_kappa([1, 1], [1, 1])) and isnan(agreement.cohen_kappa([], []))
    with pytest.raises(ValueError):
        agreement.cohen_kappa([1], [1, 2])


def test_krippendorffs_alpha_of_his_own_examples():
    # Krippendorff 2011, section B: two observers, nominal
    ben, gerry = "aabbdcccedda", "babbbccceddd"
    assert agreement.krippendorff_alpha(zip(ben, gerry, strict=True)) == pytest.approx(0.692, abs=5e-4)
    # section C: four observers, missing data, nominal
    table = ["123321412...", "1233224125.3", ".33323422 51.".replace(" ", ""), "1233244125 1.".replace(" ", "")]
    units = [[row[k] for row in table if row[k] != "."] for k in range(12)]
    assert agreement.krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)
    assert isnan(agreement.krippendorff_alpha([["a", "a"], ["a"]]))


def test_votes_are_compared_by_annotator_and_task_without_skips_and_repetitions():
    left, right, tie = (1, 2), (2, 1), (1, 1)
    votes = [vote("a", str(k), left if k < 3 else right) for k in range(4)]
    votes += [vote("b", "0", left), vote("b", "1", right), vote("b", "2", None), vote("b", "3", right)]
    votes += [vote("a", "0", left, 1), vote("a", "1", tie, 1), vote("b", "0", tie, 1, bad=True)]
    alpha, kappa = agreement.between(votes)
    # of 3 tasks in common they agree on 2; a says left twice, b once: p_e = 2/3 * 1/3 + 1/3 * 2/3 = 4/9
    assert kappa == {("a", "b"): (pytest.approx((2 / 3 - 4 / 9) / (5 / 9)), 3)}
    assert alpha == pytest.approx(1 - 5 * 2 / (36 - 9 - 9))  # 3 of each value, one disagreement counted both ways
    assert agreement.repeated(votes) == {"a": (1, 2), "b": (0, 1)}


def test_the_side_that_was_shown_first():
    votes = [vote("a", "0", (1, 2), order=(0, 1)), vote("a", "1", (1, 2), order=(1, 0)), vote("a", "2", (1, 1))]
    assert agreement.first_side(votes) == (1, 2)
