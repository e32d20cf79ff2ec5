"""Folders with several splits: the requested one is read, and the others are named."""

import json

import datasets
import pytest
from test_formats import load, save, seen
from test_shards import orpo_members, write_tar
from tiny import pick_a_pic_rows, picture, write_folder, write_parquet

from diffpo.common.errors import DiffpoError
from diffpo.config import Data
from diffpo.data.groups import load_groups
from diffpo.data.source import canonical, split_of


def captions(source, split="train", **options):
    data = Data(train=str(source), resolution=16, **options)
    groups = load_groups(data, str(source), split)
    return [group.captions[0] for group in groups.groups], groups.remarks()


def rows(name, n=2):
    return [{**row, "caption": f"{name} {i}"} for i, row in enumerate(pick_a_pic_rows(n))]


def write(path, name, n=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_parquet(path, rows(name, n))


SPLITS = ("train", "validation", "test")


def hub(folder):
    for name in SPLITS:
        write(folder / "data" / f"{name}-00000-of-00001.parquet", name)


def hub_with_hashes(folder):
    for name in SPLITS:
        write(folder / "data" / f"{name}-00000-of-00002-0123abcd.parquet", name, 1)
        (folder / "data" / f"{name}-00001-of-00002-4567cdef.parquet").write_bytes(
            write_parquet(folder / "x", rows(name)[1:]).read_bytes()
        )
    (folder / "x").unlink()


def nested(folder):
    for name, spelt in zip(SPLITS, ("train", "val", "test"), strict=True):
        write(folder / "data" / spelt / "0000.parquet", name)


def words(folder):
    for name, spelt in zip(SPLITS, ("pairs_train", "pairs_dev", "pairs-eval"), strict=True):
        write(folder / f"{spelt}.parquet", name)


def converted(folder):
    for name in SPLITS:
        write(folder / "default" / name / "0000.parquet", name)


def tars(folder):
    folder.mkdir(exist_ok=True)
    for name in SPLITS:
        members = [each for i in range(2) for each in orpo_members(i, 1)]
        members = [(key, f"{name} {key[3]}".encode() if "caption" in key else value) for key, value in members]
        write_tar(folder / f"{name}-000.tar", members)


def saved(folder):
    parts = {name: datasets.Dataset.from_list(rows(name)) for name in SPLITS}
    datasets.DatasetDict(parts).save_to_disk(folder)


def folders_of_metadata(folder):
    for name in SPLITS:
        text = (write_folder(folder / name, 2) / "metadata.jsonl").read_text()
        (folder / name / "metadata.jsonl").write_text(text.replace("dog", name))


def files_of_lines(folder):
    write_folder(folder, 2)
    text = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").unlink()
    for name in SPLITS:
        (folder / f"{name}.jsonl").write_text(text.replace("dog", name))


def siblings(folder):
    for name in SPLITS:
        for number in range(2):
            save(folder / name / "chosen" / f"{number}.png", 2 * number)
            save(folder / name / "rejected" / f"{number}.png", 2 * number + 1)
            (folder / name / "chosen" / f"{number}.txt").write_text(f"{name} {number}")


LAYOUTS = [siblings, hub, hub_with_hashes, nested, words, converted, tars, saved, folders_of_metadata, files_of_lines]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_one_split_is_read_and_the_others_are_named(tmp_path, layout):
    layout(tmp_path / "ds")
    places = [tmp_path / "ds"] + [tmp_path / "ds" / "data"] * (tmp_path / "ds" / "data").is_dir()
    for place in places:
        for name in SPLITS:
            found, remarks = captions(place, name)
            assert found == [f"{name} 0", f"{name} 1"]
            (line,) = [each for each in remarks if each.startswith("split")]
            others = {canonical(word.strip("(),")) for word in line.split(" not read: ")[1].split()} & set(SPLITS)
            assert others == set(SPLITS) - {name}, line
        with pytest.raises(DiffpoError, match=r"'holdout'.*test.*data\.train_split=NAME"):
            captions(place, "holdout")


def test_a_split_may_have_a_shorter_name(tmp_path):
    nested(tmp_path)
    assert captions(tmp_path, "validation")[0] == captions(tmp_path, "val")[0] == ["validation 0", "validation 1"]


def test_splits_with_names_of_their_own(tmp_path):
    for name in ("train", "validation_unique", "validation"):
        write(tmp_path / "data" / f"{name}-00000-of-00001.parquet", name)
    assert captions(tmp_path, "validation_unique")[0] == ["validation_unique 0", "validation_unique 1"]
    assert captions(tmp_path, "validation")[0] == ["validation 0", "validation 1"]


@pytest.mark.parametrize(
    "names", [("a.parquet", "b.parquet"), ("part-00000-of-00002.parquet", "part-00001-of-00002.parquet")]
)
def test_files_without_a_split_in_their_names_are_all_read(tmp_path, names):
    for name in names:
        write(tmp_path / name, name)
    for split in SPLITS:
        assert captions(tmp_path, split)[0] == [f"{name} {i}" for name in names for i in range(2)]


def test_files_beside_the_splits_are_ignored_and_named(tmp_path):
    hub(tmp_path)
    for i in range(5):
        write(tmp_path / "data" / f"extra{i}.parquet", "extra")
    found, remarks = captions(tmp_path)
    assert found == ["train 0", "train 1"]
    assert remarks[-1].endswith("5 files: extra0.parquet, extra1.parquet, extra2.parquet and 2 more")


def test_a_folder_without_rows_is_not_a_split(tmp_path):
    write(tmp_path / "data" / "pairs.parquet", "mine")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "run.py").write_text("x")
    assert captions(tmp_path)[0] == ["mine 0", "mine 1"]


def test_one_file_is_read_whatever_its_name(tmp_path):
    hub(tmp_path)
    assert captions(tmp_path / "data" / "test-00000-of-00001.parquet")[0] == ["test 0", "test 1"]


def test_images_of_a_split_are_found_from_its_folder_and_from_the_whole(tmp_path):
    save(tmp_path / "images" / "a.png", 0)
    save(tmp_path / "train" / "b.png", 1)
    row = {"prompt": "x", "chosen": "images/a.png", "rejected": "b.png"}
    (tmp_path / "train" / "metadata.jsonl").write_text(json.dumps(row))
    assert seen(load(tmp_path)) == [("x", 1, (0, 1))]


def test_a_saved_dataset_is_read_in_place(tmp_path):
    images = datasets.Features(prompt=datasets.Value("string"), chosen=datasets.Image(), rejected=datasets.Image())
    made = {"prompt": ["a", "b"], "chosen": [picture(0), picture(2)], "rejected": [picture(1), picture(3)]}
    datasets.Dataset.from_dict(made, images).save_to_disk(tmp_path / "one", num_shards=2)
    assert seen(load(tmp_path / "one")) == [("a", 1, (0, 1)), ("b", 1, (2, 3))]
    assert len(load(tmp_path / "one", limit=1)) == 1
    state = tmp_path / "one" / "state.json"
    for change in ({"_data_files": [{"filename": "../x.arrow"}]}, {"_data_files": 7}):
        state.write_text(json.dumps(json.loads(state.read_text()) | change))
        with pytest.raises(DiffpoError, match=r"state\.json"):
            load(tmp_path / "one")


def test_a_damaged_saved_dataset_is_named(tmp_path):
    saved(tmp_path / "ds")
    for path in (tmp_path / "ds" / "train").glob("*.arrow"):
        path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(DiffpoError, match=r"\.arrow"):
        load(tmp_path / "ds")


def test_train_and_validation_may_be_one_folder(tiny_sd, make_config, tmp_path, capsys):
    from diffpo.commands.check import check

    hub(tmp_path / "ds")
    check(make_config(tiny_sd, f"data.validation={tmp_path / 'ds'}", data=tmp_path / "ds"))
    out = capsys.readouterr().out
    lines = [line.split(None, 1)[1] for line in out.splitlines() if line.strip().startswith("split ")]
    assert [line.split(";")[0] for line in lines] == ["train", "validation"]
    assert [line.split(": ")[1] for line in lines] == [
        "test (1 file), validation (1 file)",
        "test (1 file), train (1 file)",
    ]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00010.parquet", "train"),
        ("validation_unique-00000-of-00001-0a1b.parquet", "validation_unique"),
        ("my.Train.parquet", "train"),
        ("dev_2.tar", "validation"),
        ("evaluation.jsonl", "test"),
        ("trainer.parquet", None),
        ("strained.parquet", None),
        ("latest.tar", None),
    ],
)
def test_the_split_in_a_file_name(name, split):
    assert split_of(name) == split


def test_links_to_other_folders_are_not_splits_and_are_named(tmp_path):
    nested(tmp_path / "elsewhere")
    (tmp_path / "ds" / "data").mkdir(parents=True)
    (tmp_path / "ds" / "train").symlink_to(tmp_path / "elsewhere" / "data" / "train")
    with pytest.raises(DiffpoError, match=r"data\.roots=\[FOLDER\].*: train"):
        captions(tmp_path / "ds")
    assert captions(tmp_path / "ds", roots=[str(tmp_path / "elsewhere")])[0] == ["train 0", "train 1"]
    write(tmp_path / "ds" / "data" / "train.parquet", "own")
    found, (remark,) = captions(tmp_path / "ds")
    assert found == ["own 0", "own 1"] and "1 file: train" in remark


def test_pointers_of_git_lfs_and_broken_links_are_named(tmp_path):
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    path.parent.mkdir()
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(DiffpoError, match=r"train-00000-of-00001\.parquet.*git lfs pull"):
        captions(tmp_path)
    path.unlink()
    path.symlink_to("../.git/annex/objects/0a.parquet")
    with pytest.raises(DiffpoError, match=r"train-00000-of-00001\.parquet: No such file"):
        captions(tmp_path)


def test_a_folder_without_rows_is_refused_with_its_folders(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name / "a.parquet", name)
    with pytest.raises(DiffpoError, match=f"{tmp_path} .*one, two"):
        captions(tmp_path)
