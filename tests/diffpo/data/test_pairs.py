"""Pairs in parquet files and folders: labels, ties, bad rows and missing columns."""

import io
import json

import datasets
import numpy as np
import pytest
from PIL import Image
from tiny import pick_a_pic_rows, picture, png, write_folder, write_parquet

from diffpo.common.errors import DiffpoError
from diffpo.config import Columns, Data
from diffpo.data.groups import load_groups, scan


def data(source, **options) -> Data:
    return Data(train=str(source), resolution=16, **options)


def load(source, **options):
    return load_groups(data(source, **options), str(source), "train")


def test_pick_a_pic_columns_give_chosen_and_rejected_by_label(tmp_path):
    pairs = load(write_parquet(tmp_path / "a.parquet", pick_a_pic_rows(4)))
    assert [pair.captions for pair in pairs.groups] == [("cat 0",), ("cat 1",), ("cat 2",), ("cat 0",)]
    for i in range(4):
        chosen, rejected = pairs.images(i)
        first, second = picture(2 * i), picture(2 * i + 1)
        expected = (first, second) if i % 2 == 0 else (second, first)
        assert (chosen.tobytes(), rejected.tobytes()) == tuple(image.tobytes() for image in expected)


def test_folder_with_metadata_and_renamed_columns(tmp_path):
    folder = write_folder(tmp_path / "mine", 3)
    pairs = load(folder)
    assert [pair.captions for pair in pairs.groups] == [("dog 0",), ("dog 1",), ("dog 2",)]
    assert [image.tobytes() for image in pairs.images(2)] == [picture(4).tobytes(), picture(5).tobytes()]
    text = (folder / "metadata.jsonl").read_text().replace("chosen_file_name", "good").replace('"prompt"', '"what"')
    (folder / "metadata.jsonl").write_text(text)
    again = load(folder, columns=Columns(caption="what", chosen="good"))
    assert again.data_hash == pairs.data_hash


def test_datasets_image_columns_are_read(tmp_path):
    rows = {"prompt": ["x"], "chosen": [picture(0)], "rejected": [picture(1)]}
    features = datasets.Features(prompt=datasets.Value("string"), chosen=datasets.Image(), rejected=datasets.Image())
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "images.parquet")
    pairs = load(tmp_path / "images.parquet")
    assert [image.tobytes() for image in pairs.images(0)] == [picture(0).tobytes(), picture(1).tobytes()]


def test_ties_are_dropped_or_kept_as_soft_labels(tmp_path):
    rows = pick_a_pic_rows(5, ties=2)
    rows[0] |= {"label_0": 0.25, "label_1": 0.75}
    source = write_parquet(tmp_path / "a.parquet", rows)
    hard, soft = load(source), load(source, ties="soft")
    assert ([pair.preference for pair in hard.groups], hard.ties) == ([1, 1, 1], 2)
    assert [pair.preference for pair in soft.groups] == [0.75, 1, 1, 0.5, 0.5]
    assert hard.groups[0].images == soft.groups[0].images == (1, 0)  # the second image is the likelier winner
    assert hard.data_hash != soft.data_hash


def test_all_ties_are_refused_either_way(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", pick_a_pic_rows(3, ties=3))
    for ties in ("drop", "soft"):
        with pytest.raises(DiffpoError, match=r"a\.parquet: all 3 .* ties"):
            load(source, ties=ties)


def _spoil(fault: str) -> list[dict]:
    rows = pick_a_pic_rows(4)
    good = rows[2]["jpg_0"]
    change = {
        "truncated": {"jpg_0": good[: len(good) // 2]},
        "not an image": {"jpg_1": b"<html>404</html>"},
        "missing": {"jpg_0": None},
        "empty caption": {"caption": "  "},
        "no caption": {"caption": None},
        "sizes": {"jpg_0": png(picture(0, (24, 16)))},
        "no label": {"label_0": None, "label_1": None},
        "labels": {"label_0": 1.0, "label_1": 1.0},
    }
    rows[2] |= change[fault]
    return rows


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("truncated", "unreadable image: jpg_0: "),
        ("not an image", "unreadable image: jpg_1: "),
        ("missing", "missing image"),
        ("empty caption", "empty caption"),
        ("no caption", "empty caption"),
        ("sizes", "chosen and rejected differ in size: jpg_0 and jpg_1: 24x16 and 16x16; data.buckets=true"),
        ("no label", "no label"),
        ("labels", "not a preference: [1.0, 1.0]"),
    ],
)
def test_a_bad_row_is_named_or_skipped_and_counted(tmp_path, fault, words):
    source = write_parquet(tmp_path / "a.parquet", _spoil(fault))
    with pytest.raises(DiffpoError) as error:
        load(source)
    assert "1 of 4 rows" in str(error.value) and f"row 2: {words}" in str(error.value)
    pairs = load(source, bad_rows="skip")
    assert [pair.row for pair in pairs.groups] == [0, 1, 3]
    assert pairs.bad_reasons.total() == 1 and pairs.bad[0][0] == 2


def test_a_truncated_jpeg_is_found_before_training(tmp_path):
    buffer = io.BytesIO()
    picture(0, (64, 64)).save(buffer, "JPEG")
    rows = pick_a_pic_rows(1, size=(64, 64))
    rows[0]["jpg_0"] = buffer.getvalue()[:-200]
    source = write_parquet(tmp_path / "a.parquet", rows)
    assert scan(data(source), str(source), "train").bad_reasons == {"unreadable image": 1}


def test_a_missing_image_file_is_a_bad_row(tmp_path):
    folder = write_folder(tmp_path / "mine", 2)
    (folder / "images" / "1-chosen.png").unlink()
    with pytest.raises(DiffpoError, match=r"row 1: .*images/1-chosen\.png: No such file"):
        load(folder)


def test_missing_columns_are_named_with_the_existing_ones(tmp_path):
    rows = [{"text": "x", "jpg_0": b"", "jpg_1": b"", "label_0": 1.0}]
    source = write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(DiffpoError, match=r"a\.parquet .*: text, jpg_0, .*data\.columns\.caption=NAME"):
        load(source)
    with pytest.raises(DiffpoError, match=r"a\.parquet .*'words' .data\.columns\.caption"):
        load(source, columns=Columns(caption="words"))


def test_missing_and_unreadable_sources_are_named(tmp_path):
    (tmp_path / "torn.parquet").write_bytes(
        write_parquet(tmp_path / "a.parquet", pick_a_pic_rows(3)).read_bytes()[:-40]
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "metadata.jsonl").write_text(json.dumps({"prompt": "x"}) + "\n{broken")
    for name in ("torn.parquet", "empty", "notes.txt", "nowhere.parquet", "bad"):
        with pytest.raises(DiffpoError, match=name):
            load(tmp_path / name)
    with pytest.raises(DiffpoError, match=r"nobody/nothing.*hf download --repo-type dataset nobody/nothing"):
        load("nobody/nothing")


def test_limit_reads_evenly_spaced_rows(pairs_parquet):
    pairs = scan(data(pairs_parquet), str(pairs_parquet), "train", limit=4)
    assert (pairs.rows, pairs.total, [pair.row for pair in pairs.groups]) == (4, 12, [0, 3, 6, 9])


def test_sixteen_bit_grey_is_scaled_and_palette_transparency_makes_no_noise(tmp_path, recwarn):
    ramp = (np.arange(256, dtype=np.uint16) * 256).reshape(16, 16)
    palette = picture(0).convert("P")
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=bytes([0, 128, 255]))
    rows = pick_a_pic_rows(1)
    rows[0] |= {"jpg_0": png(Image.fromarray(ramp)), "jpg_1": buffer.getvalue()}
    pairs = load(write_parquet(tmp_path / "a.parquet", rows))
    grey, colours = (np.asarray(image) for image in pairs.images(0))
    assert np.array_equal(grey[..., 0].ravel(), np.arange(256)) and np.array_equal(grey[..., 0], grey[..., 2])
    assert np.array_equal(colours, np.asarray(palette.convert("RGB")))
    assert not [warning for warning in recwarn if "transparency" in str(warning.message).lower()]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": 7}, ".*caption.*: 7"),
        ({"chosen_file_name": "images/\0.png"}, ".*null (byte|character)"),
        ({"chosen_file_name": "x" * 5000}, ".*: x{197}...: File name too long"),
    ],
)
def test_odd_cells_of_a_metadata_file_are_bad_rows(tmp_path, change, words):
    folder = write_folder(tmp_path / "mine", 1)
    row = json.loads((folder / "metadata.jsonl").read_text())
    (folder / "metadata.jsonl").write_text(json.dumps(row | change) + "\n")
    with pytest.raises(DiffpoError, match=f"row 0: {words}"):
        load(folder)


def test_sources_without_rows(tmp_path):
    import pyarrow.parquet as pq

    shards = tmp_path / "shards"
    shards.mkdir()
    full = write_parquet(shards / "1.parquet", pick_a_pic_rows(3))
    pq.write_table(pq.read_table(full).slice(0, 0), shards / "0.parquet")
    assert len(load(shards)) == 3
    with pytest.raises(DiffpoError, match=r"0\.parquet"):
        load(shards / "0.parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metadata.jsonl").touch()
    with pytest.raises(DiffpoError, match=r"metadata\.jsonl"):
        load(tmp_path / "empty")


def test_an_image_that_vanishes_during_the_run_is_named(tmp_path):
    folder = write_folder(tmp_path / "mine", 2)
    pairs = load(folder)
    (folder / "images" / "1-rejected.png").unlink()
    with pytest.raises(DiffpoError, match=r"row 1 .*1-rejected"):
        pairs.images(1)


def test_small_local_sources_are_read_without_progress_bars(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.enable_progress_bars()
    try:
        load(write_parquet(tmp_path / "a.parquet", pick_a_pic_rows(2)))
        assert "split" not in capfd.readouterr().err
        assert not datasets.are_progress_bars_disabled()
    finally:
        datasets.disable_progress_bars()


def test_a_full_disk_of_the_datasets_cache_is_named(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffpo.common.files.os.replace", full)
    rows = [{**row, "caption": "in no other test"} for row in pick_a_pic_rows(2)]
    with pytest.raises(DiffpoError, match=r"copy of the rows of .*the disk is full.*HF_DATASETS_CACHE=FOLDER"):
        load(write_parquet(tmp_path / "a.parquet", rows))
    monkeypatch.setattr(datasets, "load_dataset", full)
    with pytest.raises(DiffpoError, match=r"someone/pairs.*HF_DATASETS_CACHE=FOLDER"):
        load("someone/pairs")
