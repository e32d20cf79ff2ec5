"""Prompts from files of every supported format, in every supported encoding."""

import codecs
import json
import os
import threading

import pytest
from tiny import write_parquet

from diffpo.common.errors import DiffpoError
from diffpo.data.prompts import load_prompts

TWO = ["a cat, in the rain", 'the words "Fly high" on a wall']


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def csv_of(names, rows, mark=","):
    import csv
    import io

    buffer = io.StringIO()
    csv.writer(buffer, delimiter=mark).writerows([names, *rows])
    return buffer.getvalue()


FILES = {
    "lines.txt": "\n".join(TWO),
    "list.json": json.dumps(TWO),
    "pretty.json": json.dumps(TWO, indent=1),
    "objects.json": json.dumps([{"id": i, "prompt": each} for i, each in enumerate(TWO)]),
    "captions.JSON": json.dumps([{"Caption": each, "image": "x.png"} for each in TWO]),
    "styles.json": json.dumps({"anime": TWO[:1], "photo": TWO[1:]}),  # hpsv2.benchmark_prompts('all')
    "ids.json": json.dumps({f"{i:05d}": {"id": i, "prompt": each} for i, each in enumerate(TWO)}),
    "columns.json": json.dumps({"prompt": TWO, "id": [1, 2]}),
    "lines.json": "\n".join(json.dumps({"prompt": each}) for each in TWO),
    "lines.jsonl": "\n".join(json.dumps({"prompt": each}) for each in TWO),
    "upper.JSONL": "\n".join(json.dumps({"text": each}) for each in TWO),
    "texts.jsonl": "\n".join(json.dumps(each) for each in TWO),
    "comma.csv": csv_of(["id", "prompt"], list(enumerate(TWO))),
    "semicolon.csv": csv_of(["Prompt", "note"], [[each, "x"] for each in TWO], ";"),
    "drawbench.csv": csv_of(["Prompts", "Category"], [[each, "Text"] for each in TWO]),
    "lone.csv": "prompt\n" + TWO[0] + "\n" + csv_of(TWO[1:], []),
    "tabs.tsv": csv_of(["Prompt", "Category"], [[each, "Animals"] for each in TWO], "\t"),
    "raw.tsv": "Prompt\tCategory\tChallenge\tNote\n" + "".join(f"{each}\tArts\tBasic\t\n" for each in TWO),
}


@pytest.mark.parametrize("saved", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be with a mark", "crlf"])
@pytest.mark.parametrize("name", FILES)
def test_every_format_in_every_encoding(tmp_path, name, saved):
    text = FILES[name]
    if saved == "crlf":
        content = text.replace("\r\n", "\n").replace("\n", "\r\n").encode()
    elif "mark" in saved:
        content = codecs.BOM_UTF16_BE + text.encode("utf-16-be")
    else:
        content = text.encode(saved)
    assert load_prompts(write(tmp_path / name, content)) == TWO


def test_parquet_and_named_columns(tmp_path):
    rows = [{"id": i, "caption": each, "long text": each.upper()} for i, each in enumerate(TWO)]
    source = write_parquet(tmp_path / "a.parquet", rows)
    assert load_prompts(source) == TWO and load_prompts(source, 1) == TWO[:1]
    assert load_prompts(f"{source}:long text") == [each.upper() for each in TWO]
    table = write(tmp_path / "a.csv", csv_of(["caption", "words"], [["x", each] for each in TWO]))
    assert load_prompts(f"{table}:words") == TWO and load_prompts(table) == ["x", "x"]
    objects = write(tmp_path / "a.json", json.dumps([{"words": each, "prompt": "x"} for each in TWO]))
    assert load_prompts(f"{objects}:words") == TWO
    with pytest.raises(DiffpoError, match=r"a\.parquet:nowhere: .*'nowhere'.*long text"):
        load_prompts(f"{source}:nowhere")


def test_file_names_may_contain_colons(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_prompts(write(tmp_path / "a.csv:prompt", "one")) == ["one"]
    assert load_prompts(str(write(tmp_path / "C:\\prompts.csv", "prompt\none"))) == ["one"]
    with pytest.raises(DiffpoError, match=r"D:\\prompts\.csv: No such file"):
        load_prompts("D:\\prompts.csv")


def test_hpdv2s_test_file_and_parti_prompts_as_published(tmp_path):
    row = {"prompt": TWO[0], "image_path": ["0.png", "1.png"], "rank": [2, 1], "raw_annotations": []}
    assert load_prompts(write(tmp_path / "test.json", json.dumps([row]))) == TWO[:1]
    parti = (
        "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tBiology-inspired concepts\n42\tAbstract\tBasic\tx\n"
        '"Hello" is what she says\tPeople\tBasic\t\nA robot. The words "Fly an airplane" are on it.\tArts\tComplex\t\n'
        '"unclosed\tArts\tBasic\t\n'
    )
    found = load_prompts(write(tmp_path / "PartiPrompts.tsv", parti))
    assert found == [line.split("\t")[0] for line in parti.splitlines()[1:]]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "[broken", "not JSON"),
        ("a.json", '["one", 7]', r"item 2: .*\b7\b"),
        ("a.json", '[{"prompt": "one"}, {"caption": "two"}]', "item 2 .*'prompt'.*caption"),
        ("a.json", '[{"prompt": null}]', "item 1: .*None"),
        ("a.json", '{"title": "x", "author": "y"}', "title, author"),
        ("a.json", "[]", "no prompts"),
        ("a.json", "", "no prompts"),
        ("a.json", '["\\ud800"]', "surrogate"),
        ("a.jsonl", '{"prompt": "one"}\n{broken', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"prompt": "one"}\n{"prompt": "caf\xe9"}', r"a\.jsonl:2"),
        ("a.csv", "id,words\n1,one\n", "id, words.*FILE:COLUMN"),
        ("a.csv", "id,prompt\n1,a cat, in the rain\n", r"a\.csv:2: 3 fields.*header has 2"),
        ("a.csv", 'id,prompt\n1,"a cat\n2,b\n', r"line 3"),
        ("a.csv", "prompt,prompt\na,b\n", "columns .*'prompt'"),
        ("a.csv", "id,prompt\n1,\n", r"a\.csv:2: .*None"),
        ("a.csv", "id,prompt\n", "no prompts"),
        ("a.parquet", b"PAR1", r"a\.parquet"),
        ("a.txt", b"caf\xe9", r"a\.txt"),
        ("a.txt", b"\xff\xfea", r"a\.txt"),
        ("a.txt", "a cat".encode("utf-16-le"), "NUL.*UTF-16 without a byte order mark"),
        ("a.csv", "prompt\na cat".encode("utf-16-le"), "NUL.*UTF-16 without a byte order mark"),
    ],
)
def test_invalid_prompts_are_named_with_file_and_line(tmp_path, name, content, words):
    with pytest.raises(DiffpoError, match=words) as error:
        load_prompts(write(tmp_path / name, content))
    assert str(tmp_path / name) in str(error.value) and len(str(error.value)) < 1000


def test_folders_and_urls_are_refused(tmp_path):
    with pytest.raises(DiffpoError, match=f"{tmp_path}: .*folder"):
        load_prompts(tmp_path)
    with pytest.raises(DiffpoError, match=r"https://example\.org/prompts\.txt"):
        load_prompts("https://example.org/prompts.txt")


def test_prompts_may_come_through_a_pipe(tmp_path):
    """`--prompts <(command)`"""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("\n".join(TWO)))
    writer.start()
    assert load_prompts(tmp_path / "pipe") == TWO
    writer.join()
