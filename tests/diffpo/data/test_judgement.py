"""What is known about groups of images, row by row."""

from types import SimpleNamespace

import pytest
import torch

from diffpo.data.judgement import Judgement


def groups(*judged):
    return [SimpleNamespace(preference=preference, scores=scores) for preference, scores in judged]


def test_rows_are_laid_out_by_member():
    found = Judgement.of(groups((1, (9, 3)), (0.75, (8, 2)), (0.5, (7, 1))), 2, "cpu")
    assert found.rows == 6 and found.preference.tolist() == [1, 0.75, 0.5]
    assert found.scores.tolist() == [[9, 8, 7], [3, 2, 1]]
    # the scores' own layout: what belongs to image m of group i is at [m, i]
    assert torch.equal(found.by_member(torch.tensor([9, 8, 7, 3, 2, 1])), found.scores)


def test_one_group_without_scores_leaves_all_without():
    assert Judgement.of(groups((1, (9, 3)), (1, None)), 2, "cpu").scores is None


def test_a_pair_as_single_images_is_liked_by_its_probability():
    pairs = Judgement.of(groups((1, (9, 3)), (0.75, (8, 2))), 2, "cpu")
    singles = pairs.as_singles()
    assert singles.members == 1 and singles.rows == pairs.rows
    assert singles.preference.tolist() == [1, 0.75, 0, 0.25] and singles.scores.tolist() == [[9, 8, 3, 2]]
    assert singles.as_singles() is singles
    with pytest.raises(ValueError):
        Judgement(torch.ones(2), 3).as_singles()
