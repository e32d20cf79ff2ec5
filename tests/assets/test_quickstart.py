"""The main job, shortened: training on the embedded world must raise a held-out oracle score."""

import json

import pytest

from diffpo.commands import check, quickstart
from diffpo.common.errors import DiffpoError
from diffpo.weights.lora_file import read_lora


def test_a_short_quickstart_wins_on_held_out_prompts(tmp_path, capsys):
    out = tmp_path / "run"
    shorter = ("train.steps=40", "train.lr=1e-3", "train.eval_every=40", "train.eval_pairs=32", "data.limit=640")
    evaluation = quickstart.run(out, seed=7, n=64, overrides=(*shorter, f"data.cache={tmp_path / 'cache'}"))
    total, appearance = evaluation.row("shapes.total"), evaluation.row("shapes.appearance")
    # the whole run's bar is 0.55 on 512 prompts; 64 after 40 larger steps must at least tell it from chance
    assert total.win_rate.low > 0.5
    assert appearance.difference.low > 0
    assert total.training_signal == "yes"

    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == list(range(1, 41))
    assert metrics[0]["rewards/margins"] == 0.0  # policy == reference before the first update, exactly
    _, about = read_lora(out)
    assert about["objective"] == "diffusion_dpo" and about["base"]["hash"] and about["data_hash"]

    printed = capsys.readouterr().out
    for path in (*evaluation.files.values(), out / "pytorch_lora_weights.safetensors"):
        assert path.exists()
        assert path.name in printed


@pytest.mark.parametrize("name", ["my: run", "[1]", "{a}", "null", "1e5", "a #b", "*x", 'a"b'])
def test_a_folder_of_any_name_is_a_folder(tmp_path, monkeypatch, name):
    """And not YAML."""

    def stop(config):
        assert config.output == tmp_path / name
        raise DiffpoError("far enough")

    monkeypatch.setattr(check, "check", stop)
    with pytest.raises(DiffpoError, match="far enough"):
        quickstart.run(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        check, "check", lambda config: stop(config.model_copy(update={"output": tmp_path / config.output}))
    )
    with pytest.raises(DiffpoError, match="far enough"):
        quickstart.run(quickstart.Path(name))
