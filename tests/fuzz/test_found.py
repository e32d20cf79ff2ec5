"""Faults that fuzzing found, one case each: every one ended in a traceback or went unnoticed before."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from junk import places
from safetensors.torch import save
from tiny import picture, png

from diffpo.common.errors import DiffpoError
from diffpo.common.images import BadRow, ShardMember, content, decode
from diffpo.config import Data, load_config
from diffpo.data.cache import Cache
from diffpo.data.groups import load_groups
from diffpo.data.prompts import load_prompts
from diffpo.evaluate.manifest import read_manifest
from diffpo.rollout.labels import read_labels
from diffpo.scorers.step.base import read_about
from diffpo.train import checkpoint, claim
from diffpo.train.build import make_optimizer
from diffpo.train.metrics import Tracker
from diffpo.weights import lora_apply, lora_file

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
DEEP = "[" * 100_000


@pytest.mark.parametrize("value", ["!!int", "!!float ''", "!!timestamp x", "2024-13-41", "[" * 5000, "9" * 5000])
def test_values_that_break_the_yaml_parser(tmp_path, value):
    (tmp_path / "recipe.yaml").write_text(f"model: {value}\n")
    with pytest.raises(DiffpoError, match=r"recipe\.yaml"):
        load_config(tmp_path / "recipe.yaml")
    with pytest.raises(DiffpoError, match="model="):
        load_config(QUICKSTART, [f"model={value}"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("output=~nobody-there/run", "nobody-there"),
        ("output=" + "x" * 300, "output: "),
        ('data.train="a\\0b"', "NUL"),
        ('lora.targets=["\\ud800"]', "lora.targets: "),
        ("train.steps=0x" + "f" * 5000, "train.steps: "),
        ("train.lr=0x" + "f" * 5000, "train.lr"),
        ("train.optimizer_args=&a {x: *a}", "alias"),
        ("train.optimizer_args={eps: .nan}", "nan"),
        ("train.optimizer_args={eps: 2024-01-01}", "date"),
    ],
)
def test_settings_that_are_impossible(override, words):
    with pytest.raises(DiffpoError) as error:
        load_config(QUICKSTART, [override])
    assert override.split("=")[0] in str(error.value) and words in str(error.value)
    assert str(QUICKSTART) in str(error.value)


def test_names_of_optimisers_and_folders_with_unusual_errors():
    with pytest.raises(DiffpoError, match=r"train\.optimizer.*\.\.Adam"):
        make_optimizer(load_config(QUICKSTART, ["train.optimizer=..Adam"]).train, [])
    config = load_config(QUICKSTART, ["output=" + "/".join(["x" * 250] * 15 + ["y" * 220])])
    with pytest.raises(DiffpoError, match="z" * 20):
        claim.check_folder(config.model_copy(update={"output": config.output / ("z" * 250)}))


def test_rows_that_are_not_utf8_are_bad_rows(tmp_path):
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(png(picture(int(name[0]), (8, 8))))
    row = '{"prompt": "caf\xe9", "chosen": "0.png", "rejected": "1.png"}\n'
    (tmp_path / "metadata.jsonl").write_bytes(row.encode("latin-1") + row.encode())
    with pytest.raises(DiffpoError, match=r"1 of 2 rows .*row 0"):
        load_groups(Data(resolution=8), str(tmp_path), "train")
    assert load_groups(Data(resolution=8, bad_rows="skip"), str(tmp_path), "train").captions == ["caf\xe9"]


@pytest.mark.parametrize("place", [(Path("nowhere.tar"), 0, 9), (Path(), 0, 9), (Path(__file__), -1, 9)])
def test_impossible_positions_in_shards(place):
    with pytest.raises(BadRow, match="unreadable image"):
        content(ShardMember(*place, "0.png"), (Path(),))


@pytest.mark.parametrize("cell", [{"path": None, "size": 1}, {"size": 1}, {"path": 0, "offset": 0, "size": 9}])
def test_cells_that_look_like_positions_are_values(cell):
    with pytest.raises(BadRow, match="missing image"):
        content(cell, (Path(),))


def test_decoders_that_raise_any_exception(monkeypatch):
    def broken(*args):
        raise KeyError("of a decoder")

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", broken)
    with pytest.raises(BadRow, match=r"unreadable image: .*of a decoder"):
        decode(png(picture(0)))


def test_json_lines_without_end_or_of_another_form(tmp_path):
    for name, read in {
        "prompts.jsonl": load_prompts,
        "labels.jsonl": read_labels,
        "manifest.jsonl": lambda path: read_manifest(path.parent),
        "scorer.json": lambda path: read_about(path.parent),
    }.items():
        (tmp_path / name).write_text(f"{DEEP}\n{DEEP}\n")
        with pytest.raises(DiffpoError, match=name):
            read(tmp_path / name)
    label = {"prompt": ["a"], "image_0": "images/00000-0.png", "image_1": "images/00000-1.png", "label_0": 1}
    (tmp_path / "labels.jsonl").write_text(json.dumps(label))
    with pytest.raises(DiffpoError, match=r"labels\.jsonl:1: .*prompt is"):
        read_labels(tmp_path / "labels.jsonl")
    (tmp_path / "manifest.jsonl").write_text(
        '{"arm": "base", "index": null, "seed": 0, "prompt": "a", "file": "b"}\n\n'
    )
    with pytest.raises(DiffpoError, match=r"manifest\.jsonl:1"):
        read_manifest(tmp_path)
    with pytest.raises(DiffpoError, match="shapes:heldout:²"):
        load_prompts("shapes:heldout:²")


@pytest.mark.parametrize("line", [b"\xff", b"7", b"{}", b'{"step": null}', DEEP.encode()])
def test_metrics_of_another_form_are_dropped(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b"\n")
    Tracker(tmp_path, 2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("header", [DEEP, "7", "[]", '{"base": 7}', '{"base": {"hash": 1}}'])
def test_lora_headers_of_another_form(tmp_path, header):
    path, network = tmp_path / "lora.safetensors", torch.nn.Linear(2, 2)
    weights = {"transformer.x.lora_A.weight": torch.zeros(1)}
    path.write_bytes(save(weights, {lora_file.HEADER: header, "lora_adapter_metadata": "{}"}))
    with pytest.raises(DiffpoError, match=r"lora\.safetensors"):
        lora_apply.check_lora(SimpleNamespace(transformer=network), path)
    path.write_bytes(save(weights, {"lora_adapter_metadata": DEEP}))
    with pytest.raises(DiffpoError, match=r"lora\.safetensors"):
        lora_file.settings_of(path)


def test_any_change_in_a_manifest_is_detected(tmp_path):
    """Without that, the run would resume at another step, although the other files match their sizes and hashes."""
    for step in (2, 4):
        about = {"base": {"hash": "x", "sample": [0.5]}, "data_hash": "h", "pairs_per_update": 4, "beta": 1.5}
        checkpoint.save(
            tmp_path, step, lambda folder: (folder / lora_file.FILE_NAME).write_bytes(b"x"), {}, about, keep=2
        )
    path = tmp_path / "checkpoint-000004" / checkpoint.MANIFEST_NAME
    whole = json.loads(path.read_text())
    for way in places(whole):
        manifest = json.loads(json.dumps(whole))
        *parents, last = way
        parent = manifest
        for key in parents:
            parent = parent[key]
        parent[last] = "changed"
        path.write_text(json.dumps(manifest))
        assert checkpoint.latest(tmp_path, lambda text: None)[0].name == "checkpoint-000002", way
    path.write_text(json.dumps(whole))
    assert checkpoint.latest(tmp_path)[0].name == "checkpoint-000004"


def test_a_cached_tensor_without_rows_is_detected(tmp_path):
    cache = Cache(tmp_path, "text", "k" * 32, 1)
    cache.folder.mkdir()
    cache.path(0).write_bytes(save({"x": torch.zeros(())}, {"key": "k" * 32, "shard": "0"}))
    with pytest.raises(DiffpoError, match="00000"):
        cache.read([0])
