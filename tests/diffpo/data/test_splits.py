"""Folders that hold several splits: the one that is asked for is read, and the others are named."""

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
            others = {canonical(word.strip("(),")) for word in line.split(" left are ")[1].split()} & set(SPLITS)
            assert others == set(SPLITS) - {name}, line
        with pytest.raises(DiffpoError, match=r"has no split 'holdout'; it has .*test.*data\.train_split=NAME"):
            captions(place, "holdout")


def test_the_splits_word_may_be_spelt_otherwise(tmp_path):
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
def test_names_that_tell_no_split_are_all_read(tmp_path, names):
    for name in names:
        write(tmp_path / name, name)
    for split in SPLITS:
        assert captions(tmp_path, split)[0] == [f"{name} {i}" for name in names for i in range(2)]


def test_files_beside_the_splits_are_passed_over_and_named(tmp_path):
    hub(tmp_path)
    for i in range(5):
        write(tmp_path / "data" / f"extra{i}.parquet", "extra")
    found, remarks = captions(tmp_path)
    assert found == ["train 0", "train 1"]
    assert "passed over 5 files: extra0.parquet, extra1.parquet, extra2.parquet and 2 more" in remarks


def test_a_folder_that_a_word_names_by_chance_is_no_split(tmp_path):
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
        with pytest.raises(DiffpoError, match=r"state\.json does not list the files"):
            load(tmp_path / "one")


def test_a_torn_saved_dataset_is_named(tmp_path):
    saved(tmp_path / "ds")
    for path in (tmp_path / "ds" / "train").glob("*.arrow"):
        path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(DiffpoError, match=r"cannot read the rows of .*\.arrow"):
        load(tmp_path / "ds")


def test_train_and_validation_may_be_one_folder(tiny_sd, make_config, tmp_path, capsys):
    from diffpo.commands.check import check

    hub(tmp_path / "ds")
    check(make_config(tiny_sd, f"data.validation={tmp_path / 'ds'}", data=tmp_path / "ds"))
    out = capsys.readouterr().out
    assert "split       train is read; left are test (1 file), validation (1 file)" in out
    assert "split       validation is read; left are test (1 file), train (1 file)" in out


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
def test_the_split_that_a_name_tells(name, split):
    assert split_of(name) == split


def test_links_that_lead_out_are_no_splits_and_are_named(tmp_path):
    nested(tmp_path / "elsewhere")
    (tmp_path / "ds" / "data").mkdir(parents=True)
    (tmp_path / "ds" / "train").symlink_to(tmp_path / "elsewhere" / "data" / "train")
    with pytest.raises(DiffpoError, match=r"holds neither.*links lead out of it .data\.roots=\[FOLDER\].*: train"):
        captions(tmp_path / "ds")
    assert captions(tmp_path / "ds", roots=[str(tmp_path / "elsewhere")])[0] == ["train 0", "train 1"]
    write(tmp_path / "ds" / "data" / "train.parquet", "own")
    assert captions(tmp_path / "ds") == (["own 0", "own 1"], ["passed over 1 file: train (leads out of the folder)"])


def test_what_a_clone_holds_where_a_large_file_was_not_fetched(tmp_path):
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    path.parent.mkdir()
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(DiffpoError, match=r"cannot read the rows of .*train-0.*a pointer of git LFS.*git lfs pull"):
        captions(tmp_path)
    path.unlink()
    path.symlink_to("../.git/annex/objects/0a.parquet")
    with pytest.raises(DiffpoError, match=r"cannot read the rows of .*train-00000-of-00001\.parquet: No such file"):
        captions(tmp_path)


def test_a_folder_without_rows_says_which_folders_it_holds(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name / "a.parquet", name)
    with pytest.raises(DiffpoError, match=r"holds neither .*; it holds the folders one, two"):
        captions(tmp_path)
