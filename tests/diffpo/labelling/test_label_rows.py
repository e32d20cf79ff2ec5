"""Which rows are made of judged prompts: pairs, ties, margins, flips."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffpo.common.errors import DiffpoError
from diffpo.labelling import rows
from diffpo.labelling.aggregate import judge
from diffpo.labelling.pictures import Picture, Prompted
from diffpo.labelling.rows import Choice


def prompts(*scores, rule="score"):
    found = []
    for index, numbers in enumerate(scores):
        pictures = tuple(Picture("base", k, Path(f"{index}-{k}.png")) for k in range(len(numbers)))
        table = np.array(numbers, float)[:, None]
        found.append((Prompted(index, f"prompt {index}", pictures, table), judge(table, rule, np.ones(1))))
    return found


def test_the_pairs_of_a_prompt():
    one = prompts([3, 1, 2, 5])
    (pair,), ties = rows.make(one, Choice())
    assert (pair.members, pair.label, pair.worth, pair.gap, ties) == ((1, 3), 0.0, (1.0, 5.0), 4.0, 0)
    assert pair.best_first == (3, 1)
    every, _ = rows.make(one, Choice(which="all"))
    assert [row.members for row in every] == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert [row.label for row in every] == [1, 1, 0, 0, 0, 0]
    seen = {rows.make(one, Choice(which="best-random", seed=seed))[0][0].members for seed in range(40)}
    assert seen == {(0, 3), (1, 3), (2, 3)}  # the best against any other


def test_a_margin_makes_ties_which_are_written_or_left_out():
    found, ties = rows.make(prompts([0, 1], [0, 1.5], [7, 7]), Choice(margin=1))
    assert [row.label for row in found] == [0.5, 0, 0.5] and ties == 2
    kept, ties = rows.make(prompts([0, 1], [0, 1.5], [7, 7]), Choice(margin=1, drop=True))
    assert [row.prompt.index for row in kept] == [1] and ties == 2
    with pytest.raises(DiffpoError, match="--margin"):
        rows.make(prompts([0, 1]), Choice(margin=2))


def test_a_label_is_the_share_of_the_votes():
    """Three scorers of which two prefer the second picture: P = 1/3, which data.ties=soft uses."""
    table = np.array([[1.0, 0, 0], [0, 1, 1]])
    prompt = Prompted(0, "x", (Picture("a", 0, Path("0")), Picture("b", 0, Path("1"))), table)
    (row,), _ = rows.make([(prompt, judge(table, "win-rate", np.ones(3)))], Choice())
    assert row.label == pytest.approx(1 / 3) and row.gap == pytest.approx(1 / 3)


@pytest.mark.parametrize(("share", "count"), [(0, 0), (0.1, 2), (0.25, 5), (1, 20)])
def test_exactly_the_share_of_the_clear_labels_is_flipped(share, count):
    scores = [[0, 1]] * 20 + [[1, 1]] * 5
    plain, _ = rows.make(prompts(*scores), Choice())
    found, _ = rows.make(prompts(*scores), Choice(flip=share, seed=3))
    flipped = [k for k, row in enumerate(found) if row.flipped]
    assert len(flipped) == count and all(k < 20 for k in flipped)  # no tie
    for k, (before, after) in enumerate(zip(plain, found, strict=True)):
        assert after.label == (1 - before.label if k in flipped else before.label)
        assert after.worth == before.worth  # the scorers' numbers stay
    if 0 < share < 1:
        other, _ = rows.make(prompts(*scores), Choice(flip=share, seed=4))
        assert [row.flipped for row in other] != [row.flipped for row in found]


def test_rankings_hold_all_pictures_and_a_flipped_one_is_upside_down():
    plain, _ = rows.make(prompts([3, 1, 2], [5, 5, 5]), Choice("rankings"))
    assert [(row.members, row.worth) for row in plain] == [((0, 1, 2), (3, 1, 2))]
    turned, _ = rows.make(prompts([3, 1, 2]), Choice("rankings", flip=1))
    assert turned[0].worth == (1, 3, 2) and turned[0].flipped


def test_likes_are_above_the_mean_of_their_prompt():
    found, ties = rows.make(prompts([0, 1, 5]), Choice("likes", margin=1))
    assert [row.label for row in found] == [0, 0.5, 1] and ties == 1
    assert [row.members for row in found] == [(0,), (1,), (2,)]


@pytest.mark.parametrize("wrong", [{"margin": -1}, {"flip": 1.1}])
def test_settings_out_of_range(wrong):
    with pytest.raises(DiffpoError, match=f"--{next(iter(wrong))}"):
        replace(Choice(), **wrong)
