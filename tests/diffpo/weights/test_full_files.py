"""What full fine-tuning wrote, in generate and export, and what is refused."""

import diffusers
import pytest
import torch
from exports import fresh, output
from safetensors.torch import load_file
from tiny import make_sd
from whole_networks import file_of, move, ready, same

from diffpo.common.errors import DiffpoError
from diffpo.evaluation import generate
from diffpo.evaluation.generation import Generation
from diffpo.export import export
from diffpo.models.identity import base_identity
from diffpo.train.checkpoint import disk_errors
from diffpo.weights import lora, trained


@pytest.fixture
def run(tiny_sd, make_config, tmp_path):
    """The folder of a run, as `train` leaves it, whose weights are not the base's."""
    _, network, parameters, _ = ready(make_config(tiny_sd, "lora=null"))
    about = {"objective": "ipo", "beta": 250.0, "data_hash": "d4t4", "pairs_per_update": 8, "step": 5}
    about["base"] = base_identity(network, "me/base")
    move(parameters)
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-000005"):
        folder.mkdir()
        trained.of(network).save(folder, None, "unet", about)
    return tmp_path / "run"


def test_generate_paints_with_the_trained_network_and_export_merged_too(tiny_sd, run, tmp_path):
    def generated(name, model, lora=None):
        made = Generation(model, lora=lora, steps=2, height=16, width=16, device="cpu")
        return generate.run(made.arms(), ["a red cat", "a dog"], tmp_path / name)

    rows = generated("both", tiny_sd, run)
    alone = generated("alone", tiny_sd)
    export.run(export.Export(run, "merged", str(tiny_sd), tmp_path / "merged"))
    merged = generated("again", tmp_path / "merged")

    def hashes(rows, arm):
        return [row["sha256"] for row in rows if row["arm"] == arm]

    assert hashes(rows, "base") == hashes(alone, "base")  # whatever else is painted
    assert hashes(rows, "tuned") == hashes(merged, "base") != hashes(alone, "base")
    assert {row["lora_hash"] for row in rows} == {None, trained.file_hash(run)}
    # a lost picture is painted again by its own arm
    for arm in ("base", "tuned"):
        (tmp_path / "both" / "images" / arm / "00001_0.png").unlink()
    assert generated("both", tiny_sd, run / "checkpoint-000005") == [
        {**row, "lora": row["lora"] and str(run / "checkpoint-000005")} if row["index"] == 1 else row for row in rows
    ]
    unet = lora.network_of(fresh(tmp_path / "merged"))
    assert same(unet.state_dict(), load_file(file_of(run)))
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "fine-tuned on preferences" in card and trained.file_hash(run) in card and "LoRA" not in card


@pytest.mark.parametrize(
    ("to", "options"), [("kohya", {}), ("diffusers", {}), ("merged", {"scale": 0.5})], ids=lambda value: str(value)
)
def test_an_export_as_a_lora_is_refused(tiny_sd, run, tmp_path, to, options):
    with pytest.raises(DiffpoError, match="is a whole network, not a LoRA: export it with --to merged"):
        export.run(export.Export(run, to, str(tiny_sd), tmp_path / "out", **options))


def test_what_does_not_belong_to_the_base_is_refused_before_a_picture_is_made(tiny_sd, run, tmp_path):
    def refused(name, model, match):
        made = Generation(model, lora=run, steps=2, height=16, width=16, device="cpu")
        with pytest.raises(DiffpoError, match=match):
            generate.run(made.arms(), ["a cat"], tmp_path / name)

    refused("a", make_sd(tmp_path / "other", seed=7), "trained from another base model")
    weights = file_of(run)
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    refused("b", tiny_sd, r"cannot read the weights .*truncated")
    weights.unlink()
    refused("c", tiny_sd, "do not fit the model")
    assert not list(tmp_path.glob("?/images/*/*.png"))


def test_sharded_files_are_read_whole(tiny_sd, run):
    """Diffusers splits large networks."""
    folder = trained.find(run)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder)
    expected = output(unet)
    file_of(run).unlink()
    unet.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    pipe = fresh(tiny_sd)
    trained.load_into(pipe, run)
    assert torch.equal(output(pipe.unet), expected)


def test_a_full_disk_keeps_what_was_there(tiny_sd, make_config, run):
    """A real limit of the system, below the size of the weights."""
    import resource

    _, network, _, _ = ready(make_config(tiny_sd, "lora=null"))
    before, limits = trained.file_hash(run), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_of(run).stat().st_size // 2, limits[1]))
    try:
        with pytest.raises(DiffpoError, match=r"cannot write into .*File too large"), disk_errors(run):
            trained.of(network).save(run, None, "unet", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert trained.file_hash(run) == before and not list(run.glob(".*"))
