"""Published sets of prompts by name, from files in their formats; nothing is downloaded."""

import csv
import io
import json

import pytest
from tiny import write_parquet

from diffpo.common.errors import DiffpoError
from diffpo.data import prompt_sets
from diffpo.data.prompts import load_prompts

DPG = ("item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed", "tuple")
DPG += ("question_natural_language",)


def table(rows, mark=","):
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=mark).writerows(rows)
    return buffer.getvalue()


def files(folder):
    """The files of all sets, as they are published: {set: {file: what it should give}}."""
    parti = [
        ["Prompt", "Category", "Challenge", "Note"],
        ["bond", "Abstract", "Basic", ""],
        ["42", "Arts", "Basic", ""],
    ]
    dense = ["midjourney3", "A long, dense prompt", ""]
    contents = {
        "PartiPrompts.tsv": table(parti, "\t"),
        "benchmark/drawbench.json": json.dumps(["A red car.", "A cat"]),
        "prompts/evaluation_metadata.jsonl": "\n".join(
            json.dumps({"tag": tag, "include": [{"class": "bench", "count": 1}], "prompt": prompt})
            for tag, prompt in (("single_object", "a photo of a bench"), ("counting", "a photo of two clocks"))
        ),
        "dpg_bench/dpg_bench.csv": table(
            [
                DPG,
                [*dense, 1, 0, "entity", "whole", "entity - whole (x)", "Is there x?"],
                [*dense, 2, 1, "attribute", "color", "attribute - color (x)", "Is x?"],
                ["7", "Another one", "", 1, 0, "entity", "whole", "entity - whole (y)", "Is there y?"],
            ]
        ),
        "genai_image.json": json.dumps(
            {"00000": {"id": "00000", "prompt": "A baker", "models": {}}, "00001": {"id": "00001", "prompt": "Two"}}
        ),
    }
    for style in ("anime", "concept-art", "paintings", "photo"):
        contents[f"benchmark/{style}.json"] = json.dumps([f"{style} one", f"{style} two"])
    for file in prompt_sets.SETS["t2i-compbench"].files:
        contents[file] = "a red book and a blue vase\na green cup\tseen\n"
    for file, content in contents.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(content)
    for split in ("", "-test"):
        (file,) = prompt_sets.SETS[f"pickapic{split}-unique"].files
        (folder / file).parent.mkdir(exist_ok=True)
        write_parquet(folder / file, [{"caption": "a fox", "jpg_0": b""}, {"caption": "a hen", "jpg_0": b""}])
    return folder


FOUND = {
    "parti": (["bond", "42"], ["00000", "00001"], ["Abstract", "Arts"]),
    "drawbench": (["A red car.", "A cat"], ["00000", "00001"], [None, None]),
    "pickapic-unique": (["a fox", "a hen"], ["00000", "00001"], [None, None]),
    "pickapic-test-unique": (["a fox", "a hen"], ["00000", "00001"], [None, None]),
    "geneval": (["a photo of a bench", "a photo of two clocks"], ["00000", "00001"], ["single_object", "counting"]),
    "dpg": (["A long, dense prompt", "Another one"], ["midjourney3", "7"], [None, None]),
    "genai-bench": (["A baker", "Two"], ["00000", "00001"], [None, None]),
}


@pytest.mark.parametrize("name", prompt_sets.SETS)
def test_sets_from_the_place_where_they_are_published(tmp_path, monkeypatch, name):
    files(tmp_path)
    asked = []

    def fetch(repository, file):
        asked.append((repository, file))
        return tmp_path / file

    monkeypatch.setattr(prompt_sets, "_from_hub", fetch)
    monkeypatch.setattr(prompt_sets, "_from_github", fetch)
    found = prompt_sets.entries(name)
    if name == "hpdv2":
        assert len(found) == 8 and found[2].prompt == "concept-art one" and found[2].category == "concept-art"
    elif name == "t2i-compbench":
        assert len(found) == 16 and found[1].prompt == "a green cup"
        assert list(dict.fromkeys(entry.category for entry in found))[:5] == [
            *("color", "shape", "texture", "spatial", "3d_spatial")
        ]
    else:
        columns = [(entry.prompt, entry.id, entry.category) for entry in found]
        assert columns == list(zip(*FOUND[name], strict=True))
    assert load_prompts(name) == [entry.prompt for entry in found] and load_prompts(name, 1) == [found[0].prompt]
    place = prompt_sets.SETS[name].place.partition(":")[2]
    assert {repository for repository, _ in asked} == {place}


def test_local_copies(tmp_path):
    files(tmp_path)
    assert load_prompts(f"parti={tmp_path / 'PartiPrompts.tsv'}") == ["bond", "42"]
    assert len(load_prompts(f"hpdv2={tmp_path}")) == len(load_prompts(f"hpdv2={tmp_path / 'benchmark'}")) == 8
    (color,) = [file for file in prompt_sets.SETS["t2i-compbench"].files if "color" in file]
    found = prompt_sets.entries(f"t2i-compbench={tmp_path / color}")
    assert [entry.category for entry in found] == ["color", "color"]
    record = prompt_sets.entries(f"geneval={tmp_path / 'prompts'}")[1].record
    assert record["tag"] == "counting" and record["include"][0]["class"] == "bench"
    for path, words in {"nowhere": "no such file", "prompts": "neither.*PartiPrompts.tsv"}.items():
        with pytest.raises(DiffpoError, match=words):
            load_prompts(f"parti={tmp_path / path}")


@pytest.mark.parametrize("name", prompt_sets.SETS)
def test_without_network_the_message_has_the_command(tmp_path, monkeypatch, name):
    monkeypatch.setattr(prompt_sets, "CACHE", tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DiffpoError) as error:
        load_prompts(name)
    assert prompt_sets.fetch_command(name) in str(error.value) and f"{name}=" in str(error.value)


def test_a_set_from_github_is_downloaded_once(tmp_path, monkeypatch):
    from huggingface_hub import constants

    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO(b'{"prompt": "a clock", "tag": "single_object"}')

    monkeypatch.setattr(prompt_sets, "CACHE", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert load_prompts("geneval") == load_prompts("geneval") == ["a clock"]
    assert asked == ["https://raw.githubusercontent.com/djghosh13/geneval/HEAD/prompts/evaluation_metadata.jsonl"]


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word, near in {"partii": "parti", "gen-eval": "geneval", "everday": "everyday"}.items():
        with pytest.raises(DiffpoError, match=f"did you mean {near}"):
            load_prompts(word)
    (tmp_path / "parti").write_text("my own prompt")
    assert load_prompts("parti") == ["my own prompt"]  # a file goes before a set


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("parti", "Text\tCategory\nbond\tArts\n", "Prompt.*Text, Category"),
        ("geneval", '{"prompt": 7}', "entry 1.*7"),
        ("geneval", "{broken", "not JSON"),
        ("genai-bench", "[", "Expecting"),
        ("genai-bench", '{"00000": {"text": "a"}}', "prompt.*text"),
        ("dpg", "item_id,text\n", "no prompts"),
        ("pickapic-unique", "PAR1", "parquet|Parquet"),
    ],
)
def test_files_of_another_format(tmp_path, name, content, words):
    file = tmp_path / prompt_sets.SETS[name].files[0].rpartition("/")[2]
    file.write_text(content)
    with pytest.raises(DiffpoError, match=words):
        load_prompts(f"{name}={file}")


@pytest.mark.parametrize("name", prompt_sets.BUNDLED)
def test_bundled_sets(name):
    found = load_prompts(name)
    assert len(found) == len(set(found)) and all(len(prompt.split()) < 20 for prompt in found)
    assert found[:3] == load_prompts(name, 3)
