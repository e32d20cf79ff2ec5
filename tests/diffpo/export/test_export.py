"""Merged pipelines, precisions, cards, uploads, and what is refused."""

import json
from pathlib import Path

import diffusers
import exports
import pytest
import torch
from exports import MAKE, fresh, output
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_sd

from diffpo import cli, models
from diffpo.common import hub
from diffpo.common.errors import DiffpoError
from diffpo.export import export
from diffpo.weights import lora, lora_apply, lora_file


@pytest.mark.parametrize("name", ["sd", "sdxl", *MAKE])
def test_merged_is_the_base_with_the_lora(tiny_folder, trained, tmp_path, name):
    run, network = trained(name)
    export.run(export.Export(run, "merged", str(tiny_folder(name)), tmp_path / "out"))
    pipe = fresh(tmp_path / "out")
    merged = lora.network_of(pipe)
    assert not [key for key in merged.state_dict() if "lora" in key or "base_layer" in key]
    torch.testing.assert_close(output(merged), output(network), rtol=1e-4, atol=1e-4)
    assert (output(lora.network_of(fresh(tiny_folder(name)))) - output(merged)).abs().max() > 1e-2
    said = [path.read_text() for path in (tmp_path / "out").rglob("*.json")]
    assert said and not any("_name_or_path" in text or str(tiny_folder(name)) in text for text in said)
    if name == "dit":
        assert pipe.labels == fresh(tiny_folder(name)).labels != {}


def test_diffusers_is_the_file_from_a_checkpoint_too(tiny_folder, trained, tmp_path):
    run, network = trained("pixart")
    checkpoint = tmp_path / "checkpoint-000005"
    run.rename(checkpoint)
    export.run(export.Export(checkpoint, "diffusers", str(tiny_folder("pixart")), tmp_path / "out"))
    pipe = fresh(tiny_folder("pixart"))
    lora_apply.load_lora(pipe, tmp_path / "out")
    torch.testing.assert_close(output(pipe.transformer), output(network))
    assert lora_file.file_hash(tmp_path / "out") == lora_file.file_hash(checkpoint)


def test_precision_is_as_stored_unless_it_is_asked_for(tiny_sd, trained, tmp_path):
    half = models.load_pipeline(str(tiny_sd), device="cpu")
    half.unet.to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    run, _ = trained("sd")

    def stored(path):
        with safe_open(path, "pt") as file:
            return {file.get_slice(name).get_dtype() for name in file.keys() if not name.endswith("alpha")}

    part = "diffusion_pytorch_model.safetensors"
    export.run(export.Export(run, "merged", str(tmp_path / "half"), tmp_path / "a"))
    assert stored(tmp_path / "a" / "unet" / part) == {"BF16"} and stored(tmp_path / "a" / "vae" / part) == {"F32"}
    export.run(export.Export(run, "merged", str(tmp_path / "half"), tmp_path / "b", dtype="float16"))
    assert stored(tmp_path / "b" / "unet" / part) == stored(tmp_path / "b" / "vae" / part) == {"F16"}
    export.run(
        export.Export(run, "kohya", str(tmp_path / "half"), tmp_path / "c")
    )  # the base's precision is not the LoRA's
    export.run(export.Export(run, "kohya", str(tmp_path / "half"), tmp_path / "d", dtype="bfloat16"))
    assert stored(tmp_path / "c" / "c.safetensors") == {"F32"} and stored(tmp_path / "d" / "d.safetensors") == {"BF16"}
    exact, own = load_file(tmp_path / "c" / "c.safetensors"), load_file(run / lora_file.FILE_NAME)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    key = f"lora_unet_{name.replace('.', '_')}.lora_down.weight"
    assert torch.equal(exact[key], own[f"unet.{name}.lora_A.weight"])


def test_a_full_disk_leaves_nothing(tiny_sd, trained, tmp_path, monkeypatch):
    run, _ = trained("sd")

    def full(pipe, folder):
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "save_pretrained", full)
    with pytest.raises(DiffpoError, match=r"out: the disk is full.*--out"):
        export.run(export.Export(run, "merged", str(tiny_sd), tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_bad_input_is_said_before_anything_is_loaded(tiny_sd, trained, tmp_path, monkeypatch):
    run, _ = trained("sd")
    monkeypatch.setattr(models, "load_pipeline", lambda *args, **options: pytest.fail("loaded"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    spoilt, foreign = tmp_path / "spoilt", tmp_path / "foreign"
    for each, change in ((spoilt, lambda k, v: (k, v / 0)), (foreign, lambda k, v: (f"text_encoder.{k}", v))):
        each.mkdir()
        state = load_file(run / lora_file.FILE_NAME)
        save_file(dict(change(*item) for item in state.items()), each / lora_file.FILE_NAME)
    for source, to, out, options, said in (
        (run, "merged", "full", {}, "is not empty"),
        (run, "kohya", "x.safetensors", {}, "--out is a folder"),
        (run, "diffusers", "x", {"dtype": "float16"}, "leave --dtype out"),
        (tmp_path, "kohya", "x", {}, "there is no LoRA at"),
        (spoilt, "kohya", "x", {}, "is not finite"),
        (foreign, "kohya", "x", {}, "adapts text encoders"),
        (run, "merged", "x", {"results": tmp_path / "run"}, r"summary\.json .*run.*diffpo eval"),
        (run, "merged", "x", {"push": "nobody"}, "--push .*OWNER/NAME"),
    ):
        with pytest.raises(DiffpoError, match=said):
            export.run(export.Export(source, to, str(tiny_sd), tmp_path / out, **options))


def test_a_lora_of_another_base_is_refused(trained, tmp_path):
    run, _ = trained("sd")
    other = make_sd(tmp_path / "other", seed=7)
    with pytest.raises(DiffpoError, match="trained on another base model: me/base"):
        export.run(export.Export(run, "merged", str(other), tmp_path / "out"))


def results_of(folder, lora_hash):
    """What `diffpo eval` leaves, as far as the card reads it."""
    numbers = {"value": 0.25, "low": 0.125, "high": 0.375}
    row = {"scorer": "pickscore", "base": 20.5, "tuned": 20.75, "difference": numbers, "n": 64, "training_signal": "no"}
    folder.mkdir()
    summary = {"rows": [row | {"win_rate": {"value": 0.625, "low": 0.5, "high": 0.75}}], "prompts": 32}
    (folder / "summary.json").write_text(json.dumps(summary))
    picture = {"arm": "tuned", "index": 0, "seed": 0, "prompt": "a", "lora_hash": lora_hash}
    picture |= {"file": "images/tuned/00000_0.png"}
    picture |= {"steps": 20, "solver": "unipc", "guidance": 5.0, "dtype": "float32", "lora": "L"}
    (folder / "manifest.jsonl").write_text(json.dumps(picture) + "\n")
    return folder


def test_the_card_tells_how_it_was_made_and_measured(tiny_sd, trained, tmp_path):
    run, _ = trained("sd")
    lines = [{"step": step, "rewards/accuracies": step / 10} for step in range(1, 8)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = results_of(tmp_path / "results", lora_file.file_hash(run))
    export.run(export.Export(run, "kohya", str(tiny_sd), tmp_path / "out", results=results))
    card = (tmp_path / "out" / "README.md").read_text()
    for words in (
        'base_model: "me/base"\nbase_model_relation: adapter',
        "with ipo (beta 250), 5 updates of 8 groups (40 in all, data d4t4",
        "| rewards/accuracies | 0.3 |",  # steps 1 to 5
        "| pickscore | 20.5 | 20.75 | +0.25 (0.125 to 0.375) | 62.5% (50.0% to 75.0%) | 64 | no |",
        "32 prompts, 20 steps of unipc, guidance 5, float32.",
        "`out.safetensors`",
        lora_file.file_hash(run),
    ):
        assert words in card, words
    assert "\nlicense" not in card and str(tmp_path) not in card
    another = results_of(tmp_path / "another", "0" * 64)
    with pytest.raises(DiffpoError, match="another LoRA"):
        export.run(export.Export(run, "kohya", str(tiny_sd), tmp_path / "b", results=another))


class Api:
    """Stands for huggingface_hub.HfApi; ``fails`` names the call that does not get through."""

    fails, calls = "", []

    def _call(self, name, **told):
        if name == Api.fails:
            raise ConnectionError("no route to host")
        Api.calls.append((name, told))

    def whoami(self):
        self._call("whoami")

    def create_repo(self, repository, **told):
        self._call("create_repo", repository=repository, **told)

    def upload_folder(self, **told):
        self._call("upload_folder", **told)


def test_push(tiny_sd, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    run, _ = trained("sd")
    export.run(export.Export(run, "diffusers", str(tiny_sd), tmp_path / "a", push="me/style"))
    assert [name for name, _ in Api.calls] == ["whoami", "create_repo", "upload_folder"]
    assert Api.calls[1][1] == {"repository": "me/style", "private": True, "exist_ok": True}
    assert Api.calls[2][1]["folder_path"] == str(tmp_path / "a") and Api.calls[2][1]["repo_id"] == "me/style"
    Api.fails = "whoami"
    with pytest.raises(DiffpoError, match=r"cannot upload to me/style: no route to host. Nothing was written.*log in"):
        export.run(export.Export(run, "diffusers", str(tiny_sd), tmp_path / "b", push="me/style"))
    assert not (tmp_path / "b").exists()
    Api.fails = "upload_folder"
    with pytest.raises(DiffpoError, match=r"out.*b is complete.*`hf upload me/style "):
        export.run(export.Export(run, "diffusers", str(tiny_sd), tmp_path / "b", push="me/style"))
    assert (tmp_path / "b" / lora_file.FILE_NAME).is_file()


def test_nobody_is_logged_in_without_a_network(monkeypatch):
    """The real client, which may not reach anything here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(DiffpoError, match="cannot upload to me/style"):
        hub.client("me/style")


def test_the_command_line_hands_its_options_on(monkeypatch):
    asked = []
    monkeypatch.setattr(export, "run", asked.append)
    words = "--lora a --to single --model b --model-config g --family m:F --out c --dtype bfloat16 --scale 0.5"
    monkeypatch.setattr("sys.argv", ["diffpo", "export", *words.split(), "--results", "d", "--push", "e/f"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    more = {"model_config": "g", "family": "m:F", "dtype": "bfloat16", "scale": 0.5, "push": "e/f"}
    assert end.value.code == 0 and asked == [export.Export("a", "single", "b", Path("c"), results=Path("d"), **more)]


def test_a_style_from_elsewhere_is_merged_with_its_text_encoder(tiny_sdxl, tmp_path):
    """W + scale B A, in the UNet and in the text encoder, by whatever versions of transformers and peft."""
    expected, base = (models.load_pipeline(str(tiny_sdxl), device="cpu") for _ in range(2))
    tensors, draw = {}, torch.Generator().manual_seed(0)
    for part, end in (("unet", "attn2.to_q"), ("text_encoder", "self_attn.q_proj")):
        for name, module in getattr(expected, part).named_modules():
            if name.endswith(end):
                down, up = (0.3 * torch.randn(shape, generator=draw) for shape in ((2, module.in_features), (16, 2)))
                name = (
                    name if part == "unet" else f"text_model.{name.removeprefix('text_model.')}"
                )  # as it is published
                tensors |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
                module.weight.data += 0.5 * up @ down
    save_file(tensors, tmp_path / lora_file.FILE_NAME, {"format": "pt"})
    made = export.run(export.Export(tmp_path, "merged", str(tiny_sdxl), tmp_path / "styled", scale=0.5))
    found = models.load_pipeline(str(made), device="cpu")
    with torch.no_grad():
        ours, theirs, before = (each.encode_prompt("a cat", device="cpu")[0] for each in (found, expected, base))
        torch.testing.assert_close(ours, theirs)
        assert (ours - before).abs().max() > 1e-3
        ours, theirs, before = (each.unet(**exports.inputs(each.unet)).sample for each in (found, expected, base))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert (ours - before).abs().max() > 1e-3


def test_a_merge_of_kohyas_file_is_that_of_the_lora_itself(tiny_sdxl, tmp_path):
    exports.train(tiny_sdxl, tmp_path / "run")
    kohya = export.run(export.Export(tmp_path / "run", "kohya", str(tiny_sdxl), tmp_path / "kohya"))
    file = next(kohya.glob("*.safetensors"))
    one, other = (
        models.load_pipeline(
            str(export.run(export.Export(lora, "merged", str(tiny_sdxl), tmp_path / f"merged-{i}"))), device="cpu"
        ).unet
        for i, lora in enumerate((tmp_path / "run", file))
    )
    for (name, ours), theirs in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_the_scale_is_of_merging_alone(tiny_sdxl, tmp_path):
    exports.train(tiny_sdxl, tmp_path / "run")
    with pytest.raises(DiffpoError, match=r"--scale .* --to merged"):
        export.run(export.Export(tmp_path / "run", "kohya", str(tiny_sdxl), tmp_path / "out", scale=0.5))
