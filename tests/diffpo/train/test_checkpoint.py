import json
import shutil

import pytest
import torch
from tiny import metrics_of, pick_a_pic_rows, write_parquet

from diffpo.common import files
from diffpo.common.errors import DiffpoError
from diffpo.config import Config, load_config
from diffpo.train import checkpoint
from diffpo.train import metrics as track
from diffpo.train.loop import train
from diffpo.weights import lora_file


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_sd, pairs_parquet):
    """A run of 4 steps with checkpoints 2 and 4; tests work on copies."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "recipe.yaml").write_text(
        f"model: {{path: {tiny_sd}}}\n"
        f"data: {{train: {pairs_parquet}, resolution: 16, cache: {tmp_path_factory.getbasetemp() / 'cache'}}}\n"
        "lora: {rank: 4}\nobjective: {name: diffusion_dpo, beta: 500}\n"
        "train: {steps: 4, batch_size: 4, lr: 1e-2, checkpoint_every: 2}\n"
        f"output: {folder / 'run'}\n"
    )
    train(load_config(folder / "recipe.yaml"))

    def copy(to, *overrides):
        shutil.copytree(folder / "run", to, dirs_exist_ok=True)
        return load_config(folder / "recipe.yaml", [f"output={to}", *overrides])

    return copy


def finished_with(config, override, tmp_path, output=None):
    """The same config with another setting."""
    path = tmp_path / "again.yaml"
    path.write_text(config.to_yaml())
    return load_config(path, [override, f"output={tmp_path / output if output else config.output}"])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_checkpoints_are_rotated_and_named_by_step(finished, tmp_path):
    config = finished(tmp_path / "run", "train.steps=10", "train.checkpoint_every=3", "train.checkpoint_keep=3")
    train(config)
    found = sorted(path.name for path in config.output.glob("checkpoint-*"))
    assert found == ["checkpoint-000006", "checkpoint-000009", "checkpoint-000010"]
    assert lora_file.read_lora(config.output)[1]["step"] == 10


@pytest.mark.parametrize("fault", ["torn state", "torn lora", "no manifest", "half manifest", "flipped bit"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(finished, tmp_path, capsys, fault):
    config = finished(tmp_path / "run")
    newest = config.output / "checkpoint-000004"
    state, manifest = newest / "state.pt", newest / "checkpoint.json"
    match fault:
        case "torn state":
            state.write_bytes(state.read_bytes()[:-100])
        case "torn lora":
            (newest / lora_file.FILE_NAME).write_bytes(b"")
        case "no manifest":
            manifest.unlink()
        case "half manifest":
            manifest.write_text(manifest.read_text()[:40])
        case "flipped bit":
            content = bytearray(state.read_bytes())
            content[len(content) // 2] ^= 1
            state.write_bytes(bytes(content))
    final = lora_file.read_lora(config.output)[0]
    train(config)
    out = capsys.readouterr().out
    assert "checkpoint-000004 is damaged" in out and "resuming from" in out and "checkpoint-000002 (step 2)" in out
    assert all(torch.equal(value, final[name]) for name, value in lora_file.read_lora(config.output)[0].items())


def test_when_every_checkpoint_is_damaged_the_run_stops(finished, tmp_path):
    config = finished(tmp_path / "run")
    for path in config.output.glob("checkpoint-*/state.pt"):
        path.write_bytes(b"x")
    with pytest.raises(DiffpoError, match=r"every checkpoint in .* is damaged: checkpoint-000004, checkpoint-000002"):
        train(config)


def test_state_is_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trap"), "w"))

    torch.save({"optimizer": Trap()}, tmp_path / "state.pt")
    with pytest.raises(DiffpoError, match=r"cannot read .*state\.pt"):
        checkpoint.read_state(tmp_path)
    assert not (tmp_path / "trap").exists()


def test_full_disk_keeps_the_last_whole_checkpoint_and_the_run_can_go_on(finished, tmp_path, monkeypatch):
    config = finished(tmp_path / "run", "train.steps=6")

    fsync = files.os.fsync

    def full(handle):
        if list(config.output.glob(".checkpoint-*")):
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(DiffpoError, match=r"the disk is full.* checkpoint-000004"):
        train(config)
    assert not list(config.output.glob(".*part"))
    monkeypatch.undo()
    train(config)
    assert (config.output / "checkpoint-000006").is_dir()


def test_a_disk_that_fills_up_within_a_file(finished, tmp_path):
    """A real limit of the system between the sizes of the LoRA and of state.pt."""
    import resource

    config = finished(tmp_path / "run", "train.steps=6")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (config.output / lora_file.FILE_NAME).stat().st_size
    assert size + 8192 < (config.output / "checkpoint-000004" / "state.pt").stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 8192, hard))
        with pytest.raises(DiffpoError, match=r"File too large.* checkpoint-000004"):
            train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(config.output.glob(".*part"))


def test_full_disk_while_the_metrics_are_rewritten(finished, tmp_path, monkeypatch):
    config = finished(tmp_path / "run", "train.steps=6")
    write = files.write_atomic

    def full(path, content):
        if path.name == "metrics.jsonl":
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(track, "write_atomic", full)
    with pytest.raises(DiffpoError, match=r"the disk is full.* checkpoint-000004"):
        train(config)


def test_a_folder_that_cannot_be_made_is_not_called_a_full_disk(finished, tmp_path):
    (tmp_path / "file").touch()
    config = finished(tmp_path / "run").model_copy(update={"output": tmp_path / "file" / "run"})
    with pytest.raises(DiffpoError, match=r"file/run: Not a directory"):
        train(config)


@pytest.mark.parametrize("content", ["[]", "7", '{"step": 4, "files": {}}', '{"files": {}}', '{"files": []}'])
def test_a_manifest_of_another_form_is_a_damaged_checkpoint(finished, tmp_path, content):
    config = finished(tmp_path / "run")
    (config.output / "checkpoint-000004" / "checkpoint.json").write_text(content)
    said = []
    folder, _ = checkpoint.latest(config.output, said.append)
    assert (
        folder.name == "checkpoint-000002" and "checkpoint-000004 is damaged (checkpoint.json is not whole" in said[0]
    )


def test_the_newest_checkpoint_is_the_one_with_the_highest_step(finished, tmp_path):
    config = finished(tmp_path / "run")
    shutil.copytree(config.output / "checkpoint-000004", config.output / "checkpoint-1000000")
    shutil.copytree(config.output / "checkpoint-000002", config.output / "checkpoint-999999")
    (config.output / "checkpoint-notes").mkdir()
    assert checkpoint.latest(config.output)[0].name == "checkpoint-1000000"


def test_the_folder_of_another_run_is_refused_and_what_differs_is_named(finished, tmp_path):
    config = finished(tmp_path / "run", "objective.beta=100", "train.seed=1")
    with pytest.raises(DiffpoError, match=r"objective\.beta: 500\.0 there, 100\.0 here; train\.seed"):
        train(config)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(DiffpoError, match=r"other .*notes\.txt"):
        train(config.model_copy(update={"output": tmp_path / "other"}))


def test_a_run_does_not_resume_on_other_pairs_or_with_another_batch(finished, tmp_path):
    config = finished(tmp_path / "run", "train.steps=6", "train.batch_size=2")
    with pytest.raises(
        DiffpoError, match=r"batch_size x accumulation x processes is not the product .*\(4 there, 2 now\)"
    ):
        train(config)
    data = tmp_path / "pairs.parquet"
    write_parquet(data, pick_a_pic_rows(8))
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"train": str(data)}), "output": tmp_path / "b"}
    )
    config = config.model_copy(update={"train": config.train.model_copy(update={"batch_size": 4})})
    train(config)
    write_parquet(data, pick_a_pic_rows(9))
    with pytest.raises(DiffpoError, match="the training pairs are not those that the run started with"):
        train(config)


@pytest.mark.parametrize("edited", ["another beta", "deleted", "no YAML"])
def test_the_settings_in_the_checkpoint_decide_whatever_happened_to_config_yaml(finished, tmp_path, edited):
    config = finished(tmp_path / "run", "train.steps=6")
    written = config.output / "config.yaml"
    text = written.read_text().replace("beta: 500.0", "beta: 100.0")
    match edited:
        case "another beta":
            written.write_text(text)
        case "deleted":
            written.unlink()
        case "no YAML":
            written.write_text("a: [")
    before = contents(config.output)
    with pytest.raises(DiffpoError, match=r"checkpoint-000004.*objective\.beta: 500\.0 there, 100\.0 here"):
        train(finished_with(config, "objective.beta=100", tmp_path))
    assert contents(config.output) == before
    train(config)
    _, about = lora_file.read_lora(config.output)
    assert (about["step"], about["beta"]) == (6, 500.0)
    assert load_config(written) == config and "(beta 500)" in (config.output / "README.md").read_text()
    assert [row["step"] for row in metrics_of(config.output)] == [1, 2, 3, 4, 5, 6]


def test_checkpoints_of_older_versions_are_held_against_config_yaml(finished, tmp_path):
    config = finished(tmp_path / "run", "train.steps=6")
    for path in config.output.glob("checkpoint-*/checkpoint.json"):
        manifest = json.loads(path.read_text())
        assert Config.model_validate(manifest.pop("settings")).identity() == config.identity()
        del manifest["hash"], manifest["validation_hash"], manifest["start_hash"]
        path.write_text(json.dumps({**manifest, "hash": checkpoint._digest(manifest)}))
    with pytest.raises(DiffpoError, match=r"config\.yaml.*objective\.beta: 500\.0 there, 100\.0 here"):
        train(finished_with(config, "objective.beta=100", tmp_path))
    train(config)
    assert lora_file.read_lora(config.output)[1]["step"] == 6
    (config.output / "config.yaml").unlink()
    for path in config.output.glob("checkpoint-*/checkpoint.json"):
        path.write_text("{}")
    with pytest.raises(DiffpoError, match=str(config.output)):
        train(config)


def test_checkpoints_of_newer_versions_are_not_guessed_at(finished, tmp_path):
    config = finished(tmp_path / "run", "train.steps=6")
    path = config.output / "checkpoint-000004" / "checkpoint.json"
    manifest = json.loads(path.read_text())
    manifest["settings"]["train"]["warmth"] = 1
    del manifest["hash"]
    path.write_text(json.dumps({**manifest, "hash": checkpoint._digest(manifest)}))
    with pytest.raises(DiffpoError, match=r"checkpoint.json holds settings that .* \(train.warmth: Extra"):
        train(config)


def test_a_finished_run_without_its_checkpoints_is_not_overwritten(finished, tmp_path):
    config = finished(tmp_path / "run", "objective.beta=100")
    for path in config.output.glob("checkpoint-*"):
        shutil.rmtree(path)
    before = contents(config.output)
    with pytest.raises(DiffpoError, match=r"run .*README\.md"):
        train(config)
    assert contents(config.output) == before


def test_a_config_that_a_person_wrote_is_not_overwritten(finished, tmp_path):
    config = finished(tmp_path / "run")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.yaml").write_text("# tried first\n" + (config.output / "config.yaml").read_text())
    with pytest.raises(DiffpoError, match=r"mine/config.yaml was not written by a run, and would be overwritten"):
        train(config.model_copy(update={"output": mine}))


def test_what_one_run_left_before_its_first_checkpoint_is_not_part_of_the_next(finished, tmp_path, monkeypatch):
    """Both end well, and the card, the header, the config and the metrics are all of the second."""
    config = finished(tmp_path / "run", f"output={tmp_path / 'new'}", "train.checkpoint_every=100")
    log = track.Tracker.log

    def dies(self, step, metrics):
        log(self, step, metrics)
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(track.Tracker, "log", dies)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert len(metrics_of(config.output)) == 3 and not list(config.output.glob("checkpoint-*"))
    monkeypatch.undo()
    other = finished_with(config, "objective.beta=100", tmp_path)
    train(other)
    straight = finished_with(config, "objective.beta=100", tmp_path, "straight")
    train(straight)
    for one, two in zip(metrics_of(other.output), metrics_of(straight.output), strict=True):
        assert one["loss"] == two["loss"] and one["step"] == two["step"]
    assert lora_file.read_lora(other.output)[1]["beta"] == 100 and load_config(other.output / "config.yaml") == other
    assert "(beta 100)" in (other.output / "README.md").read_text()


def test_a_run_that_is_refused_changes_nothing(finished, tmp_path):
    config = finished(tmp_path / "run")
    before = contents(config.output)
    for override, words in {
        "train.batch_size=2": "Set train.batch_size and train.accumulation",
        "train.steps=3": "already at step 4",
        "train.lr=1": "train.lr: 0.01 there, 1.0 here",
        "train.optimizer=torch.optim.Adamm": "train.optimizer: ",
    }.items():
        with pytest.raises(DiffpoError, match=words):
            train(finished_with(config, override, tmp_path))
        assert contents(config.output) == before


def test_data_may_move_between_two_runs_but_not_change(finished, tmp_path):
    config = finished(tmp_path / "run")
    data = {name: tmp_path / f"{name}.parquet" for name in ("train", "validation")}
    for path in data.values():
        write_parquet(path, pick_a_pic_rows(8))
    new = [f"output={tmp_path / 'new'}", *(f"data.{name}={path}" for name, path in data.items())]
    train(finished(tmp_path / "run", *new))
    moved = {name: path.rename(tmp_path / f"moved-{name}.parquet") for name, path in data.items()}
    new = [f"output={tmp_path / 'new'}", *(f"data.{name}={path}" for name, path in moved.items()), "train.steps=6"]
    config = finished(tmp_path / "run", *new)
    write_parquet(moved["validation"], pick_a_pic_rows(7))
    with pytest.raises(DiffpoError, match=r"validation pairs are not those .* Point data.validation at the same data"):
        train(config)
    write_parquet(moved["validation"], pick_a_pic_rows(8))
    train(config)
    assert lora_file.read_lora(config.output)[1]["step"] == 6
    assert moved["train"].name in (config.output / "README.md").read_text()
    write_parquet(moved["train"], pick_a_pic_rows(7))
    with pytest.raises(DiffpoError, match=r"Point data.train or data.prompts at the same data, or start a new run"):
        train(config)


def test_a_run_does_not_resume_on_another_lora_to_start_from(finished, tmp_path):
    finished(tmp_path / "run")
    first, other = (tmp_path / "run" / f"checkpoint-00000{step}" / lora_file.FILE_NAME for step in (2, 4))
    start = tmp_path / "start.safetensors"
    shutil.copy(first, start)
    config = finished(tmp_path / "run", f"lora.start={start}", f"output={tmp_path / 'new'}", "train.steps=2")
    train(config)
    shutil.copy(other, start)
    with pytest.raises(DiffpoError, match=r"lora.start is not the LoRA that the run started with .*Set lora.start"):
        train(finished_with(config, "train.steps=4", tmp_path))


def test_a_run_is_not_shortened(finished, tmp_path):
    with pytest.raises(DiffpoError, match=r"is already at step 4, beyond train.steps=3"):
        train(finished(tmp_path / "run", "train.steps=3"))


def test_a_run_does_not_resume_on_another_base(finished, tmp_path):
    import os

    from tiny import make_sd

    config = finished(tmp_path / "run", "train.steps=6")
    model = tmp_path / "model"
    shutil.copytree(config.model.path, model)
    moved = config.model_copy(
        update={"model": config.model.model_copy(update={"path": str(model)}), "output": tmp_path / "b"}
    )
    train(moved)
    make_sd(tmp_path / "other", seed=1)
    os.replace(
        tmp_path / "other" / "unet" / "diffusion_pytorch_model.safetensors",
        model / "unet" / "diffusion_pytorch_model.safetensors",
    )
    with pytest.raises(DiffpoError, match="the base model is not the one that the run started with"):
        train(moved)


def test_settings_may_be_mended_while_nothing_is_trained(tiny_sd, make_config):
    with pytest.raises(DiffpoError, match="cannot be imported"):
        train(make_config(tiny_sd, "train.optimizer=torch.optim.Adamm"))
    assert train(make_config(tiny_sd, "train.steps=1")).exists()
