"""Faulty files of prompts, labels, images and scorers: they are read, or refused with a message that names them."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from junk import AWKWARD, damaged, lines, mutated, values

from diffpo.common.errors import DiffpoError
from diffpo.data.prompts import load_prompts
from diffpo.evaluation.manifest import read_manifest
from diffpo.rollout.labels import Label, read_labels
from diffpo.scorers.step.base import read_about


@settings(max_examples=80)
@given(
    suffix=st.sampled_from(["txt", "jsonl", "json", "csv", "tsv", "parquet"]),
    content=damaged(b'{"prompt": "a cat"}\n{"prompt": "\xc3\xa9"}\n')
    | damaged(b'id,prompt\n1,"a ""big"" cat"\n2,\xc3\xa9\n')
    | (st.lists(values, max_size=3) | st.dictionaries(st.sampled_from(["prompt", "x"]), values)).map(
        lambda tree: lines([tree])
    )
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
