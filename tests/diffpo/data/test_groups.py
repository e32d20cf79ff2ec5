"""Ranked lists, single images, scores, two captions and users: groups of small files, compared with groups by hand."""

import json

import datasets
import pytest
from tiny import pick_a_pic_rows, picture, png, write_folder, write_parquet

from diffpo.common.errors import DiffpoError
from diffpo.config import Columns, Data
from diffpo.data.groups import load_groups, scan
from diffpo.data.rows import spread

SCORES = [[0.1, 0.9, 0.5, 0.5], [3.0, 1.0, 2.0]]  # best first: 1, then 2 and 3 (a tie), then 0; and 0, 2, 1


def load(source, want="pair", **options):
    return load_groups(Data(train=str(source), resolution=16, **options), str(source), "train", want)


def list_rows(scores=SCORES) -> list[dict]:
    """Image i of row r is picture(10 r + i)."""
    return [
        {"prompt": f"cat {r}", "images": [png(picture(10 * r + i)) for i in range(len(values))], "scores": values}
        for r, values in enumerate(scores)
    ]


def what(groups):
    return [(group.row, group.images, group.preference, group.scores) for group in groups.groups]


def test_lists_become_all_their_pairs_of_different_score_best_first(tmp_path):
    groups = load(write_parquet(tmp_path / "a.parquet", list_rows()))
    assert what(groups) == [
        (0, (1, 2), 1, (0.9, 0.5)),
        (0, (1, 3), 1, (0.9, 0.5)),
        (0, (1, 0), 1, (0.9, 0.1)),
        (0, (2, 0), 1, (0.5, 0.1)),
        (0, (3, 0), 1, (0.5, 0.1)),
        (1, (0, 2), 1, (3, 2)),
        (1, (0, 1), 1, (3, 1)),
        (1, (2, 1), 1, (2, 1)),
    ]
    assert (groups.kind, groups.data, groups.members, groups.ties) == ("pair", "list", 2, 1)
    assert [image.tobytes() for image in groups.images(7)] == [picture(12).tobytes(), picture(11).tobytes()]
    assert groups.image(2, 1).tobytes() == picture(0).tobytes()


def test_ties_of_a_list_are_pairs_with_soft_labels(tmp_path):
    groups = load(write_parquet(tmp_path / "a.parquet", list_rows()), ties="soft")
    assert len(groups) == 9 and what(groups)[3] == (0, (2, 3), 0.5, (0.5, 0.5))
    assert groups.ties == 1


@pytest.mark.parametrize(
    ("size", "ties", "expected", "short"),
    [
        (3, "drop", [(0, (1, 2, 0), 1, (0.9, 0.5, 0.1)), (1, (0, 2, 1), 1, (3, 2, 1))], 0),  # the first of a tie
        (3, "soft", [(0, (1, 3, 0), 1, (0.9, 0.5, 0.1)), (1, (0, 2, 1), 1, (3, 2, 1))], 0),
        (4, "soft", [(0, (1, 2, 3, 0), 1, (0.9, 0.5, 0.5, 0.1))], 1),
        (2, "drop", [(0, (1, 0), 1, (0.9, 0.1)), (1, (0, 1), 1, (3, 1))], 0),
    ],
)
def test_lists_of_one_length_are_spread_over_the_ranking(tmp_path, size, ties, expected, short):
    source = write_parquet(tmp_path / "a.parquet", list_rows())
    groups = load(source, "list", list_size=size, ties=ties)
    assert what(groups) == expected
    assert (groups.kind, groups.members, groups.short) == ("list", size, short)


def test_lists_that_are_all_too_short_are_refused(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", list_rows())
    with pytest.raises(DiffpoError, match=r"a\.parquet: .*data\.list_size=4"):
        load(source, "list")


def test_spread_keeps_both_ends_and_is_as_even_as_integers_allow():
    assert spread(8, 4) == [0, 2, 5, 7]
    for total in range(2, 14):
        for number in range(2, total + 1):
            places = spread(total, number)
            assert places[0] == 0 and places[-1] == total - 1 and len(set(places)) == number
            assert all(abs(place - i * (total - 1) / (number - 1)) <= 0.5 for i, place in enumerate(places))


def test_ranks_order_a_list_and_are_no_scores(tmp_path):
    rows = [{"prompt": "x", "images": [png(picture(i)) for i in range(3)], "rank": [2, 3, 1]}]
    source = write_parquet(tmp_path / "a.parquet", rows)
    groups = load(source, "list", list_size=3)
    assert what(groups) == [(0, (2, 0, 1), 1, None)]
    with pytest.raises(DiffpoError, match=r"link rank_dpo needs scores, .*a\.parquet .*data\.columns\.scores=NAME"):
        groups.require_scores("link rank_dpo needs scores")
    rows[0] |= {"scores": [5.0, 1.0, 4.0]}
    write_parquet(tmp_path / "b.parquet", rows)
    assert what(load(tmp_path / "b.parquet", "list", list_size=3)) == [(0, (0, 2, 1), 1, (5, 4, 1))]
    ranked = load(tmp_path / "b.parquet", "list", list_size=3, columns=Columns(ranks="rank"))
    assert what(ranked) == [(0, (2, 0, 1), 1, None)]


@pytest.mark.parametrize("form", ["structs", "datasets", "paths"])
def test_images_of_a_list_are_read_in_all_forms(tmp_path, form):
    pictures = [picture(i) for i in range(3)]
    source = tmp_path / "a.parquet"
    if form == "structs":
        cells = [{"bytes": png(each), "path": None} for each in pictures]
        write_parquet(source, [{"prompt": "x", "images": cells, "scores": [1, 3, 2]}])
    elif form == "datasets":
        features = datasets.Features(
            prompt=datasets.Value("string"),
            images=datasets.List(datasets.Image()),
            scores=datasets.List(datasets.Value("float32")),
        )
        rows = {"prompt": ["x"], "images": [pictures], "scores": [[1, 3, 2]]}
        datasets.Dataset.from_dict(rows, features).to_parquet(source)
    else:
        source = tmp_path / "folder"
        source.mkdir()
        for i, each in enumerate(pictures):
            each.save(source / f"{i}.png")
        row = {"prompt": "x", "images": ["0.png", "1.png", "2.png"], "scores": [1, 3, 2]}
        (source / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    groups = load(source, "list", list_size=3)
    assert [image.tobytes() for image in groups.images(0)] == [pictures[i].tobytes() for i in (1, 2, 0)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scores": [1.0, 2.0]}, ".*: 2 for 3 images"),
        ({"scores": None}, ".*: 0 for 3 images"),
        ({"scores": [1.0, None, 2.0]}, ".*score"),
        ({"scores": [1.0, float("nan"), 2.0]}, ".*score"),
        ({"images": None, "scores": []}, ".*two images: 0"),
        ({"images": [png(picture(0))], "scores": [1.0]}, ".*two images: 1"),
        (
            {"images": [png(picture(0)), png(picture(1, (24, 16))), png(picture(2))]},
            r".*: images\[0\] and images\[1\]: 16x16 and 24x16",
        ),
        ({"images": [png(picture(0)), b"x", png(picture(2))]}, r".*: images\[1\]: "),
    ],
)
def test_bad_lists_are_named(tmp_path, change, words):
    rows = list_rows([[1.0, 2.0, 3.0]] * 2)
    rows[1] |= change
    source = write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(DiffpoError, match=f"1 of 2 rows .*row 1: {words}"):
        load(source)
    assert len(load(source, bad_rows="skip")) == 3


def test_cells_that_are_no_lists_are_bad_rows(tmp_path):
    rows = [{"prompt": "x", "images": "a.png", "scores": 1.0}]
    with pytest.raises(DiffpoError, match=r"row 0: .*: 'a\.png'"):
        load(write_parquet(tmp_path / "a.parquet", rows))
    rows = [{"prompt": "x", "images": [png(picture(0))] * 2, "scores": 1.0}]
    with pytest.raises(DiffpoError, match=r"row 0: .*: 1\.0"):
        load(write_parquet(tmp_path / "b.parquet", rows))


def single_rows(likes) -> list[dict]:
    return [{"caption": f"cat {i}", "image": png(picture(i)), "liked": like} for i, like in enumerate(likes)]


def test_single_images_are_liked_or_not(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", single_rows([1.0, 0.0, 0.8, 0.5, 0.1]))
    hard, soft = load(source, "single"), load(source, "single", ties="soft")
    assert [(group.row, group.preference) for group in hard.groups] == [(0, 1), (1, 0), (2, 1), (4, 0)]
    assert [group.preference for group in soft.groups] == [1, 0, 0.8, 0.5, 0.1]
    assert (hard.kind, hard.members, hard.ties) == ("single", 1, 1)
    assert hard.images(3)[0].tobytes() == picture(4).tobytes() and len(hard.images(3)) == 1
    booleans = write_parquet(tmp_path / "b.parquet", single_rows([True, False]))
    assert [group.preference for group in load(booleans, "single").groups] == [1, 0]
    for like, words in {-1: ".*: -1", None: "no like"}.items():
        with pytest.raises(DiffpoError, match=f"row 1: {words}"):
            load(write_parquet(tmp_path / "c.parquet", single_rows([1, like])), "single")


def test_data_of_the_wrong_kind_is_refused_with_the_reason(tmp_path):
    single = write_parquet(tmp_path / "single.parquet", single_rows([1, 0]))
    lists = write_parquet(tmp_path / "lists.parquet", list_rows())
    pairs = write_parquet(tmp_path / "pairs.parquet", pick_a_pic_rows(2))
    for want, noun in (("pair", "pairs"), ("list", "ranked lists")):
        with pytest.raises(DiffpoError, match=rf"single\.parquet has single images .* needs {noun}"):
            load(single, want)
    with pytest.raises(DiffpoError, match=r"lists\.parquet has ranked lists.*data\.columns\.liked=NAME"):
        load(lists, "single")
    with pytest.raises(DiffpoError, match=r"pairs\.parquet .*data\.ties=drop"):
        load(pairs, "list", ties="soft")
    with pytest.raises(DiffpoError, match=r"lists\.parquet has ranked lists.* data\.columns\.chosen"):
        load(lists, columns=Columns(images="images", chosen="prompt"))
    with pytest.raises(DiffpoError, match=r"pairs\.parquet .*data\.columns\.images=NAME"):
        load(pairs, columns=Columns(ranks="label_0"))
    with pytest.raises(DiffpoError, match=r"data\.columns\.scores .*data\.columns\.ranks"):
        load(lists, columns=Columns(ranks="scores", scores="scores"))
    assert [(load(pairs, want).kind, len(load(pairs, want))) for want in ("single", "list")] == [("pair", 2)] * 2


def test_scores_follow_the_images_and_give_the_gap(tmp_path):
    rows = pick_a_pic_rows(4)  # the first image wins in even rows
    for i, row in enumerate(rows):
        row |= {"score_0": 1.0 + i, "score_1": 1.5}
    source = write_parquet(tmp_path / "a.parquet", rows)
    groups = load(source)
    assert [group.scores for group in groups.groups] == [(1, 1.5), (1.5, 2), (3, 1.5), (1.5, 4)]
    # gaps: -0.5, -0.5, 1.5, -2.5; the easiest first, equal gaps in the order of the source
    assert groups.by_gap(2) == [2, 0, 1, 3]
    with pytest.raises(DiffpoError, match=r"data\.curriculum=5 .*a\.parquet.* 4 pairs"):
        groups.by_gap(5)
    rows[2]["score_1"] = None
    groups = load(write_parquet(tmp_path / "b.parquet", rows))
    assert len(groups) == 4 and not groups.scored
    with pytest.raises(DiffpoError, match=r"data\.curriculum .* 1 of 4 pairs, first in row 2; .*columns\.score_0"):
        groups.by_gap(2)
    renamed = [{**pick_a_pic_rows(1)[0], "s": 7.0, "t": 0.0}]
    source = write_parquet(tmp_path / "c.parquet", renamed)
    assert load(source).groups[0].scores is None
    assert load(source, columns=Columns(score_0="s", score_1="t")).groups[0].scores == (7, 0)
    with pytest.raises(DiffpoError, match=r"c\.parquet .*data\.columns\.score_1=NAME"):
        load(source, columns=Columns(score_0="s"))


def test_a_caption_for_each_image_and_the_user(tmp_path):
    rows = pick_a_pic_rows(2)
    for i, row in enumerate(rows):
        row |= {"caption_chosen": f"good {i}", "caption_rejected": f"bad {i}", "user_id": 7 if i else None}
    source = write_parquet(tmp_path / "a.parquet", rows)
    plain = load(source)
    assert [group.captions for group in plain.groups] == [("cat 0",), ("cat 1",)] and plain.groups[1].user is None
    columns = Columns(caption_chosen="caption_chosen", caption_rejected="caption_rejected", user="user_id")
    dual = load(source, columns=columns)
    # of the chosen image first, also where that is the second one
    assert [group.captions for group in dual.groups] == [("good 0", "bad 0"), ("good 1", "bad 1")]
    assert [group.user for group in dual.groups] == [None, "7"]
    assert dual.captions == ["bad 0", "bad 1", "good 0", "good 1"]
    assert dual.data_hash != plain.data_hash
    with pytest.raises(DiffpoError, match=r"mine .*data\.columns\.caption_rejected=NAME"):
        folder = write_folder(tmp_path / "mine", 1)
        load(folder, columns=Columns(caption_chosen="prompt"))
    rows[1]["caption_rejected"] = " "
    with pytest.raises(DiffpoError, match=r"row 1: .*caption_rejected"):
        load(write_parquet(tmp_path / "b.parquet", rows), columns=columns)


def test_the_data_hash_depends_on_labels_and_scores_but_image_hashes_do_not(tmp_path):
    rows = pick_a_pic_rows(3)
    rows[2]["jpg_1"] = rows[0]["jpg_0"]  # one image in two pairs
    first = load(write_parquet(tmp_path / "a.parquet", rows))
    for row in rows:
        row["label_0"], row["label_1"] = row["label_1"], row["label_0"]
    other = load(write_parquet(tmp_path / "b.parquet", rows))
    assert first.data_hash != other.data_hash
    (square,) = first.targets
    assert list(first.places(square)) == list(other.places(square)) and len(first.places(square)) == 5
    for groups in (first, other):
        shown = [groups.image(*place).tobytes() for place in groups.places(square).values()]
        assert shown == [picture(i).tobytes() for i in range(5)]
    for row in rows:
        row |= {"score_0": 1.0, "score_1": 0.0}
    assert load(write_parquet(tmp_path / "c.parquet", rows)).data_hash != other.data_hash


def test_a_sample_of_rows_of_lists(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", list_rows([[1.0, 2.0, 3.0]] * 6))
    groups = scan(Data(train=str(source), resolution=16), str(source), "train", limit=2)
    assert (groups.rows, groups.total, [group.row for group in groups.groups]) == (2, 6, [0, 0, 0, 3, 3, 3])
