"""Votes as rows: what the data room reads from them equals what people said."""

import io
import json

import numpy as np
import pytest
from annotated import cast, make_session, mask, picture, png, vote, write_pairs, write_table
from PIL import Image

from diffpo.annotate import export
from diffpo.annotate.assign import Plan
from diffpo.annotate.export import Export
from diffpo.common.errors import DiffpoError
from diffpo.config import Columns, Data
from diffpo.data.groups import load_groups

WINNERS = {  # by task: what three annotators say; None is a tie
    0: (0, 0, 0),
    1: (0, 0, 1),
    2: (1, 1, None),
    3: (0, 1, None),
    4: (None, None, 1),
}


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Five pairs with three votes each as in `WINNERS`, one that all find bad, one that is skipped."""
    folder = tmp_path_factory.mktemp("votes")
    session = make_session(folder / "votes", write_pairs(folder / "pairs", 7), Plan(per_task=3, repeat=0.0))
    number = {task.id: k for k, task in enumerate(session.tasks.all)}
    for a, name in enumerate(("ada", "bob", "eve")):
        for given in session.next(name, 9, [])["tasks"]:
            k, uid = number[given["task"]], f"vote-{name}-{given['task']}"
            if k in WINNERS:
                winner, about = WINNERS[k][a], {}
                if k == 0 and name != "eve":  # both mark another part of the loser
                    shown = given["pictures"].index(session.tasks.all[0].pictures[1].key)
                    box = (0, 0, 6, 8) if name == "ada" else (18, 0, 24, 8)
                    about = {"marks": {str(shown): mask((24, 16), box)}}
                cast(session, given, winner, uid, name, ms=1000 * (a + 1), **about)
            elif k == 5:
                cast(session, given, None, uid, name, bad=True)
            else:
                session.record(vote(given["task"], None, uid, name))
    return session


def written(session, tmp_path, export_as=Export()):  # noqa: B008 (frozen)
    counts = export.run(session.store.path.parent, tmp_path / "votes.parquet", export_as)
    return counts, tmp_path / "votes.parquet"


def read(path, **options):
    columns = Columns(mask="mask", user=options.pop("user", None))
    return load_groups(Data(resolution=16, columns=columns, **options), str(path), "train", options.pop("want", "pair"))


def table(path):
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def test_the_majority_is_what_train_reads(session, tmp_path):
    counts, path = written(session, tmp_path)
    assert counts == {"rows": 5, "votes": 21, "ties": 1, "both_bad": 3, "skipped": 3}
    soft = read(path, ties="soft")
    won = {group.row: (group.images, group.preference) for group in soft.groups}
    assert won == {0: ((0, 1), 1.0), 1: ((0, 1), 1.0), 2: ((1, 0), 1.0), 3: ((0, 1), 0.5), 4: ((1, 0), 1.0)}
    assert len(read(path).groups) == 4 and read(path).ties == 1


def test_shares_are_soft_labels(session, tmp_path):
    _, path = written(session, tmp_path, Export("share"))
    labels = [row["label_0"] for row in table(path)]
    assert labels == pytest.approx([1, 2 / 3, 0.5 / 3, 0.5, 1 / 3])
    preferences = {group.row: group.preference for group in read(path, ties="soft").groups}
    assert preferences == pytest.approx({0: 1, 1: 2 / 3, 2: 2.5 / 3, 3: 0.5, 4: 2 / 3})


def test_every_vote_is_a_row_of_its_user(session, tmp_path):
    counts, path = written(session, tmp_path, Export("each"))
    assert counts["rows"] == 15
    groups = read(path, ties="soft", user="user_id").groups
    found = {(g.captions[0], g.user): 0.5 if g.preference == 0.5 else float(g.images == (0, 1)) for g in groups}
    expected = {
        (f"prompt {k}", name): 0.5 if said[a] is None else float(said[a] == 0)
        for k, said in WINNERS.items()
        for a, name in enumerate(("ada", "bob", "eve"))
    }
    assert found == expected
    assert {row["user_id"]: row["seconds"] for row in table(path)} == {"ada": 1, "bob": 2, "eve": 3}


def test_bad_pairs_are_left_out_or_ties(session, tmp_path):
    counts, path = written(session, tmp_path, Export(both_bad="tie"))
    (row,) = [row for row in table(path) if row["prompt"] == "prompt 5"]
    assert row["label_0"] == 0.5 and counts["rows"] == 6


def test_marks_of_all_annotators_weigh_the_error_where_they_are(session, tmp_path):
    _, path = written(session, tmp_path)
    rows = table(path)
    with Image.open(io.BytesIO(rows[0]["mask"])) as image:
        marked = np.asarray(image.convert("L")) > 0
    expected = np.zeros((16, 24), bool)
    expected[:8, :6] = expected[:8, 18:] = True
    assert (marked == expected).all() and rows[0]["mask_1"] == rows[0]["mask"] and rows[0]["mask_0"] is None
    assert all(row["mask"] is None for row in rows[1:])
    groups = read(path)
    assert (np.asarray(groups.mask(0)) > 0).tolist() == expected.tolist() and groups.mask(1) is None


def test_the_pictures_are_those_of_the_source(session, tmp_path):
    _, path = written(session, tmp_path)
    for k, row in enumerate(table(path)):
        assert [row["image_0"], row["image_1"]] == [png(picture(2 * k)), png(picture(2 * k + 1))]
        assert row["votes"] == 3 and row["user_id"] is None and row["seconds"] == 2.0


def lists(tmp_path, ask, n=4):
    images = [png(picture(k)) for k in range(n)]
    source = write_table(tmp_path / "lists.parquet", [{"prompt": "x", "images": images, "ranks": [1.0] * n}])
    return make_session(tmp_path / "votes", source, Plan(per_task=3, repeat=0.0), ask=ask), images


def said(session, name, ranks):
    """``ranks`` by the picture's number in the task."""
    (given,) = session.next(name, 1, [])["tasks"]
    numbers = {each.key: k for k, each in enumerate(session.tasks.all[0].pictures)}
    session.record(vote(given["task"], [ranks[numbers[key]] for key in given["pictures"]], f"vote-{name}-1", name))


def test_rankings_become_ranked_lists_by_their_mean_rank(tmp_path):
    session, images = lists(tmp_path, "ranking")
    said(session, "ada", [2, 1, 3, 4])
    said(session, "bob", [1, 3, 2, 4])
    _, path = written(session, tmp_path)
    (row,) = table(path)
    assert row["images"] == images and row["ranks"] == [1.0, 2.0, 3.0, 4.0]  # means 1.5, 2, 2.5, 4
    pairs = {group.images for group in load_groups(Data(resolution=16), str(path), "train", "pair").groups}
    assert pairs == {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}
    (group,) = load_groups(Data(resolution=16), str(path), "train", "list").groups
    assert group.images == (0, 1, 2, 3)


def test_a_best_picture_wins_against_each_other_one_and_says_nothing_of_those(tmp_path):
    session, images = lists(tmp_path, "best")
    said(session, "ada", [2, 1, 2, 2])
    said(session, "bob", [2, 1, 2, 2])
    said(session, "eve", [1, 2, 2, 2])
    _, path = written(session, tmp_path)
    found = [(images.index(row["image_0"]), images.index(row["image_1"]), row["label_0"]) for row in table(path)]
    assert found == [(1, 0, 1.0), (1, 2, 1.0), (1, 3, 1.0)]
    written(session, tmp_path, Export("share"))
    assert [row["label_0"] for row in table(path)] == pytest.approx([2 / 3, 1, 1])


def test_no_best_picture_is_counted_and_makes_no_row(tmp_path):
    session, _ = lists(tmp_path, "best")
    said(session, "ada", [2, 1, 2, 2])
    said(session, "bob", [1, 2, 2, 2])
    with pytest.raises(DiffpoError, match="2 votes"):
        written(session, tmp_path)
    assert not (tmp_path / "votes.parquet").exists()


def test_masks_of_pictures_of_other_sizes_fit_the_first(tmp_path):
    rows = [{"prompt": "x", "image_0": png(picture(0, (24, 16))), "image_1": png(picture(1, (48, 32)))}]
    session = make_session(tmp_path / "votes", write_table(tmp_path / "pairs.parquet", rows))
    (given,) = session.next("ada", 1, [])["tasks"]
    second = session.tasks.all[0].pictures[1].key
    marks = {str(given["pictures"].index(second)): mask((48, 32), (0, 0, 24, 32))}
    cast(session, given, 0, "vote-0001", marks=marks)
    _, path = written(session, tmp_path)
    with Image.open(io.BytesIO(table(path)[0]["mask"])) as image:
        assert image.size == (24, 16) and image.convert("L").getbbox() == (0, 0, 12, 16)
    assert read(path, buckets=True).groups[0].mask


def test_files_are_named_as_the_source_does_for_labels_of_collect(session, tmp_path):
    from diffpo.rollout.labels import read_labels

    counts = export.run(session.store.path.parent, tmp_path / "votes.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    assert [(row["image_0"], row["image_1"]) for row in rows] == [(f"{k}-0.png", f"{k}-1.png") for k in range(5)]
    assert [row["label_0"] for row in rows] == [1, 1, 0, 0.5, 0] and counts["unmarked"] == 1
    labels = read_labels(tmp_path / "votes.jsonl")
    assert [(label.group, label.chosen, label.rejected) for label in labels] == [
        *(("0", 0, 1), ("1", 0, 1), ("2", 1, 0), ("4", 1, 0))
    ]


def test_what_cannot_be_exported_is_named(session, tmp_path):
    with pytest.raises(DiffpoError, match="parquet"):
        export.run(session.store.path.parent, tmp_path / "votes.csv")
    moved = make_session(tmp_path / "votes", write_pairs(tmp_path / "pairs", 1, prompt="a cat {}"))
    (given,) = moved.next("ada", 1, [])["tasks"]
    cast(moved, given, 0, "vote-0001")
    picture(77).save(tmp_path / "pairs" / "0-1.png")
    with pytest.raises(DiffpoError, match="a cat 0"):
        export.run(tmp_path / "votes", tmp_path / "out.parquet")


def test_repeated_tasks_are_in_no_count(tmp_path):
    session = make_session(tmp_path / "votes", write_pairs(tmp_path / "pairs", 2))
    first, second = session.next("ada", 9, [])["tasks"]
    cast(session, first, 0, "vote-one")
    session.record(vote(second["task"], None, "vote-two"))
    session.record(vote(first["task"], None, "vote-again", repeat=1))
    counts, _ = written(session, tmp_path)
    assert (counts["rows"], counts["votes"], counts["skipped"]) == (1, 2, 1)
