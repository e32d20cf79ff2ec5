import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from noisy_arms import CAPTIONS, compare
from PIL import Image
from scipy import stats

from diffpo import shapes
from diffpo.common.errors import DiffpoError
from diffpo.evaluation import evaluate, table
from diffpo.evaluation.generation import Generation


def test_folders_of_images_become_a_table_and_files(folder, capsys):
    result = compare(folder, train_scorer="shapes.total")
    appearance = result.row("shapes.appearance")
    expected = {
        arm: [
            shapes.score(Image.open(folder / "images" / arm / f"{i:05d}_0.png"), caption)["appearance"]
            for i, caption in enumerate(CAPTIONS)
        ]
        for arm in ("base", "tuned")
    }
    difference = np.subtract(expected["tuned"], expected["base"])
    assert appearance.base == pytest.approx(np.mean(expected["base"]))
    assert appearance.difference.value == pytest.approx(difference.mean())
    assert appearance.difference.low > 0 and (difference > 0).all()
    wilson = stats.binomtest(12, 12).proportion_ci(method="wilson")
    assert (appearance.win_rate.value, appearance.win_rate.low) == (1, pytest.approx(wilson.low))

    assert result.primary == result.verdict.score == "shapes.following"  # the first that was not trained on
    signals = {row.scorer: row.training_signal for row in result.rows}
    assert (signals["shapes.total"], signals["shapes.following"]) == ("yes", "same scorer")

    stored = pq.read_table(folder / "eval" / "scores.parquet").to_pandas()
    assert list(stored.columns) == ["prompt_id", "seed", "arm", "scorer", "value"]
    stored = stored[(stored.scorer == "shapes.appearance") & (stored.arm == "base")].sort_values("prompt_id").value
    np.testing.assert_allclose(stored, expected["base"])
    summary = json.loads((folder / "eval" / "summary.json").read_text())
    assert summary["rows"][0]["scorer"] == "shapes.total" and summary["pairs"] == 12 and len(summary["worst"]) == 5
    assert summary["best"][0]["difference"] == max(e["difference"] for e in result.by_prompt["tuned"])
    for name in ("grid.png", "report.html"):
        assert (folder / "eval" / name).stat().st_size > 1000
    table.show(result)
    printed = capsys.readouterr().out
    for row in result.rows:
        assert row.scorer in printed and f"{row.base:.4f}" in printed
    assert result.by_prompt["tuned"][-1]["prompt"] in printed


def test_relation_counts_only_the_prompts_that_have_one(folder):
    assert compare(folder).row("shapes.right_relation").n == 8


def test_identical_arms_are_a_draw(folder):
    for path in (folder / "images" / "base").iterdir():
        (folder / "images" / "tuned" / path.name).write_bytes(path.read_bytes())
    result = compare(folder)
    for row in result.rows:
        assert row.win_rate.value == 0.5
        assert (row.difference.value, row.difference.low, row.difference.high) == (0, 0, 0)
    assert result.diversity["base"] == result.diversity["tuned"] > 0


def test_seeds_of_a_prompt_are_one_cluster(folder):
    for arm in ("base", "tuned"):
        for path in sorted((folder / "images" / arm).iterdir()):
            path.with_name(path.name.replace("_0", "_1")).write_bytes(path.read_bytes())
    row = compare(folder).row("shapes.appearance")
    assert row.n == 24 and row.win_rate.low == pytest.approx(
        stats.binomtest(12, 12).proportion_ci(method="wilson").low
    )  # the copies add nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scorers": ("shape",)}, "shapes"),
        ({"scorers": ()}, "--scorers"),
        ({"train_scorer": "shapes.totl"}, "shapes.total"),
        ({"train_scorer": "pikscore"}, "pickscore"),
    ],
)
def test_scorers_that_there_are_not(folder, options, message):
    with pytest.raises(DiffpoError, match=message):
        compare(folder, **options)


def test_what_is_not_given_is_named(folder, tiny_sd):
    with pytest.raises(DiffpoError, match="--prompts"):
        evaluate.run(folder / "eval", folder)
    with pytest.raises(DiffpoError, match=r"--model.*--images"):
        Generation(None)
    with pytest.raises(DiffpoError, match="--lora"):
        evaluate.run(folder / "eval", Generation(tiny_sd), CAPTIONS)
    with pytest.raises(DiffpoError, match="--prompts"):
        evaluate.run(folder / "eval", Generation(tiny_sd, lora="lora.safetensors"))


def test_n_takes_the_first_prompts(folder):
    result = compare(folder, n=4)
    assert [item.index for item in result.items] == [0, 1, 2, 3]


def test_folders_that_are_not_there(folder, tmp_path):
    with pytest.raises(DiffpoError, match=r"there is no folder .*nowhere"):
        compare(tmp_path / "nowhere")
    with pytest.raises(DiffpoError, match=r"nowhere.*metrics\.jsonl"):
        evaluate.training_run(tmp_path / "nowhere", None)


def test_the_training_curves_are_of_the_run_that_is_named_or_of_the_lora(folder, tmp_path):
    for name in ("run", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    assert evaluate.training_run(tmp_path / "run", str(tmp_path / "other")) == tmp_path / "run"
    assert evaluate.training_run(None, str(tmp_path / "other")) == tmp_path / "other"
    assert evaluate.training_run(None, str(tmp_path / "other" / "lora.safetensors")) == tmp_path / "other"
    assert evaluate.training_run(None, None) is None
    compare(folder)
    plain = (folder / "eval" / "report.html").read_text()
    compare(folder, run_folder=tmp_path / "run")
    assert plain.count("<svg") + 1 == (folder / "eval" / "report.html").read_text().count("<svg")


def test_pictures_of_any_suffix_are_compared_in_either_arm(folder, capsys):
    expected = compare(folder).row("shapes.appearance")
    for path in sorted((folder / "images" / "tuned").iterdir())[:6]:
        with Image.open(path) as image:
            image.save(path.with_suffix(".webp"), lossless=True)
            image.convert("RGBA").save(path.with_suffix(".TIF"), "TIFF")
        path.unlink()
        path.with_suffix(".TIF" if path.name < "00003" else ".webp").unlink()
    (folder / "images" / "tuned" / "notes.txt").write_text("x")
    (folder / "images" / "base" / ".DS_Store").write_text("x")
    capsys.readouterr()
    assert compare(folder).row("shapes.appearance") == expected
    said = capsys.readouterr().out
    assert "images/tuned: passed over 1 file: notes.txt" in said and "base: passed over 1 file: .DS_Store" in said


def test_two_pictures_of_one_prompt_and_seed_are_refused(folder):
    twin = folder / "images" / "base" / "3_0.jpg"
    twin.write_bytes((folder / "images" / "base" / "00003_0.png").read_bytes())
    with pytest.raises(DiffpoError, match=r"00003_0\.png and .*3_0\.jpg are the same prompt and seed"):
        compare(folder)


def test_a_picture_that_needs_a_package_is_named(folder, capsys):
    path = folder / "images" / "tuned" / "00003_0.png"
    path.unlink()
    path.with_suffix(".heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    assert compare(folder).row("shapes.total").n == 11
    assert re.search(r"tuned/00003_0\.heic", capsys.readouterr().out)


def test_transparency_lies_on_white_and_photos_stand_upright(folder, capsys):
    expected = compare(folder).row("shapes.appearance")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    for path in (folder / "images" / "base").iterdir():
        with Image.open(path) as image:
            layered = image.convert("RGBA")
        white = Image.new("RGB", layered.size, "white")
        alpha = Image.composite(Image.new("L", white.size), Image.new("L", white.size, 255), _whites(layered))
        layered.paste((9, 9, 9), mask=_whites(layered))  # what was white hides another colour
        layered.putalpha(alpha)
        layered.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    assert compare(folder).row("shapes.appearance") == expected
    assert "7 with transparent pixels" in capsys.readouterr().out


def _whites(image):
    return Image.fromarray(np.where((np.asarray(image)[..., :3] == 255).all(-1), 255, 0).astype(np.uint8))


def test_a_manifest_names_no_picture_elsewhere(folder, tmp_path):
    for file in ("/etc/passwd", "../other/0.png"):
        line = json.dumps({"arm": "base", "index": 0, "seed": 0, "prompt": "x", "file": file})
        (folder / "manifest.jsonl").write_text(f"{line}\n{line}\n")
        with pytest.raises(DiffpoError, match=r"manifest\.jsonl:1 is not a manifest line"):
            evaluate.run(folder / "eval", folder)


def test_the_shapes_scorer_refuses_foreign_prompts_before_pictures_are_made(tmp_path, tiny_sd):
    lora = Generation(tiny_sd, lora="nowhere.safetensors")
    with pytest.raises(DiffpoError, match=r"prompts of the embedded world only.*'a cat'"):
        evaluate.run(tmp_path / "eval", lora, ["a cat"])
    assert not (tmp_path / "eval").exists()


def test_a_name_that_no_arm_can_have_is_refused_before_pictures_are_made(tmp_path, tiny_sd):
    arms = {"base": Generation(tiny_sd), "round 1": Generation(tiny_sd)}
    with pytest.raises(DiffpoError, match="'round 1'"):
        evaluate.run(tmp_path / "eval", arms, ["a red circle on a white background"])
    assert not (tmp_path / "eval").exists()
