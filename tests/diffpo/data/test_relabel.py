"""Labels from a score in place of people's."""

import math

import numpy as np
import pytest
from tiny import picture, png, write_parquet

from diffpo.common.errors import DiffpoError
from diffpo.config import Data
from diffpo.data.groups import load_groups
from diffpo.data.relabel import relabel, turn


@pytest.fixture
def pairs(tmp_path):
    def load(ties):
        rows = [
            {"caption": f"cat {i}", "jpg_0": png(picture(2 * i)), "jpg_1": png(picture(2 * i + 1)), "label_0": 1.0}
            for i in range(40)
        ]
        rows = [{**row, "label_1": 0.0} for row in rows]
        source = write_parquet(tmp_path / "pairs.parquet", rows)
        return load_groups(Data(resolution=16, ties=ties), str(source), "train")

    return load


def brightness(images, captions):
    assert len(images) == len(captions)
    return [np.asarray(image).mean() / 4 for image in images]


def test_labels_follow_the_score_and_pairs_within_the_margin_are_ties(pairs):
    kept, dropped, before = pairs("soft"), pairs("drop"), pairs("soft")
    rates = {index: brightness(before.images(index), ["", ""]) for index in range(40)}
    expected = {}
    for index, (first, second) in rates.items():
        p = [math.exp(each - max(first, second)) for each in (first, second)]
        expected[index] = (p[0] - p[1]) / sum(p)
    margin = sorted(map(abs, expected.values()))[13]
    for groups in (kept, dropped):
        relabel(groups, brightness, margin)
    ties = [index for index in range(40) if abs(expected[index]) <= margin]
    assert len(ties) == 14 and kept.ties == 14 and [g.row for g in kept.groups if g.preference == 0.5] == ties
    assert [group.row for group in dropped.groups] == [index for index in range(40) if index not in ties]
    for index, group in enumerate(dropped.groups):
        assert group.preference == 1.0 and group.scores[0] > group.scores[1]
        seen = brightness(dropped.images(index), ["", ""])
        assert seen == pytest.approx(group.scores), "the images turn with the label"
    assert any(group.images == (1, 0) for group in dropped.groups)
    assert kept.data_hash != before.data_hash


def test_own_captions_turn_with_their_images(tmp_path):
    row = {"chosen": png(picture(0)), "rejected": png(picture(1)), "caption_chosen": "a", "caption_rejected": "b"}
    groups = load_groups(Data(resolution=16), str(write_parquet(tmp_path / "dual.parquet", [row])), "train")
    relabel(groups, lambda images, captions: [float(caption == "b") for caption in captions], 0.1)
    assert groups.groups[0].captions == ("b", "a") and groups.groups[0].images == (1, 0)


def test_a_score_that_does_not_differ_is_refused(pairs):
    with pytest.raises(DiffpoError, match="all 40 pairs are ties"):
        relabel(pairs("soft"), lambda images, captions: [0.5] * len(images), 0.1)


def test_turned_groups_prefer_what_lost(pairs, tmp_path):
    groups, before = pairs("soft"), pairs("soft")
    turn(groups)
    for after, group in zip(groups.groups, before.groups, strict=True):
        assert (after.images, after.hashes) == (group.images[::-1], group.hashes[::-1]) and after.preference == 1.0
    rows = [{"prompt": "a", "images": [png(picture(i)) for i in range(3)], "scores": [0.1, 0.9, 0.4]}]
    data = Data(resolution=16, list_size=3)
    lists = load_groups(data, str(write_parquet(tmp_path / "lists.parquet", rows)), "train", "list")
    turn(lists)
    assert lists.groups[0].images == (0, 2, 1) and lists.groups[0].scores == (-0.1, -0.4, -0.9)
    rows = [{"prompt": "a", "image": png(picture(i)), "liked": i / 4} for i in range(5)]
    data = Data(resolution=16, ties="soft")
    singles = load_groups(data, str(write_parquet(tmp_path / "singles.parquet", rows)), "train", "single")
    turn(singles)
    assert [group.preference for group in singles.groups] == [1, 0.75, 0.5, 0.25, 0]
