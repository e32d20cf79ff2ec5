"""Public data sets and folders of equal names, without a column map: tiny files in exactly those formats, and the
order of the images in their groups."""

import json

import datasets
import pytest
from tiny import pick_a_pic_rows, picture, png, write_parquet

from diffpo.common.errors import DiffpoError
from diffpo.config import Columns, Data
from diffpo.data.groups import load_groups


def load(source, want="pair", **options):
    return load_groups(Data(train=str(source), resolution=16, **options), str(source), "train", want)


def seen(groups):
    """(caption, preference, images best first) of each group, the images as the seeds of `picture`."""
    known = {picture(seed).tobytes(): seed for seed in range(40)}
    found = []
    for i, group in enumerate(groups.groups):
        images = tuple(known[image.tobytes()] for image in groups.images(i))
        found.append((group.captions[0], group.preference, images))
    return found


def save(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path)
    return path


# ---- public data sets


def pick_a_pic_row(i, first, **change):
    row = {
        "are_different": first != 0.5,
        "best_image_uid": "",
        "caption": f"cat {i}",
        "created_at": None,
        "has_label": True,
        "image_0_uid": f"{i}a",
        "image_0_url": "",
        "image_1_uid": f"{i}b",
        "image_1_url": "",
        "jpg_0": png(picture(2 * i)),
        "jpg_1": png(picture(2 * i + 1)),
        "label_0": first,
        "label_1": 1 - first,
        "model_0": "x",
        "model_1": "y",
        "ranking_id": i,
        "user_id": 3,
        "num_example_per_prompt": 1,
        "__index_level_0__": i,
    }
    return row | change


def test_ties_and_rows_without_a_label_of_pick_a_pic_are_dropped(tmp_path):
    rows = [
        pick_a_pic_row(0, 1.0),
        pick_a_pic_row(1, 0.0),
        pick_a_pic_row(2, 0.5),
        pick_a_pic_row(3, 1.0, has_label=False),
        pick_a_pic_row(4, 1.0, has_label=False, label_0=float("nan"), label_1=None),
    ]
    groups = load(write_parquet(tmp_path / "a.parquet", rows))
    assert seen(groups) == [("cat 0", 1, (0, 1)), ("cat 1", 1, (3, 2))]
    assert (groups.ties, groups.unlabelled, groups.bad) == (1, 2, [])
    soft = load(tmp_path / "a.parquet", ties="soft")
    assert [preference for _, preference, _ in seen(soft)] == [1, 1, 0.5] and soft.unlabelled == 2
    unlabelled = write_parquet(tmp_path / "b.parquet", rows[3:])
    with pytest.raises(DiffpoError, match=r"b\.parquet: .*has_label .* 2 rows"):
        load(unlabelled)


def test_smpo_scores_beside_pick_a_pic(tmp_path):
    row = pick_a_pic_row(0, 0.0, ps_score_0=0.2, ps_score_1=0.7)
    assert load(write_parquet(tmp_path / "a.parquet", [row])).groups[0].scores == (0.7, 0.2)


def test_hpdv2_train_file_beside_its_folder(tmp_path):
    for seed in range(4):
        save(tmp_path / "train" / f"{seed:08d}.png", seed)
    rows = [
        {"prompt": "a", "human_preference": [0, 1], "file_path": ["00000000.png", "00000001.png"], "user_hash": "u"},
        {"prompt": "b", "human_preference": [1, 0], "file_path": ["00000002.png", "00000003.png"], "user_hash": "v"},
        {"prompt": "c", "human_preference": [0, 0], "file_path": ["00000002.png", "00000003.png"], "user_hash": "v"},
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    groups = load(tmp_path / "train.json")
    assert seen(groups) == [("a", 1, (1, 0)), ("b", 1, (2, 3))]
    assert groups.ties == 1


def test_hpdv2_test_file_is_ranked(tmp_path):
    for seed in range(3):
        save(tmp_path / "test" / f"{seed}.png", seed)
    row = {
        "prompt": "a",
        "image_path": ["0.png", "1.png", "2.png"],
        "rank": [3, 1, 2],
        "raw_annotations": [{"rank": [3, 1, 2], "user_hash": "u"}],
    }
    (tmp_path / "test.json").write_text(json.dumps([row]))
    assert seen(load(tmp_path / "test.json", "list", list_size=3)) == [("a", 1, (1, 2, 0))]
    assert seen(load(tmp_path / "test.json")) == [("a", 1, pair) for pair in ((1, 2), (1, 0), (2, 0))]


def test_hpdv3_path1_is_the_better_one(tmp_path):
    for seed in range(4):
        save(tmp_path / "images" / f"{seed}.png", seed)
    rows = [
        {"prompt": "a", "path1": "images/0.png", "path2": "images/1.png", "confidence": 0.9, "choice_dist": [8, 1]},
        {"prompt": "b", "path1": "images/3.png", "path2": "images/2.png", "confidence": None, "choice_dist": None},
    ]
    rows = [{**row, "model1": "x", "model2": "y"} for row in rows]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    assert seen(load(tmp_path / "train.json")) == [("a", 1, (0, 1)), ("b", 1, (3, 2))]


def test_image_reward_rank_1_is_the_best(tmp_path):
    for seed in range(3):
        save(tmp_path / "images" / f"{seed}.png", seed)
    row = {"prompt": "a", "generations": [f"images/{i}.png" for i in range(3)], "ranking": [2, 3, 1]}
    (tmp_path / "train.json").write_text(json.dumps([row]))
    assert seen(load(tmp_path / "train.json", "list", list_size=3)) == [("a", 1, (2, 0, 1))]


def test_image_reward_db_has_a_row_for_each_image(tmp_path):
    for seed in range(5):
        save(tmp_path / "images" / "train" / f"{seed}.png", seed)

    def row(seed, prompt, rank):
        about = {"image_id": f"{seed}", "prompt_id": f"00{prompt}", "prompt": prompt, "classification": "People"}
        judged = {"image_amount_in_total": 3, "rank": rank, "overall_rating": 5, "fidelity_rating": 5}
        return {**about, **judged, "image_path": f"images/train/{seed}.png"}

    rows = [row(0, "a", 2), row(1, "b", 1), row(2, "a", 1), row(3, "b", 2), row(4, "a", 2)]
    groups = load(write_parquet(tmp_path / "metadata-train.parquet", rows))
    # "a": 2 before 0 and 4, which tie; "b": 1 before 3
    assert sorted(seen(groups)) == [("a", 1, (2, 0)), ("a", 1, (2, 4)), ("b", 1, (1, 3))]
    assert groups.ties == 1


def test_open_image_preferences_has_image_columns(tmp_path):
    rows = {"id": ["x"], "prompt": ["a"], "chosen": [picture(1)], "rejected": [picture(0)], "category": ["Anime"]}
    image, text = datasets.Image(), datasets.Value("string")
    features = datasets.Features(id=text, prompt=text, chosen=image, rejected=image, category=text)
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    assert seen(load(tmp_path)) == [("a", 1, (1, 0))]


def test_syn_pic_lists_of_images_and_scores(tmp_path):
    rows = [{"prompt": "a", "images": [png(picture(i)) for i in range(4)], "scores": [0.1, 0.4, 0.3, 0.2]}]
    groups = load(write_parquet(tmp_path / "a.parquet", rows), "list")
    assert seen(groups) == [("a", 1, (1, 2, 3, 0))] and groups.groups[0].scores == (0.4, 0.3, 0.2, 0.1)


def test_the_first_rows_only(tmp_path):
    groups = load(write_parquet(tmp_path / "a.parquet", pick_a_pic_rows(6)), limit=4)
    assert [group.row for group in groups.groups] == [0, 1, 2, 3] and groups.total == 4
    assert len(load(tmp_path / "a.parquet", limit=100)) == 6


# ---- two folders


@pytest.fixture
def siblings(tmp_path):
    """Pairs a and deep/b."""
    folder = tmp_path / "mine"
    for name, seed in (("a", 0), ("deep/b", 2)):
        save(folder / "chosen" / f"{name}.png", seed)
        save(folder / "rejected" / f"{name}.png", seed + 1)
        (folder / "chosen" / f"{name}.txt").write_text(f"  photo of {name}\n")
    return folder


def test_two_folders_with_equal_names(siblings):
    (siblings / "chosen" / "notes.md").write_text("x")
    (siblings / "rejected" / "a.png").rename(siblings / "rejected" / "a.PNG")  # another suffix is the same name
    assert seen(load(siblings)) == [("photo of a", 1, (0, 1)), ("photo of deep/b", 1, (2, 3))]


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("rejected/a.png", "row 0: .*rejected/a.png: No such file"),
        ("chosen/deep/b.png", "row 1: .*chosen/deep/b.png: No such file"),
        ("chosen/a.txt", "row 0: .*chosen/a.txt: No such file"),
    ],
)
def test_files_without_their_counterpart_are_named(siblings, gone, words):
    (siblings / gone).unlink()
    with pytest.raises(DiffpoError, match=f"1 of 2 rows.*{words}"):
        load(siblings)
    assert len(load(siblings, bad_rows="skip")) == 1
    if gone.endswith("b.png"):  # the missing image is reported, even if its caption is missing too
        (siblings / "chosen" / "deep" / "b.txt").unlink()
        with pytest.raises(DiffpoError, match=words):
            load(siblings)


def test_folders_that_cannot_be_paired(siblings, tmp_path):
    save(siblings / "rejected" / "a.jpg", 1)
    with pytest.raises(DiffpoError, match=r"rejected .*a\.jpg and a\.png"):
        load(siblings)
    (tmp_path / "half" / "chosen").mkdir(parents=True)
    save(tmp_path / "half" / "chosen" / "a.png", 0)
    with pytest.raises(DiffpoError, match=r"half/rejected .*chosen/NAME\.png"):
        load(tmp_path / "half")
    (tmp_path / "half" / "chosen" / "a.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DiffpoError, match=r"row 0: .*chosen/a\.txt"):
        save(tmp_path / "half" / "rejected" / "a.png", 0)
        load(tmp_path / "half")


def test_columns_of_the_config_replace_the_usual_names(tmp_path):
    row = {"prompt": "a", "path1": png(picture(0)), "path2": png(picture(1))}
    source = write_parquet(tmp_path / "a.parquet", [row])
    assert seen(load(source, columns=Columns(chosen="path2", rejected="path1"))) == [("a", 1, (1, 0))]
