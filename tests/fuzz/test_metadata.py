"""Data sources, prompts, labels and manifests that went wrong: read, or refused in one message that names them."""

import io
import json
import shutil
import tarfile
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from junk import AWKWARD, damaged, mutated, values
from PIL import Image
from tiny import picture, png

from diffpo import check
from diffpo.config import Columns, Data
from diffpo.data.groups import load_groups
from diffpo.data.source import BadRow, decode
from diffpo.errors import DiffpoError
from diffpo.manifest import read_manifest
from diffpo.prompts import load_prompts
from diffpo.rollout.judge import Label, read_labels
from diffpo.scorers.steps import read_about

PNG = [png(picture(seed, (8, 8))) for seed in range(4)]
numbers = count()

options = st.fixed_dictionaries(
    {
        "bad_rows": st.sampled_from(["skip", "skip", "error"]),
        "ties": st.sampled_from(["drop", "soft"]),
        "buckets": st.booleans(),
        "list_size": st.sampled_from([2, 3]),
    }
)
kinds = st.sampled_from(["pair", "pair", "single", "list"])


@pytest.fixture
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("source")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A new folder for each case, with four pictures; the one before is removed."""
    root = tmp_path_factory.mktemp("sources")

    def make():
        for old in root.iterdir():
            shutil.rmtree(old)
        folder = root / str(next(numbers))
        folder.mkdir()
        for i, content in enumerate(PNG):
            (folder / f"{i}.png").write_bytes(content)
        return folder

    return make


def try_source(source, want, given, columns=Columns()):  # noqa: B008
    """Whatever is read can be shown and trained on; whatever is not is one message."""
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


def lines(rows):
    return "\n".join(json.dumps(row) for row in rows).encode()


@settings(max_examples=80)
@given(table=tables, want=kinds, given=options, data=st.data())
def test_metadata_with_odd_cells(fresh, table, want, given, data):
    folder, rows = fresh(), data.draw(mutated(ROWS[table]))
    if data.draw(st.integers(0, 4)) == 0:  # what the readers of shards and of `datasets` make of a picture
        name, place = (
            data.draw(st.sampled_from(["chosen", "jpg_0", "image", "prompt"])),
            data.draw(st.sampled_from(PLACES)),
        )
        rows = [row | {name: place} if isinstance(row, dict) else row for row in rows]
    (folder / "metadata.jsonl").write_bytes(lines(rows))
    try_source(folder, want, given)


@settings(max_examples=60)
@given(table=tables, want=kinds, given=options, data=st.data())
def test_metadata_of_which_bytes_were_changed(fresh, table, want, given, data):
    folder = fresh()
    (folder / "metadata.jsonl").write_bytes(data.draw(damaged(lines(ROWS[table]))))
    try_source(folder, want, given)


@settings(max_examples=60)
@given(table=tables, given=options, data=st.data())
def test_columns_that_the_config_names(fresh, table, given, data):
    folder = fresh()
    (folder / "metadata.jsonl").write_bytes(lines(ROWS[table]))
    roles = st.sampled_from(sorted(Columns.model_fields))
    names = st.sampled_from(sorted({name for row in ROWS[table] for name in row})) | st.sampled_from(["", "x", "é"])
    columns = Columns(**data.draw(st.dictionaries(roles, names, min_size=1, max_size=3)))
    try_source(folder, data.draw(kinds), given, columns)


def parquet(rows) -> bytes:
    rows = [{name: load(value) for name, value in row.items()} for row in rows]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def load(value):
    """The picture's bytes instead of its name."""
    if isinstance(value, list):
        return [load(each) for each in value]
    return PNG[int(value[0])] if isinstance(value, str) and value.endswith(".png") else value


WHOLE = {table: parquet(rows) for table, rows in ROWS.items()}


@settings(max_examples=80)
@given(table=tables, want=kinds, given=options, data=st.data())
def test_parquet_of_which_bytes_were_changed(fresh, table, want, given, data):
    path = fresh() / "train.parquet"
    path.write_bytes(data.draw(damaged(WHOLE[table])))
    try_source(path, want, given)


@settings(max_examples=50)
@given(table=tables, want=kinds, given=options, data=st.data())
def test_parquet_with_odd_columns(fresh, table, want, given, data):
    path = fresh() / "train.parquet"
    try:
        path.write_bytes(parquet(data.draw(mutated(ROWS[table]))))
    except (pa.ArrowException, OverflowError, AttributeError, UnicodeEncodeError):  # no table of rows at all
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
def test_shards_of_which_bytes_were_changed(fresh, want, given, content):
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


PICTURES = [
    picture(0, (8, 8)),
    picture(1, (8, 8)).convert("P"),
    picture(2, (8, 8)).convert("L"),
    picture(3).convert("RGBA"),
]


def encoded():
    for image in PICTURES:
        for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "ICO", "TGA", "PPM"):
            buffer = io.BytesIO()
            try:
                exif = Image.Exif()
                exif[0x0112] = 6
                image.save(buffer, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}))
            except OSError:  # a mode that the format does not know
                continue
            yield buffer.getvalue()


@pytest.mark.filterwarnings("ignore")  # Pillow's
@settings(max_examples=250)
@given(content=st.sampled_from(list(encoded())).flatmap(damaged))
def test_pictures_of_which_bytes_were_changed(content):
    try:
        image = decode(content)
    except BadRow as problem:
        assert problem.reason == "unreadable image"
    else:
        assert image.mode == "RGB" and image.tobytes()


# ---- prompts, labels, manifests


@settings(max_examples=80)
@given(
    suffix=st.sampled_from(["txt", "jsonl"]),
    content=damaged(b'{"prompt": "a cat"}\n{"prompt": "\xc3\xa9"}\n')
    | st.lists(st.fixed_dictionaries({"prompt": values}) | values, max_size=3).map(lines)
    | st.sampled_from([b"[" * 9000, b"9" * 5000]),
    n=st.sampled_from([None, None, 1, 2, 0, -1]),
)
def test_prompt_files(fresh, suffix, content, n):
    path = fresh() / f"prompts.{suffix}"
    path.write_bytes(content)
    try:
        found = load_prompts(path, n)
    except DiffpoError as error:
        assert str(path) in str(error)
    else:
        assert found and all(isinstance(each, str) and each.strip() for each in found)


@settings(max_examples=40)
@given(
    source=st.builds(
        "{}{}".format,
        st.sampled_from(["shapes:", "shapes:heldout:", "shapes:train:", ""]),
        st.sampled_from(AWKWARD).map(str),
    )
)
def test_prompts_by_name(source):
    try:
        assert load_prompts(source)
    except DiffpoError as error:
        assert repr(source) in str(error) or str(Path(source)) in str(error)


LABELS = [
    {"prompt": "a", "image_0": "images/00000-0.png", "image_1": "images/00000-1.png", "label_0": 1},
    {"prompt": "b", "image_0": "images/00001-0.png", "image_1": "images/00001-1.png", "label_0": 0.2},
]
ABOUT = [{"kind": "latent", "time_aware": True, "width": 8}]
IMAGES = [
    {"arm": "base", "index": 0, "seed": 0, "prompt": "a", "file": "images/base/00000_0.png", "sha256": "0", "steps": 4}
]


def changed(rows):
    return damaged(lines(rows)) | mutated(rows).map(lines) | st.sampled_from([b"[" * 9000, b"9" * 5000])


@settings(max_examples=80)
@given(content=changed(LABELS))
def test_label_files(fresh, content):
    path = fresh() / "labels.jsonl"
    path.write_bytes(content)
    try:
        found = read_labels(path)
    except DiffpoError as error:
        assert str(path) in str(error)
    else:
        assert found and all(isinstance(each, Label) and isinstance(each.prompt, str) for each in found)


@settings(max_examples=60)
@given(content=changed(IMAGES))
def test_manifests_of_images(fresh, content):
    folder = fresh()
    (folder / "manifest.jsonl").write_bytes(content)
    try:
        for row in read_manifest(folder):
            assert row["arm"] in ("base", "tuned") and f"{row['index']:05d}_{row['seed']}"
    except DiffpoError as error:
        assert str(folder) in str(error)


@settings(max_examples=40)
@given(content=changed(ABOUT))
def test_descriptions_of_scorers(fresh, content):
    folder = fresh()
    (folder / "scorer.json").write_bytes(content)
    try:
        assert read_about(folder)["kind"] in ("pixel", "latent")
    except DiffpoError as error:
        assert str(folder) in str(error)
