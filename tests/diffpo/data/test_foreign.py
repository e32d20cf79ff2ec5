"""Data from others: rows open no files outside their folders, any file name works, and text may have any encoding."""

import codecs
import io
import json
import os
import tarfile

import numpy as np
import pytest
from test_formats import load, save, seen
from test_shards import orpo_members, write_tar
from tiny import metrics_of, pick_a_pic_rows, picture, png, write_folder, write_parquet

from diffpo.commands.picture import draw
from diffpo.common import images
from diffpo.common.errors import DiffpoError
from diffpo.config import Data
from diffpo.data.groups import scan

OUTSIDE = "outside the data's folder"


@pytest.fixture
def private(tmp_path):
    """An image outside the data's folder."""
    return save(tmp_path / "private" / "mine.png", 9)


@pytest.fixture
def folder(tmp_path):
    """A folder of images 0 to 3."""
    for seed in range(4):
        save(tmp_path / "ds" / f"{seed}.png", seed)
    return tmp_path / "ds"


def write_rows(folder, *rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def row(chosen, rejected="1.png", prompt="x"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def fault(source, **options):
    """The message of the only bad row."""
    groups = scan(Data(resolution=16, **options), str(source), "train")
    ((_, problem),) = groups.bad
    return str(problem)


# ---- which files are opened


def test_names_outside_the_folder_are_bad_rows_unless_data_roots_allows_them(folder, private):
    (folder / "link.png").symlink_to(private)
    (folder / "up").symlink_to(private.parent)
    for name in (str(private), "../private/mine.png", "link.png", "up/mine.png", "..\\private\\mine.png"):
        write_rows(folder, row(name))
        assert fault(folder).startswith(OUTSIDE) and "data.roots=[FOLDER]" in fault(folder)
        assert seen(load(folder, roots=[str(private.parent)])) == [("x", 1, (9, 1))]
    write_rows(folder, row("mine.png"))
    assert seen(load(folder, roots=[str(private.parent)])) == [("x", 1, (9, 1))]
    with pytest.raises(DiffpoError, match=r"data\.roots: nowhere"):
        load(folder, roots=["nowhere"])


def test_absolute_names_and_links_within_the_folder_are_read(folder):
    (folder / "link.png").symlink_to("2.png")
    write_rows(folder, row(str(folder / "0.png"), "link.png"))
    assert seen(load(folder)) == [("x", 1, (0, 2))]


def test_devices_pipes_and_folders_are_not_read(folder, tmp_path):
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    for name in ("pipe.png", "folder.png"):
        write_rows(folder, row(name))
        assert fault(folder).startswith(f"unreadable image: {name}: ")
    (folder / "zero.png").symlink_to("/dev/zero")
    for name in ("/dev/zero", "zero.png", "/proc/self/environ"):
        write_rows(folder, row(name))
        assert fault(folder).startswith(OUTSIDE)
    write_rows(folder, row("/dev/zero"))
    assert fault(folder, roots=["/dev"]).startswith("unreadable image: /dev/zero: ")
    with pytest.raises(DiffpoError, match="/dev/zero"):
        load("/dev/zero")


@pytest.mark.parametrize("name", ["http://x.org/a.png", "HTTPS://x/a", "s3://b/a.png", "data:image/png;base64,AAAA"])
def test_urls_are_refused(folder, name):
    assert fault(write_rows(folder, row(name))).startswith(f"a URL, not a file: {name}")
    with pytest.raises(DiffpoError, match=r"https://example\.org/pairs\.parquet"):
        load("https://example.org/pairs.parquet")


def test_backslashes_separate_folders(folder):
    save(folder / "chosen" / "b.png", 0)
    assert seen(load(write_rows(folder, row("chosen\\b.png", ".\\1.png")))) == [("x", 1, (0, 1))]


PLACES = [
    lambda path: {"path": path, "offset": 0, "size": 2**40},
    lambda path: {"path": path, "offset": 0, "size": os.path.getsize(path)},
    lambda path: {"bytes": None, "path": path},
    lambda path: {"bytes": b"", "path": path},
]


@pytest.mark.parametrize("place", PLACES)
def test_a_parquet_file_cannot_name_a_file_outside(tmp_path, private, place):
    (tmp_path / "ds").mkdir()
    rows = [{"prompt": "x", "chosen": place(str(private)), "rejected": place(str(private))}]
    assert fault(write_parquet(tmp_path / "ds" / "a.parquet", rows)).startswith(OUTSIDE)


def test_a_position_in_a_json_file_of_a_shard_is_only_a_value(tmp_path, private):
    size = private.stat().st_size
    about = {
        "prompt": "x",
        "chosen": {"path": str(private), "offset": 0, "size": size},
        "rejected": "../private/mine.png",
    }
    (tmp_path / "ds").mkdir()
    source = write_tar(tmp_path / "ds" / "a.tar", [("1.json", json.dumps(about).encode())])
    assert fault(source).startswith(OUTSIDE)
    own = json.dumps([{}, {"chosen": [0, 0, size, "x"]}]).encode()  # the form of the index of shards
    source = write_tar(tmp_path / "ds" / "b.tar", [("1.chosen.json", own), ("1.rejected.json", own), ("1.txt", b"x")])
    assert fault(source) == "missing image: chosen"


def test_rows_of_the_hub_cannot_name_files_in_the_working_directory(folder, monkeypatch):
    import datasets

    monkeypatch.chdir(folder)
    found = datasets.Dataset.from_list([row("0.png")])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: found)
    assert fault("someone/pairs") == "unreadable image: 0.png: No such file or directory"
    assert seen(load("someone/pairs", roots=[str(folder)])) == [("x", 1, (0, 1))]


def test_the_hubs_own_links_are_followed(tmp_path):
    repository = tmp_path / "datasets--someone--pairs"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "0a1b" / "data").mkdir(parents=True)
    write_parquet(repository / "blobs" / "77", pick_a_pic_rows(2))
    link = repository / "snapshots" / "0a1b" / "data" / "train-00000-of-00001.parquet"
    link.symlink_to("../../../blobs/77")
    assert len(load(repository / "snapshots" / "0a1b")) == 2
    link.unlink()
    write_parquet(tmp_path / "elsewhere.parquet", pick_a_pic_rows(2))
    link.symlink_to(tmp_path / "elsewhere.parquet")
    with pytest.raises(DiffpoError, match=r"train-00000-of-00001\.parquet .*data\.roots"):
        load(repository / "snapshots" / "0a1b")


def siblings(folder, captions=("cat 0", "cat 1")):
    for number, caption in enumerate(captions):
        save(folder / "chosen" / f"{number}.png", 2 * number)
        save(folder / "rejected" / f"{number}.png", 2 * number + 1)
        (folder / "chosen" / f"{number}.txt").write_text(caption)
    return folder


def test_links_and_pipes_between_siblings(tmp_path, private):
    folder = siblings(tmp_path / "ds")
    (folder / "chosen" / "0.png").unlink()
    (folder / "chosen" / "0.png").symlink_to(private)
    assert fault(folder).startswith(f"{OUTSIDE}: chosen/0.png")
    (folder / "chosen" / "0.png").unlink()
    save(folder / "chosen" / "0.png", 0)
    for make in (lambda path: path.symlink_to("/dev/zero"), os.mkfifo):
        (folder / "chosen" / "0.txt").unlink()
        make(folder / "chosen" / "0.txt")
        assert "chosen/0.txt" in fault(folder)
    os.rename(folder / "rejected", tmp_path / "rejected")
    (folder / "rejected").symlink_to(tmp_path / "rejected")
    with pytest.raises(DiffpoError, match=r": rejected .*data\.roots"):
        load(folder)
    (folder / "metadata.jsonl").symlink_to(private)
    with pytest.raises(DiffpoError, match=r"metadata\.jsonl .*data\.roots"):
        load(folder)


def test_other_files_beside_the_pairs_are_counted_and_named(tmp_path):
    folder = siblings(tmp_path / "ds")
    (folder / "chosen" / "notes.md").write_text("x")
    (folder / "chosen" / "9.txt").write_text("a caption without a picture")
    (folder / "rejected" / "0.txt").write_text("cat 0")
    (folder / "rejected" / "more").symlink_to(tmp_path)
    (folder / "rejected" / ".hidden.png").write_bytes(b"x")
    groups = load(folder)
    (remark,) = groups.remarks()
    assert len(groups) == 2 and "5 files: chosen/notes.md, chosen/9.txt, rejected/.hidden.png and 2 more" in remark


def test_images_of_every_suffix_are_pairs(tmp_path):
    folder = siblings(tmp_path / "ds", ["a", "b", "c", "d"])
    for number, suffix in enumerate(("jfif", "TIF", "JPE", "heic")):
        image = (folder / "rejected" / f"{number}.png").rename(folder / "rejected" / f"{number}.{suffix}")
        if suffix != "heic":
            picture(2 * number + 1).save(image, {"TIF": "TIFF"}.get(suffix, "JPEG"))
    (folder / "rejected" / "3.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    groups = load(folder, bad_rows="skip")
    assert groups.captions == ["a", "b", "c"] and [row for row, _ in groups.bad] == [3]
    if "HEIF" not in images.formats():
        assert all(each in groups.describe_bad() for each in ("rejected/3.heic", "pip install pillow-heif"))


# ---- file names


@pytest.mark.parametrize(
    "name", ["data[1]", "a*b", "what?", "it's", 'q"q', "a b", "ünï cødé", "{x}", "a::b", "n" * 250]
)
def test_any_file_name_works(tmp_path, name):
    expected = load(write_parquet(tmp_path / "plain.parquet", pick_a_pic_rows(3))).data_hash
    folder = tmp_path / name
    folder.mkdir()
    write_parquet(folder / "v[2].parquet", pick_a_pic_rows(3))
    assert load(folder).data_hash == load(folder / "v[2].parquet").data_hash == expected
    (folder / "v[2].parquet").unlink()
    for seed in range(4):
        save(folder / f"{name[:240]}{seed}.png", seed)
    write_rows(folder, row(f"{name[:240]}0.png", f"{name[:240]}1.png"))
    assert seen(load(folder)) == [("x", 1, (0, 1))]
    streamed = load(
        write_parquet(tmp_path / f"{name[:240]}.parquet", pick_a_pic_rows(3)), cache=str(folder), streaming=True
    )
    assert streamed.data_hash == expected


def test_names_that_are_not_text_are_shown_safely(tmp_path):
    folder = siblings(tmp_path / "ds")
    (folder / "chosen" / os.fsdecode(b"\xff\x1b[31m.md")).write_text("x")
    (remark,) = load(folder).remarks()
    assert remark.endswith("1 file: chosen/[31m.md")


# ---- changed content


def test_rows_of_the_same_size_and_time_are_read_again(folder):
    path = write_rows(folder, row("0.png"), row("2.png", "3.png")) / "metadata.jsonl"
    before = path.stat()
    assert seen(load(folder)) == [("x", 1, (0, 1)), ("x", 1, (2, 3))]
    write_rows(folder, row("2.png"), row("0.png", "3.png"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert seen(load(folder)) == [("x", 1, (2, 1)), ("x", 1, (0, 3))]


def test_a_run_goes_on_with_data_that_were_moved_and_not_with_others(tiny_sd, make_config, tmp_path):
    from diffpo.train.loop import train

    write_folder(tmp_path / "here", 3)
    options = ("train.steps=2", f"data.validation={tmp_path / 'here'}")
    train(make_config(tiny_sd, *options, data=tmp_path / "here"))
    there = (tmp_path / "here").rename(tmp_path / "there")
    options = ("train.steps=3", f"data.validation={there}")
    train(make_config(tiny_sd, *options, data=there))
    assert [each["step"] for each in metrics_of(tmp_path / "run")] == [1, 2, 3]
    save(there / "images" / "1-chosen.png", 30)
    with pytest.raises(DiffpoError, match=r"data\.train.*output=FOLDER"):
        train(make_config(tiny_sd, "train.steps=4", data=there))


# ---- encodings of text


def saved_as(text, how):
    if how == "crlf":
        return text.replace("\n", "\r\n").encode()
    return codecs.BOM_UTF16_BE + text.encode("utf-16-be") if how == "utf-16-be" else text.encode(how)


HOW = ["utf-8-sig", "utf-16", "utf-16-be", "crlf"]
METADATA = {
    "metadata.jsonl": "".join(
        json.dumps(row("0.png", "1.png", each), ensure_ascii=False) + "\n" for each in ("é", "b")
    ),
    "metadata.json": json.dumps([row("0.png", "1.png", each) for each in ("é", "b")], indent=1),
    "metadata.csv": "prompt,chosen,rejected\né,0.png,1.png\nb,0.png,1.png\n",
    "metadata.tsv": "prompt\tchosen\trejected\né\t0.png\t1.png\nb\t0.png\t1.png\n",
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", METADATA)
def test_metadata_in_every_encoding(folder, name, how):
    (folder / name).write_bytes(saved_as(METADATA[name], how))
    for source in (folder, folder / name):
        assert seen(load(source)) == [("é", 1, (0, 1)), ("b", 1, (0, 1))]


@pytest.mark.parametrize("how", HOW)
def test_captions_and_texts_of_shards_in_every_encoding(tmp_path, how):
    folder = siblings(tmp_path / "ds")
    (folder / "chosen" / "0.txt").write_bytes(saved_as("café\n", how))
    assert load(folder).captions == ["café", "cat 1"]
    about = saved_as(json.dumps({"label_0": 0, "caption": "café"}), how)
    pair = orpo_members(0, 1)[:2]
    assert seen(load(write_tar(tmp_path / "a.tar", [*pair, ("0000.json", about)]))) == [("café", 1, (1, 0))]
    texts = [("0000.caption.txt", saved_as("café\n", how)), ("0000.label_0.txt", saved_as("0\n", how))]
    assert seen(load(write_tar(tmp_path / "b.tar", [*pair, *texts]))) == [("café", 1, (1, 0))]


def test_a_caption_of_another_encoding_is_a_bad_row(tmp_path):
    folder = siblings(tmp_path / "ds")
    for content in ("caf\xe9".encode("latin-1"), "a cat".encode("utf-16-le"), b"\xff\xfea"):
        (folder / "chosen" / "0.txt").write_bytes(content)
        assert "chosen/0.txt" in fault(folder)


def test_json_of_other_shapes(folder):
    rows = [row("0.png"), row("2.png", "3.png")]
    expected = [("x", 1, (0, 1)), ("x", 1, (2, 3))]
    for text in (
        "\n".join(map(json.dumps, rows)),  # JSON lines in a .json file
        json.dumps({name: [each[name] for each in rows] for name in rows[0]}),  # columns
    ):
        (folder / "train.json").write_text(text)
        assert seen(load(folder / "train.json")) == expected
    for text, words in {
        "[1, 2]": r"train\.json, item 1: ",
        '"x"': r"train\.json: .*'x'",
        "[": r"train\.json.* line 1 column 2",
        "[" * 9000: r"train\.json",
    }.items():
        (folder / "train.json").write_text(text)
        with pytest.raises(DiffpoError, match=f"{folder}.*{words}"):
            load(folder / "train.json")


# ---- truth values


TRUE = [True, 1, 1.0, "true", "True", " TRUE\n", "yes", "1", "1.0", "y", "on"]
FALSE = [False, 0, 0.0, "false", "False", "no", "0", "0.0", "off", None, "", "null", "NaN"]
NEITHER = ["maybe", 2, 0.5, -1, [True], "01", "tru"]


def labelled(value, form, folder):
    """A row whose has_label is ``value``, after one that is labelled."""
    rows = pick_a_pic_rows(2)
    for number, each in enumerate(rows):
        for name in ("jpg_0", "jpg_1"):
            (folder / f"{number}-{name}.png").write_bytes(each[name])
    if form == "tar":
        members = []
        for number, has_label in enumerate(("true", value)):
            text = b"" if has_label is None else str(has_label).encode()
            members += [*orpo_members(number, 1), (f"{number:04d}.has_label.txt", text)]
        return write_tar(folder / "a.tar", members)
    if form == "parquet":
        values = [None if value is None else type(value)(1), value]
        values = ["true", value] if isinstance(value, str) else values
        return write_parquet(
            folder / "a.parquet", [each | {"has_label": v} for each, v in zip(rows, values, strict=True)]
        )
    names = ["caption", "jpg_0", "jpg_1", "label_0", "has_label"]
    cells = [[f"cat {n}", f"{n}-jpg_0.png", f"{n}-jpg_1.png", 1.0, v] for n, v in enumerate((True, value))]
    if form == "csv":
        lines = [",".join('"' + ("" if cell is None else str(cell)) + '"' for cell in line) for line in [names, *cells]]
        (folder / "a.csv").write_text("\n".join(lines))
        return folder / "a.csv"
    (folder / "a.jsonl").write_text("\n".join(json.dumps(dict(zip(names, line, strict=True))) for line in cells))
    return folder / "a.jsonl"


@pytest.mark.parametrize("form", ["jsonl", "csv", "tar", "parquet"])
def test_has_label_in_every_spelling(tmp_path, form):
    for number, value in enumerate([*TRUE, *FALSE, *NEITHER]):
        if form == "parquet" and (isinstance(value, list) or value is None):
            continue
        (tmp_path / str(number)).mkdir()
        groups = scan(Data(resolution=16), str(labelled(value, form, tmp_path / str(number))), "train")
        outcome = (len(groups), groups.unlabelled, [problem.reason for _, problem in groups.bad])
        expected = (2, 0, []) if value in TRUE else (1, 1, []) if value in FALSE else (1, 0, ["not a truth value"])
        assert outcome == expected, value


def test_likes_in_every_spelling(folder):
    def one(value):
        (folder / "metadata.jsonl").write_text(json.dumps({"prompt": "x", "image": "0.png", "liked": value}))
        groups = scan(Data(resolution=16, ties="soft"), str(folder), "train", "single")
        return groups.groups[0].preference if groups.groups else str(groups.bad[0][1])

    assert [one(value) for value in TRUE] == [1] * len(TRUE)
    nothing = [value for value in FALSE if value in (None, "", "null", "NaN")]
    assert [one(value) for value in FALSE if value not in nothing] == [0] * (len(FALSE) - len(nothing))
    assert one("0.25") == 0.25 and one(0.5) == 0.5
    for value in (*nothing, "maybe", [1]):
        assert one(value).startswith("no like")
    assert one(2).endswith(": 2 (0.png)")


# ---- shards


def members_of(path, *members):
    """A tar of (TarInfo, content), headers as they are given."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content) if content is not None else None)
    path.write_bytes(buffer.getvalue())
    return path


def info(name, size=0, kind=tarfile.REGTYPE, **more):
    made = tarfile.TarInfo(name)
    made.size, made.type = size, kind
    for key, value in more.items():
        setattr(made, key, value)
    return made


def whole(i=0):
    return [(info(name, len(value)), value) for name, value in orpo_members(i, 1)]


def test_members_of_every_kind(tmp_path):
    kinds = {
        tarfile.SYMTYPE: "a",
        tarfile.LNKTYPE: "b",
        tarfile.CHRTYPE: "c",
        tarfile.BLKTYPE: "d",
        tarfile.FIFOTYPE: "e",
    }
    odd = [(info(f"0001.{name}.png", kind=kind, linkname="/etc/passwd"), None) for kind, name in kinds.items()]
    named = [("../../0002.jpg_0.png", b"x"), ("/0003.jpg_0.png", b"x"), ("0004.pickle", b"x"), ("README", b"x")]
    more = [(info(name, len(content)), content) for name, content in named]
    path = members_of(tmp_path / "a.tar", *whole(), *odd, (info("d", kind=tarfile.DIRTYPE), None), *more)
    groups = load(path, bad_rows="skip")
    assert seen(groups) == [("cat 0", 1, (0, 1))] and len(groups.bad) == 2
    (remark,) = groups.remarks()
    assert remark.endswith("7 files: 0001.a.png, 0001.b.png, 0001.c.png and 4 more")


def test_members_that_claim_to_be_larger_than_the_file(tmp_path):
    for size in (2**33, 2**62):
        content = members_of(tmp_path / "a.tar", *whole()).read_bytes().rstrip(b"\0")
        content += bytes(-len(content) % 512)
        head = info("0001.jpg_0.png", size).tobuf(tarfile.GNU_FORMAT)
        (tmp_path / "a.tar").write_bytes(content + head + bytes(2048))
        with pytest.raises(DiffpoError, match=r"a\.tar"):
            load(tmp_path / "a.tar")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
@pytest.mark.parametrize("size", [2**33, -512])
def test_headers_of_gigabytes_or_of_negative_size(tmp_path, kind, size):
    head = bytearray(info("x", 0, kind).tobuf(tarfile.GNU_FORMAT))
    head[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    head[148:156] = b"%06o\0 " % (sum(head[:148]) + 256 + sum(head[156:]))
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(head)
        file.truncate(2**34)  # sparse, so the gigabytes could be read
    with pytest.raises(DiffpoError, match=r"a\.tar"):
        load(tmp_path / "a.tar")


def test_a_member_of_negative_size(tmp_path):
    head = bytearray(info("0000.jpg_0.png").tobuf(tarfile.GNU_FORMAT))
    head[124:136] = tarfile.itn(-1024, 12, tarfile.GNU_FORMAT)
    head[148:156] = b"%06o\0 " % (sum(head[:148]) + 256 + sum(head[156:]))
    (tmp_path / "a.tar").write_bytes(bytes(head) + bytes(4096))
    with pytest.raises(DiffpoError, match=r"a\.tar"):
        load(tmp_path / "a.tar")


# ---- texts, and few rows


def test_captions_of_any_length_and_script_are_drawn(tmp_path):
    long = "no-break" * 100_000
    rows = [{**pick_a_pic_rows(1)[0], "caption": text} for text in (long, "a\x1b[31m\u202eb\0c", "\U0001f600" * 9)]
    source = str(write_parquet(tmp_path / "a.parquet", rows))
    data = Data(resolution=16)
    groups = scan(data, source, "train")
    assert len(groups) == 3
    draw(groups, data, tmp_path / "a.png")
    assert np.asarray(images.decode((tmp_path / "a.png").read_bytes())).min() < 100


def test_a_lone_surrogate_in_a_caption_is_a_bad_row(folder):
    (folder / "metadata.jsonl").write_text('{"prompt": "a\\ud800", "chosen": "0.png", "rejected": "1.png"}')
    assert "surrogate" in fault(folder)


def test_faults_name_the_file(folder):
    for change, words in {
        ("prompt", ""): ": prompt (0.png)",
        ("prompt", 7): ": 7 (0.png)",
        ("chosen", "2x.png"): "unreadable image: 2x.png: No such file or directory",
    }.items():
        assert fault(write_rows(folder, row("0.png") | dict([change]))).endswith(words)
    save(folder / "wide.png", 4)
    picture(4, (24, 16)).save(folder / "wide.png")
    problem = fault(write_rows(folder, row("0.png", "wide.png")))
    assert all(words in problem for words in ("0.png and wide.png", "16x16 and 24x16", "data.buckets=true"))
    (folder / "2.png").write_bytes(b"")
    assert "2.png" in fault(write_rows(folder, row("2.png")))
    shard = write_tar(folder / "s.tar", [*orpo_members(0, 1)[1:], ("0000.jpg_0.png", png(picture(0))[:60])])
    assert "unreadable image: s.tar: 0000.jpg_0.png: " in fault(shard)


def test_one_pair_and_a_batch_larger_than_the_data(tiny_sd, make_config, tmp_path):
    from diffpo.train.loop import train

    source = write_folder(tmp_path / "one", 1)
    config = make_config(tiny_sd, f"data.validation={source}", "train.steps=2", "train.batch_size=3", data=source)
    assert train(config).exists()


def test_empty_folders(tmp_path):
    (tmp_path / "chosen").mkdir()
    with pytest.raises(DiffpoError, match=str(tmp_path / "chosen")):
        load(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n\n")
    with pytest.raises(DiffpoError, match=r"metadata\.jsonl"):
        load(tmp_path)
