import itertools
import json

import pytest
import torch
from on_policy import PROMPTS
from safetensors import safe_open

from diffpo.commands.collect import collect
from diffpo.common.errors import DiffpoError
from diffpo.config import RolloutSettings
from diffpo.models.identity import base_identity
from diffpo.rollout.labelled import kept
from diffpo.train.loop import train
from diffpo.weights import lora, lora_file


def collected(make_config, tiny_sd, folder, *overrides):
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("red cat\nblue dog\n")
    return make_config(
        tiny_sd,
        "objective.name=d3po",
        "objective.beta=0.2",
        f"data.prompts={prompts}",
        "objective.rollout.steps=3",
        "objective.rollout.samples=3",
        f"objective.rollout.labels={folder}/labels.jsonl",
        *overrides,
    )


def test_collect_writes_what_people_judge_and_training_reads_it(make_config, tiny_sd, tmp_path, feed):
    folder = tmp_path / "feedback"
    config = collected(make_config, tiny_sd, folder)
    labels = collect(config)
    assert len(list((folder / "images").glob("*.png"))) == 6
    rows = [json.loads(line) for line in labels.read_text().splitlines()]
    assert [(row["image_0"], row["image_1"]) for row in rows[:3]] == [
        (f"images/00000-{i}.png", f"images/00000-{j}.png") for i, j in itertools.combinations(range(3), 2)
    ]
    with pytest.raises(DiffpoError, match=r"labels\.jsonl"):
        feed(labels=labels, steps=3, guidance=5.0)
    rows[1]["label_0"], rows[4]["label_0"] = 0, 0.7
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = labels.read_bytes()
    with safe_open(folder / "trajectories/00001.safetensors", "pt") as file:
        states = file.get_tensor("states")
    (folder / "trajectories/00001.safetensors").unlink()
    collect(config)  # goes on, and gives the same
    assert labels.read_bytes() == written

    made = feed(labels=labels, steps=3, guidance=5.0)
    assert made.begin(0) == {}
    state = made.state()
    made.load(state)
    with pytest.raises(DiffpoError, match="labels"):
        made.load({**state, "labels": "others"})
    assert len(made.items) == 2 * 2  # pairs x noisy steps
    prefer = [item for item in made.items if item.preference < 1]
    assert {item.prompt for item in prefer} == {PROMPTS.index("blue dog")}
    first = prefer[0]
    assert torch.equal(first.x[0], states[0, 0])
    torch.testing.assert_close(first.at.transition.mean(first.x[1], first.target[1]), states[2, 1])
    with pytest.raises(DiffpoError, match=r"sampled with rollout\.guidance=5\.0.* is 2\.0"):
        feed(labels=labels, steps=3, guidance=2.0)
    (folder / "trajectories/00001.safetensors").write_bytes(b"not")
    with pytest.raises(DiffpoError, match="00001"):
        feed(labels=labels, steps=3, guidance=5.0)
    (tmp_path / "prompts.txt").write_text("green fox\n")
    with pytest.raises(DiffpoError, match=r"labels\.jsonl.*--out"):
        collect(config)


def test_collect_refuses_what_it_cannot_do(make_config, tiny_sd, editor, tmp_path):
    config = collected(make_config, tiny_sd, tmp_path / "f", "data.prompts=null")
    with pytest.raises(DiffpoError, match=r"data\.prompts"):
        collect(config)
    judged = ("objective.rollout.labels=null", "objective.rollout.scorers=[shapes.total]")
    with pytest.raises(DiffpoError, match=r"data\.columns\.source=before.*`diffpo label`"):
        edits = collected(make_config, editor("kontext"), tmp_path / "f", "data.columns.source=before", *judged)
        collect(edits, tmp_path / "f")
    with pytest.raises(DiffpoError, match=r"qwen_edit with data\.columns\.source=null.*`diffpo label`"):
        collect(collected(make_config, editor("qwen_edit"), tmp_path / "f"))
    with pytest.raises(DiffpoError, match=r"source forward.*d3po"):
        collect(make_config(tiny_sd))
    with pytest.raises(DiffpoError, match=r"objective\.rollout\.window=null"):  # labels would count steps without noise
        collect(collected(make_config, tiny_sd, tmp_path / "g", "objective.rollout.window=1", *judged))


def test_collect_does_not_mix_settings_nor_overwrite_pictures(make_config, tiny_sd, tmp_path):
    folder = tmp_path / "feedback"
    collect(collected(make_config, tiny_sd, folder))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for override, words in {
        "objective.rollout.guidance=2": '"guidance": 2.0',
        "train.seed=1": '"seed": 1',
        "objective.rollout.samples=2": '"samples": 2',
    }.items():
        with pytest.raises(DiffpoError, match=rf"00000.safetensors .*{words}.*--out"):
            collect(collected(make_config, tiny_sd, folder, override))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    (folder / "labels.jsonl").unlink()
    with pytest.raises(DiffpoError, match=r"labels\.jsonl.*--out"):
        collect(collected(make_config, tiny_sd, folder))
    assert not (folder / "labels.jsonl").exists()


def test_the_reference_is_the_policy_before_training(make_config, tiny_sd, tmp_path):
    states = []
    for sampler in ("policy", "reference"):
        config = collected(make_config, tiny_sd, tmp_path / sampler, f"objective.rollout.sampler={sampler}")
        with safe_open(collect(config).parent / "trajectories/00000.safetensors", "pt") as file:
            states.append(file.get_tensor("states"))
    assert torch.equal(*states)


def test_a_collection_of_before_solver_options_goes_on():
    """Its header has four settings; with the default sampler a new one's has the same."""
    plain = RolloutSettings(steps=3, guidance=2.0)
    assert kept(plain) == {"steps": 3, "eta": 1.0, "guidance": 2.0, "step": "ddim"}
    changed = plain.model_copy(update={"end": "lowest", "step_options": {"order": 2}})
    assert kept(changed) == {**kept(plain), "end": "lowest", "step_options": {"order": 2}}


def test_trajectories_of_the_current_lora(make_config, tiny_sd, tmp_path):
    """From the same noise as the base's, and not the base's; the two are not mixed."""
    from exports import train

    train(tiny_sd, tmp_path / "run", rank=4, alpha=4)
    start = f"lora.start={tmp_path / 'run'}"
    states = {}
    for name, overrides in {"base": (), "tuned": (start,)}.items():
        labels = collect(collected(make_config, tiny_sd, tmp_path / name, "lora.rank=4", *overrides))
        with safe_open(labels.parent / "trajectories/00000.safetensors", "pt") as file:
            states[name] = file.get_tensor("states")
            assert ("lora" in json.loads(file.metadata()["made"])) == (name == "tuned")
    assert torch.equal(states["base"][:, 0], states["tuned"][:, 0])  # the same noise
    assert not torch.allclose(states["base"][:, -1], states["tuned"][:, -1], atol=1e-3)
    with pytest.raises(DiffpoError, match="--out"):
        collect(collected(make_config, tiny_sd, tmp_path / "tuned", "lora.rank=4"))


def test_training_starts_from_the_lora_that_sampled(make_config, tiny_sd, tmp_path):
    """Trajectories of another LoRA, or of the base, are refused: a round would mix two policies."""
    from exports import train as save_lora

    starts = {"base": ()}
    for name in ("one", "two"):
        network = save_lora(tiny_sd, tmp_path / name, rank=4, alpha=4)
        if name == "two":
            about = {"base": base_identity(network)}
            for parameter in lora.adapter_parameters(network).values():
                parameter.data *= 2
            lora.save_lora(tmp_path / name / lora_file.FILE_NAME, network, "unet", about)
        starts[name] = (f"lora.start={tmp_path / name}", "lora.rank=4")
    for sampler in ("base", "one"):
        folder = tmp_path / f"by-{sampler}"
        labels = collect(collected(make_config, tiny_sd, folder, *starts[sampler]))
        labels.write_text(labels.read_text().replace("null", "1"))
        for name, start in starts.items():
            config = collected(
                make_config, tiny_sd, folder, *start, "train.steps=1", f"output={tmp_path / sampler / name}"
            )
            if name == sampler:
                train(config)
            else:
                with pytest.raises(DiffpoError, match=r"00000\.safetensors was sampled from .*lora\.start"):
                    train(config)
