"""Faulty data sources: they are read, or refused with a message that names them."""

import io
import json
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st
from junk import damaged, lines, mutated, values
from tiny import picture, png

from diffpo.commands import check
from diffpo.common.errors import DiffpoError
from diffpo.config import Columns, Data
from diffpo.data.groups import load_groups

PNG = [png(picture(seed, (8, 8))) for seed in range(4)]

options = st.fixed_dictionaries(
    {
        "bad_rows": st.sampled_from(["skip", "skip", "error"]),
        "ties": st.sampled_from(["drop", "soft"]),
        "buckets": st.booleans(),
        "list_size": st.sampled_from([2, 3]),
    }
)
kinds = st.sampled_from(["pair", "pair", "single", "list"])


def try_source(source, want, given, columns=Columns()):  # noqa: B008
    """Data that are read can be shown and trained on; other data give a message that names them."""
    data = Data(resolution=8, columns=columns, **given)
    try:
        groups = load_groups(data, str(source), "train", want)
    except DiffpoError as error:
        assert str(source) in str(error) or "data.columns." in str(error), error
        assert len(str(error)) < 5000, error
        return
    assert len(groups) and groups.data_hash and all(groups.captions)
    for index in range(len(groups)):
        assert {image.mode for image in groups.images(index)} == {"RGB"}
    check.describe(groups, data, lambda text: None, [])


ROWS = {
    "pair": [
        {"prompt": "a", "chosen": "0.png", "rejected": "1.png", "score_0": 2.5, "score_1": 1},
        {"prompt": "b", "chosen_file_name": "2.png", "rejected_file_name": "3.png"},
    ],
    "labels": [
        {"caption": "a", "jpg_0": "0.png", "jpg_1": "1.png", "label_0": 1.0, "label_1": 0.0, "has_label": True},
        {"caption": "b", "jpg_0": "2.png", "jpg_1": "3.png", "label_0": 0.5, "label_1": 0.5, "has_label": False},
    ],
    "list": [
        {"prompt": "a", "images": ["0.png", "1.png", "2.png"], "scores": [1, 2.5, 2]},
        {"prompt": "b", "images": ["0.png", "3.png"], "scores": [1, 2]},
    ],
    "ranked": [
        {"prompt_id": "x", "prompt": "a", "image_path": "0.png", "rank": 1},
        {"prompt_id": "x", "prompt": "a", "image_path": "1.png", "rank": 2},
    ],
    "single": [{"prompt": "a", "image": "0.png", "liked": 1}, {"prompt": "b", "image": "1.png", "liked": 0}],
}
PLACES = [
    *({"path": "0.png", "offset": 0, "size": 9}, {"path": 0, "offset": 0, "size": 9}, {"path": None, "size": 1}),
    *({"path": "0.png", "offset": -1, "size": "x"}, {"size": 1}, {"bytes": "x"}, {"bytes": [1], "path": None}),
]
tables = st.sampled_from(sorted(ROWS))


@settings(max_examples=80)
@given(table=tables, want=kinds, given=options, data=st.data())
def test_metadata_with_odd_cells(fresh, table, want, given, data):
    folder, rows = fresh(), data.draw(mutated(ROWS[table]))
    if data.draw(st.integers(0, 4)) == 0:  # the forms of an image from shards and from `datasets`
        name, place = (
            data.draw(st.sampled_from(["chosen", "jpg_0", "image", "prompt"])),
            data.draw(st.sampled_from(PLACES)),
        )
        rows = [row | {name: place} if isinstance(row, dict) else row for row in rows]
    (folder / "metadata.jsonl").write_bytes(lines(rows))
    try_source(folder, want, given)


@settings(max_examples=60)
@given(table=tables, want=kinds, given=options, data=st.data())
def test_metadata_with_changed_bytes(fresh, table, want, given, data):
    folder, form = fresh(), data.draw(st.sampled_from(["jsonl", "json", "csv"]))
    (folder / f"metadata.{form}").write_bytes(data.draw(damaged(text(ROWS[table], form))))
    try_source(folder, want, given)


def text(rows, form) -> bytes:
    if form == "jsonl":
        return lines(rows)
    if form == "json":
        return json.dumps(rows).encode()
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    return "\n".join(",".join(f'"{cell}"' for cell in line) for line in cells).encode("utf-16")


@settings(max_examples=40)
@given(want=kinds, given=options, data=st.data())
def test_saved_datasets_with_changed_bytes(fresh, want, given, data):
    folder = fresh() / "saved"
    datasets.Dataset.from_list([{"prompt": "a", "chosen": PNG[0], "rejected": PNG[1]}] * 3).save_to_disk(folder)
    path = next(folder.glob("*.arrow")) if data.draw(st.booleans()) else folder / "state.json"
    content = data.draw(damaged(path.read_bytes()))
    path.unlink()
    path.write_bytes(content)
    try_source(folder, want, given)


@settings(max_examples=60)
@given(table=tables, given=options, data=st.data())
def test_columns_that_the_config_names(fresh, table, given, data):
    folder = fresh()
    (folder / "metadata.jsonl").write_bytes(lines(ROWS[table]))
    roles = st.sampled_from(sorted(Columns.model_fields))
    names = st.sampled_from(sorted({name for row in ROWS[table] for name in row})) | st.sampled_from(["", "x", "é"])
    named = data.draw(st.dictionaries(roles, names, min_size=1, max_size=3))
    columns = Columns(**{role: [name] if role == "rewards" else name for role, name in named.items()})
    try_source(folder, data.draw(kinds), given, columns)


def parquet(rows) -> bytes:
    rows = [{name: load(value) for name, value in row.items()} for row in rows]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def load(value):
    """``value`` with the bytes of images in place of their names."""
    if isinstance(value, list):
        return [load(each) for each in value]
    return PNG[int(value[0])] if isinstance(value, str) and value.endswith(".png") else value


WHOLE = {table: parquet(rows) for table, rows in ROWS.items()}


@settings(max_examples=80)
@given(table=tables, want=kinds, given=options, data=st.data())
def test_parquet_with_changed_bytes(fresh, table, want, given, data):
    path = fresh() / "train.parquet"
    path.write_bytes(data.draw(damaged(WHOLE[table])))
    try_source(path, want, given)


@settings(max_examples=50)
@given(table=tables, want=kinds, given=options, data=st.data())
def test_parquet_with_odd_columns(fresh, table, want, given, data):
    path = fresh() / "train.parquet"
    try:
        path.write_bytes(parquet(data.draw(mutated(ROWS[table]))))
    except (pa.ArrowException, OverflowError, AttributeError, UnicodeEncodeError):  # not a table
        return
    try_source(path, want, given)


def tar(members) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


MEMBERS = [
    *[("0.jpg_0.png", PNG[0]), ("0.jpg_1.png", PNG[1]), ("0.caption.txt", b"a"), ("0.label_0.txt", b"1")],
    *[("1.jpg_0.png", PNG[2]), ("1.jpg_1.png", PNG[3]), ("1.json", b'{"caption": "b", "label_0": 0.5}')],
]
SHARD = tar(MEMBERS)


@settings(max_examples=100)
@given(want=kinds, given=options, content=damaged(SHARD))
def test_shards_with_changed_bytes(fresh, want, given, content):
    path = fresh() / "0.tar"
    path.write_bytes(content)
    try_source(path, want, given)


member_names = st.sampled_from([name for name, _ in MEMBERS]) | st.sampled_from(
    [
        "0.png",
        "0.cls",
        "0.json.png",
        "../0.txt",
        "/x.png",
        ".png",
        "0.",
        "0.a.json",
        "0.jpg_0.PNG",
        "\udcff.txt",
        "é.json",
    ]
)
member_contents = (
    st.sampled_from(PNG) | st.binary(max_size=6) | values.map(lambda value: json.dumps(value).encode())
    | st.sampled_from([b"[" * 9000, b"9" * 5000, b"{}", b'{"a": 1, "a": 2}', b"\xff\xfe"])
)  # fmt: skip


@settings(max_examples=60)
@given(
    given=options,
    want=kinds,
    change=st.lists(st.tuples(st.integers(0, 7), member_names, member_contents), min_size=1, max_size=4),
)
def test_shards_with_odd_members(fresh, given, want, change):
    members = list(MEMBERS)
    for place, name, content in change:
        members.insert(place, (name, content))
    path = fresh() / "0.tar"
    path.write_bytes(tar(members))
    try_source(path, want, given)


file_names = st.sampled_from(["a.png", "b.png", "a.jpg", "a.txt", "b.txt", "c/a.png", ".a.png", "é.webp", "a.csv"])


@settings(max_examples=40)
@given(
    given=options,
    sides=st.tuples(
        *[st.dictionaries(file_names, st.sampled_from([*PNG, b"", b"a", b"\xff", PNG[0][:40]]), max_size=4)] * 2
    ),
)
def test_sibling_folders(fresh, given, sides):
    folder = fresh() / "pairs"
    for name, files in zip(("chosen", "rejected"), sides, strict=True):
        for file, content in files.items():
            (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / file).write_bytes(content)
    try_source(folder, "pair", given)
