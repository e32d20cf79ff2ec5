"""Damaged files that this program wrote: LoRAs, checkpoints, caches. They are used as written, or refused by name."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from junk import damaged, mutated, values
from safetensors.torch import save

from diffpo.common.errors import DiffpoError
from diffpo.config import Lora, load_config
from diffpo.data.cache import Cache
from diffpo.models.identity import base_identity
from diffpo.rollout.labelled import read_trajectories
from diffpo.train import checkpoint
from diffpo.train.metrics import Tracker
from diffpo.weights import lora, lora_apply, lora_file

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
DEEP = ["[" * 9000, "9" * 5000, "{", "", "null", "[]", "7"]


class Network(torch.nn.Module):
    """A network of two attention projections, for peft."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.to_q, self.to_k = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)


def tuned(rank=2):
    network = Network()
    lora.add_lora(network, Lora(rank=rank), ["to_q", "to_k"])
    return network


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A LoRA file as training writes it; its bytes, its weights, and the three parts of its header."""
    path = tmp_path_factory.mktemp("lora") / lora_file.FILE_NAME
    base = base_identity(Network(), "a base")
    lora.save_lora(path, tuned(), "transformer", {"base": base, "objective": "dpo", "step": 4})
    weights, about = lora_file.read_lora(path)
    adapter = {f"transformer.{name}": value for name, value in lora_file.settings_of(path)["transformer"].items()}
    return SimpleNamespace(path=path, content=path.read_bytes(), weights=weights, about=about, adapter=adapter)


def try_lora(path):
    """Every use of a LoRA file, each with a new network."""
    for use in (
        lambda: lora_file.read_lora(path),
        lambda: lora_file.settings_of(path),
        lambda: lora_apply.load_lora(SimpleNamespace(transformer=Network()), path),
        lambda: lora_apply.start_from(tuned(), Lora(rank=2, start=str(path))),
    ):
        try:
            use()
        except DiffpoError as error:
            assert str(path) in str(error) or "LoRA" in str(error), error


@settings(max_examples=30)
@given(data=st.data())
def test_loras_with_changed_bytes(written, data):
    content = data.draw(damaged(written.content[:1400]) | damaged(written.content))
    written.path.write_bytes(content + written.content[1400:] if len(content) <= 1400 else content)
    try_lora(written.path)


@settings(max_examples=40)
@given(data=st.data())
def test_loras_with_odd_headers(written, data):
    about = data.draw(
        mutated(written.about).map(json.dumps) | st.just(json.dumps(written.about)) | st.sampled_from(DEEP)
    )
    adapter = data.draw(
        mutated(written.adapter).map(json.dumps) | st.sampled_from([*DEEP, json.dumps(written.adapter)])
    )
    header = {lora_file.HEADER: about, "lora_adapter_metadata": adapter}
    weights = dict(written.weights)
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(weights)))
        weights[data.draw(st.sampled_from([name, "x", "transformer.to_q.lora_A.bias"]))] = torch.zeros(
            data.draw(st.sampled_from([(), (0,), (2,), (4, 2), (2, 4)]))
        )
    written.path.write_bytes(
        save(weights, {key: value.encode("utf-8", "replace").decode() for key, value in header.items()})
    )
    try_lora(written.path)


# ---- checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory, written):
    """The folder of a run with checkpoints 2 and 4."""
    output = tmp_path_factory.mktemp("run") / "run"
    state = {"optimizer": {"state": {0: {"step": 2, "exp_avg": torch.ones(3)}}}, "update": {}, "calls": [1.0]}
    about = {"base": written.about["base"], "data_hash": "h", "pairs_per_update": 4, "objective": "dpo", "beta": 1.5}
    for step in (2, 4):

        def write(folder, step=step):
            lora.save_lora(folder / lora_file.FILE_NAME, tuned(), "transformer", {**about, "step": step})

        checkpoint.save(output, step, write, state, about, keep=2)
    return output


names = st.sampled_from(
    [checkpoint.MANIFEST_NAME, checkpoint.MANIFEST_NAME, checkpoint.STATE_NAME, lora_file.FILE_NAME]
)


@settings(max_examples=60)
@given(name=names, data=st.data())
def test_a_changed_checkpoint_is_never_used(run, name, data):
    """Every changed byte is detected, except bytes between the values of the manifest."""
    path = run / "checkpoint-000004" / name
    content, before = path.read_bytes(), json.loads((path.parent / checkpoint.MANIFEST_NAME).read_text())
    changed = data.draw(damaged(content))
    said = []
    try:
        path.write_bytes(changed)
        folder, manifest = checkpoint.latest(run, said.append)
    finally:
        path.write_bytes(content)
    if folder.name == "checkpoint-000004":
        assert changed == content or name == checkpoint.MANIFEST_NAME
        assert manifest == {key: value for key, value in before.items() if key != "hash"}
    else:
        assert folder.name == "checkpoint-000002" and "checkpoint-000004" in said[0] and name in said[0]


@settings(max_examples=40)
@given(data=st.data())
def test_manifests_of_another_form(run, data):
    path = run / "checkpoint-000004" / checkpoint.MANIFEST_NAME
    content = path.read_text()
    try:
        path.write_text(data.draw(mutated(json.loads(content)).map(json.dumps) | st.sampled_from(DEEP)))
        folder, manifest = checkpoint.latest(run, lambda text: None)
    finally:
        path.write_text(content)
    assert manifest["step"] == int(folder.name[-6:])


@settings(max_examples=60)
@given(data=st.data())
def test_states_with_changed_bytes(run, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    content = (run / "checkpoint-000004" / checkpoint.STATE_NAME).read_bytes()
    (folder / checkpoint.STATE_NAME).write_bytes(data.draw(damaged(content)))
    try:
        checkpoint.read_state(folder)
    except DiffpoError as error:
        assert checkpoint.STATE_NAME in str(error)


@settings(max_examples=40)
@given(data=st.data())
def test_config_and_metrics_of_a_run(run, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    lines = b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null}\n'
    rows = st.lists(values.map(json.dumps) | st.sampled_from(DEEP), max_size=3).map(
        lambda each: "\n".join(each).encode()
    )
    (folder / "metrics.jsonl").write_bytes(data.draw(damaged(lines) | rows))
    tracker = Tracker(folder, 2)
    tracker.close()
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["step"] <= 2


# ---- caches


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    Cache(root, "text", "k" * 32, 3).build(lambda rows: {"embedding": torch.tensor([[float(r), 1.0] for r in rows])}, 2)
    return root


def read(root):
    return Cache(root, "text", "k" * 32, 3).read([2, 0])["embedding"]


@settings(max_examples=40)
@given(data=st.data())
def test_caches_with_changed_bytes(cache, data):
    (path,) = cache.rglob("*.safetensors")
    content = path.read_bytes()
    try:
        path.write_bytes(data.draw(damaged(content)))
        found = read(cache)
    except DiffpoError as error:
        assert str(path) in str(error)
    else:
        assert found.shape[0] == 2
    finally:
        path.write_bytes(content)


tensors = st.sampled_from([torch.zeros(()), torch.zeros(3), torch.zeros(0), torch.zeros(3, 2), torch.zeros(4, 2)])


@settings(max_examples=30)
@given(
    content=st.dictionaries(st.sampled_from(["embedding", "x"]), tensors, max_size=2),
    header=st.fixed_dictionaries({"key": st.sampled_from(["k" * 32, "x"]), "shard": st.sampled_from(["0", "1"])}),
)
def test_caches_with_other_tensors(cache, content, header):
    (path,) = cache.rglob("*.safetensors")
    before = path.read_bytes()
    try:
        path.write_bytes(save({name: value.clone() for name, value in content.items()}, header))
        read(cache)
    except DiffpoError as error:
        assert str(path) in str(error) or str(path.parent) in str(error)
    except KeyError as error:
        assert error.args == ("embedding",)  # raised by this test itself
    finally:
        path.write_bytes(before)


@settings(max_examples=30)
@given(about=values.map(json.dumps) | st.sampled_from(DEEP), name=st.sampled_from(["states", "x"]))
def test_trajectories(tmp_path_factory, about, name):
    folder = tmp_path_factory.getbasetemp()
    (folder / "trajectories").mkdir(exist_ok=True)
    path = folder / "trajectories" / "00000.safetensors"
    path.write_bytes(save({name: torch.zeros(2, 3)}, {"rollout": about}))
    rollout = load_config(QUICKSTART).objective.rollout
    try:
        read_trajectories(folder, "00000", rollout)
    except DiffpoError as error:
        assert str(path) in str(error)
