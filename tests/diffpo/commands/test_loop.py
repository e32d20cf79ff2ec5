"""Rounds of sample, label, train from the last LoRA, compare."""

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from diffpo import cli
from diffpo.common.errors import DiffpoError


def looped(folder, model, *options):
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: {model}}}\n"
        f"data: {{prompts: '{folder / 'prompts.txt'}', resolution: 16, cache: '{folder / 'cache'}'}}\n"
        "lora: {rank: 4}\n"
        "objective: {name: diffusion_dpo, beta: 500}\n"
        "train: {steps: 1, batch_size: 2, lr: 1e-2, checkpoint_every: 1}\n"
        f"output: {folder / 'run'}\n"
    )
    (folder / "prompts.txt").write_text("red cat\nblue dog\na bird\n")
    arguments = ["loop", str(recipe), "--heldout", str(folder / "prompts.txt"), "--scorers", "on_policy:Redness"]
    arguments += ["--n", "2", "--steps", "1", "--guidance", "1", "--images-per-prompt", "2", "--height", "16"]
    result = CliRunner().invoke(cli.app, [*arguments, "--width", "16", *options])
    if result.exception:
        raise result.exception
    return result.output


@pytest.fixture(scope="module")
def two_rounds(tiny_sd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    return folder, looped(folder, tiny_sd, "--rounds", "2")


def test_each_round_samples_from_the_last_lora_and_trains_on_from_it(two_rounds):
    folder, said = two_rounds
    first, second = (folder / "run" / f"round-{number}" for number in (1, 2))
    assert "round-2" in said
    starts = [yaml.safe_load((each / "run/config.yaml").read_text())["lora"]["start"] for each in (first, second)]
    assert starts == [None, str(first / "run")]
    texts = [pq.read_table(each / "labels/labels.parquet")["caption"].to_pylist() for each in (first, second)]
    assert texts == [["red cat", "blue dog"], ["a bird", "red cat"]]  # the next ones
    manifests = [(each / "labels/manifest.jsonl").read_text() for each in (first, second)]
    assert '"lora": null' in manifests[0] and f'"lora": "{first / "run"}"' in manifests[1]
    assert '"seed": 2' in manifests[1] and '"seed": 0' not in manifests[1]  # no noise twice
    arms = set(pq.read_table(folder / "run/eval/scores.parquet")["arm"].to_pylist())
    assert arms == {"start", "round-1", "round-2"}


def test_the_same_command_makes_nothing_again_and_a_further_round_goes_on(two_rounds, tiny_sd):
    folder, _ = two_rounds
    before = {path: path.read_bytes() for name in ("*.safetensors", "labels.parquet") for path in folder.rglob(name)}
    pictures = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png") if path.parent.parent.name == "images"}
    said = looped(folder, tiny_sd, "--rounds", "3")
    assert "already" in said or "resuming" in said
    assert len(before) >= 6 and {path: path.read_bytes() for path in before} == before
    assert len(pictures) == 8 + 9 and {path: path.stat().st_mtime_ns for path in pictures} == pictures
    assert (folder / "run/round-3/run/pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--lora", "x"], "lora.start"),
        (["data.prompts=null"], "data.prompts"),
        (["objective.name=d3po", "objective.rollout.scorers=[shapes.total]"], "an objective that trains on data"),
    ],
)
def test_what_the_loop_cannot_do_is_said(tmp_path, tiny_sd, options, named):
    with pytest.raises(DiffpoError, match=named):
        looped(tmp_path, tiny_sd, *options)
