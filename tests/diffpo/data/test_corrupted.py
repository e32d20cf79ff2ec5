"""Damaged pictures: all are counted, and the others give the very data set that they give alone."""

import json

import pytest
from test_formats import load
from tiny import pick_a_pic_rows, write_parquet

from diffpo.common.errors import DiffpoError
from diffpo.train.loop import train

DAMAGE = (
    lambda picture: picture[: len(picture) // 2],
    lambda picture: b"<!DOCTYPE html><html>404</html>",
    lambda picture: b"",
    lambda picture: bytes(len(picture)),
)
BAD = {3: "jpg_0", 8: "jpg_1", 17: "jpg_0", 18: "jpg_1"}


@pytest.fixture
def sources(tmp_path):
    """40 pairs of which four are damaged, and the other 36."""
    rows = pick_a_pic_rows(40)
    write_parquet(tmp_path / "clean.parquet", [row for index, row in enumerate(rows) if index not in BAD])
    for damage, (index, column) in zip(DAMAGE, BAD.items(), strict=True):
        rows[index][column] = damage(rows[index][column])
    return write_parquet(tmp_path / "damaged.parquet", rows), tmp_path / "clean.parquet"


def test_they_are_all_counted_and_the_first_is_named(sources):
    damaged, _ = sources
    with pytest.raises(DiffpoError) as error:
        load(damaged)
    message = str(error.value)
    assert "4 of 40 rows cannot be used (3 x unreadable image, 1 x missing image)" in message
    assert "the first is row 3: unreadable image" in message and "data.bad_rows=skip" in message


def test_without_them_the_data_are_those_of_the_other_rows_alone(sources):
    damaged, clean = (load(source, bad_rows="skip") for source in sources)
    assert len(damaged) == len(clean) == 36 and [row for row, _ in damaged.bad] == list(BAD)
    assert damaged.data_hash == clean.data_hash
    assert [group.hashes for group in damaged.groups] == [group.hashes for group in clean.groups]
    assert list(damaged.places((16, 16))) == list(clean.places((16, 16))), "the caches have one name"
    # a limit counts rows as they are in the source, damaged ones too
    damaged, clean = (load(source, bad_rows="skip", limit=10) for source in sources)
    assert (len(damaged), len(clean)) == (8, 10)


def test_a_run_that_skips_them_trains_the_same_lora(sources, tiny_sd, make_config, tmp_path):
    files = []
    for number, source in enumerate(sources):
        config = make_config(
            tiny_sd, "data.bad_rows=skip", "train.steps=2", f"output={tmp_path / f'run{number}'}", data=source
        )
        files.append(train(config).read_bytes())
        metrics = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
        assert len(metrics) == 2 and None not in [each["loss"] for each in metrics]
    assert files[0] == files[1]
