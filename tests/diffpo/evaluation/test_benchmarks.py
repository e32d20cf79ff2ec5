"""The folder layouts of benchmarks and the results of their official scorers, on small files in those formats."""

import json
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image

from diffpo.cli import app
from diffpo.common.errors import DiffpoError
from diffpo.data.prompt_sets import Entry
from diffpo.evaluation import benchmark_results, benchmarks
from diffpo.evaluation.generation import Generation
from diffpo.evaluation.statistics import win_rate

RECORD = {"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "a photo of two clocks"}


def pictures(folder, prompts, images, size=(4, 4)):
    """{(prompt's number, picture's number): path}, each of another colour."""
    folder.mkdir(exist_ok=True)
    found = {}
    for number in range(prompts):
        for k in range(images):
            found[number, k] = folder / f"{number:05d}_{k}.png"
            Image.new("RGB", size, (10 * number, 50 * k, 100)).save(found[number, k])
    return found


def laid_out(tmp_path, name, entries, images, size=(4, 4)):
    names = benchmarks.LAYOUTS[name].names(entries, images)
    folder = tmp_path / name
    side = benchmarks.lay_out(entries, names, pictures(tmp_path / "made", len(entries), images, size), folder)
    return folder, side, {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_geneval(tmp_path):
    entries = [Entry("a photo of two clocks", "00000", "counting", RECORD), Entry("b", "00001", "colors", {"tag": "x"})]
    folder, _, files = laid_out(tmp_path, "geneval", entries, 4)
    samples = {f"{number:05d}/samples/{k:04d}.png" for number in range(2) for k in range(4)}
    assert files == samples | {"00000/metadata.jsonl", "00001/metadata.jsonl"}
    assert json.loads((folder / "00000/metadata.jsonl").read_text()) == RECORD
    assert Image.open(folder / "00001/samples/0002.png").getpixel((0, 0)) == (10, 100, 100)
    with pytest.raises(DiffpoError, match=r"evaluation_metadata\.jsonl"):
        benchmarks.LAYOUTS["geneval"].names([Entry("a", "00000")], 4)


def test_dpg(tmp_path):
    entries = [Entry("long", "midjourney3"), Entry("longer", "256")]
    folder, side, files = laid_out(tmp_path, "dpg", entries, 4)
    assert files == {"midjourney3.png", "256.png"} and side == 4
    grid = Image.open(folder / "256.png")
    assert grid.size == (8, 8)
    # the order in which compute_dpg_bench.py cuts: left to right, top to bottom
    corners = [grid.getpixel(place) for place in ((0, 0), (4, 0), (0, 4), (4, 4))]
    assert corners == [(10, 50 * k, 100) for k in range(4)]
    with pytest.raises(DiffpoError, match="4 pictures"):
        benchmarks.LAYOUTS["dpg"].names(entries, 3)
    (tmp_path / "wide").mkdir()
    with pytest.raises(DiffpoError, match="square"):
        laid_out(tmp_path / "wide", "dpg", entries, 4, (8, 4))


def test_t2i_compbench(tmp_path):
    entries = [Entry("a red cup", "00000", "color"), Entry("a blue cup", "00001", "color"), Entry("x", "0", "shape")]
    _, _, files = laid_out(tmp_path, "t2i-compbench", entries, 2)
    assert files == {
        "color/samples/a red cup_000000.png",
        "color/samples/a red cup_000001.png",
        "color/samples/a blue cup_000002.png",
        "color/samples/a blue cup_000003.png",
        "shape/samples/x_000000.png",
        "shape/samples/x_000001.png",
    }
    for prompt in ("a/b", "a_b", "x" * 250):
        with pytest.raises(DiffpoError, match="name"):
            benchmarks.LAYOUTS["t2i-compbench"].names([Entry(prompt, "0")], 10)


def test_genai_bench(tmp_path):
    folder, _, files = laid_out(tmp_path, "genai-bench", [Entry("a", "00000"), Entry("b", "01599")], 1)
    assert files == {"00000.jpeg", "01599.jpeg"}
    assert Image.open(folder / "01599.jpeg").format == "JPEG"
    with pytest.raises(DiffpoError, match="one picture"):
        benchmarks.LAYOUTS["genai-bench"].names([Entry("a", "00000")], 2)


def test_what_is_laid_out_is_kept_unless_the_picture_changed(tmp_path):
    entries = [Entry("a", "x"), Entry("b", "y")]
    folder, _, _ = laid_out(tmp_path, "dpg", entries, 4)
    made = pictures(tmp_path / "made", 2, 4)
    names = benchmarks.LAYOUTS["dpg"].names(entries, 4)
    for path in folder.iterdir():
        os.utime(path, ns=(2**62, 2**62))
    benchmarks.lay_out(entries, names, made, folder)
    assert {path.stat().st_mtime_ns for path in folder.iterdir()} == {2**62}
    os.utime(folder / "x.png", ns=(0, 0))  # older than its pictures
    benchmarks.lay_out(entries, names, made, folder)
    assert (folder / "x.png").stat().st_mtime_ns != 0 and (folder / "y.png").stat().st_mtime_ns == 2**62


def test_made_with_a_model_and_continued(tmp_path, tiny_sdxl, capsys):
    prompts = tmp_path / "evaluation_metadata.jsonl"
    prompts.write_text("\n".join(json.dumps(RECORD | {"prompt": prompt}) for prompt in ("two clocks", "a bench")))
    command = f"benchmark geneval --model {tiny_sdxl} --prompts {prompts} --out {tmp_path / 'out'} --steps 1 --n 1"
    app(command.split(), standalone_mode=False)
    folder = tmp_path / "out" / "geneval" / "base"
    assert sorted(path.name for path in folder.iterdir()) == ["00000"]
    sample = folder / "00000" / "samples" / "0003.png"
    assert sample.read_bytes() == (tmp_path / "out" / "images" / "base" / "00000_3.png").read_bytes()
    assert "evaluate_images.py" in capsys.readouterr().out
    before = sample.stat().st_mtime_ns
    app([*command.split()[:-2]], standalone_mode=False)
    assert sample.stat().st_mtime_ns == before and (folder / "00001" / "samples" / "0000.png").is_file()


def test_names_are_checked_before_pictures_are_made(tmp_path):
    (tmp_path / "color_val.txt").write_text("a red/blue cup\n")
    with pytest.raises(DiffpoError, match="red/blue"):
        benchmarks.make("t2i-compbench", Generation("nowhere"), tmp_path / "out", str(tmp_path / "color_val.txt"))
    assert not (tmp_path / "out").exists()


# ---- results


def by_name(results):
    return {score.name: score for score in results.scores}


def test_geneval_results(tmp_path):
    lines = []
    for tag, prompt, corrects in (
        ("single_object", "p0", (1, 1, 1, 1)),
        ("single_object", "p1", (1, 1, 0, 0)),
        ("counting", "p2", (0, 0, 0, 0)),
        ("counting", "p3", (1, 0, 1, 0)),
    ):
        for k, correct in enumerate(corrects):
            lines.append(
                {"filename": f"{prompt}/{k}.png", "tag": tag, "prompt": prompt, "correct": bool(correct)}
                | {"reason": "", "metadata": json.dumps({"prompt": prompt}), "details": "{}"}
            )
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    found = by_name(benchmark_results.read("geneval", tmp_path))
    assert list(found)[:2] == ["single_object", "counting"]
    assert found["single_object"].value == 6 / 8 and found["counting"].value == 2 / 8
    assert found["overall (mean over tasks)"].value == pytest.approx(0.5)
    assert found["pictures"].value == 0.5 and found["pictures"].n == 16
    assert found["prompts with a correct picture"].value == 0.75
    expected = win_rate(np.zeros(8), [1, 1, 1, 1, 1, 1, -1, -1], [0] * 4 + [1] * 4)  # clustered by prompt
    assert (found["single_object"].low, found["single_object"].high) == (expected.low, expected.high)
    for content, words in {'{"tag": "x"}': ":1.*correct", "[]": ":1", "{": ":1.*JSON", "": "no results"}.items():
        (tmp_path / "results.jsonl").write_text(content)
        with pytest.raises(DiffpoError, match=rf"results\.jsonl.*{words}|{words}"):
            benchmark_results.read("geneval", tmp_path / "results.jsonl")


def test_dpg_results(tmp_path):
    (tmp_path / "dpg-bench_20260101-000000_results.txt").write_text(
        "pics/a, b.png, 1.0, 0.5, 0.5, 1.0, 0.75\npics/256.png, 0.25, 0.25, 0.25, 0.25, 0.25\n"
        "Model: pics\nL1 category scores:\n\tentity: 87.5\nL2 category scores:\n\tentity - whole: 90.0\n"
        "Image path: pics\nSave results to: x.txt\nDPG-Bench score: 50.0\n"
    )
    found = by_name(benchmark_results.read("dpg", tmp_path))
    assert {name: score.value for name, score in found.items()} == {
        "entity": 87.5,
        "entity - whole": 90.0,
        "DPG-Bench score": 50.0,
    }
    overall = found["DPG-Bench score"]
    assert overall.n == 2 and overall.high - 50 == pytest.approx(1.959964 * math.sqrt(2 * 25**2 * 2) / 2, rel=1e-5)
    assert found["entity"].low is None
    (tmp_path / "dpg-bench_1_results.txt").write_text("no")
    with pytest.raises(DiffpoError, match=r"dpg-bench_1_results\.txt"):
        benchmark_results.read("dpg", tmp_path / "dpg-bench_1_results.txt")


def test_t2i_compbench_results(tmp_path):
    blip, spatial = (
        tmp_path / "color" / "annotation_blip",
        tmp_path / "spatial" / "labels" / "annotation_obj_detection_2d",
    )
    for folder in (blip, spatial, tmp_path / "color" / "annotation1_blip" / "VQA" / "result"):
        folder.mkdir(parents=True)
        (folder / "vqa_result.json").write_text(json.dumps([{"question_id": 0, "answer": 9}]))
    answers = [{"question_id": k, "answer": f"{value:.4f}"} for k, value in enumerate((0.2, 0.2, 0.6, 0.6))]
    (blip / "vqa_result.json").write_text(json.dumps(answers))
    (spatial / "vqa_result.json").write_text(json.dumps([{"question_id": k, "answer": k} for k in (0, 1)]))
    samples = tmp_path / "color" / "samples"
    samples.mkdir()
    for k, prompt in enumerate(("a red cup", "a red cup", "a blue cup", "a blue cup")):
        (samples / f"{prompt}_{k:06d}.png").write_bytes(b"")
    results = benchmark_results.read("t2i-compbench", tmp_path)
    found = by_name(results)
    assert {name: score.value for name, score in found.items()} == pytest.approx(
        {"color blip": 0.4, "spatial obj_detection_2d": 0.5}
    )
    # two prompts with equal pictures: as two observations of 0.2 and 0.6
    assert found["color blip"].high - 0.4 == pytest.approx(1.959964 * math.sqrt(2 * 2 * 0.4**2) / 4, rel=1e-5)
    assert len(results.notes) == 1  # spatial has no folder samples
    (one,) = benchmark_results.read("t2i-compbench", blip / "vqa_result.json").scores
    assert one.name == "blip" and one.value == pytest.approx(0.4)
    (blip / "vqa_result.json").write_text('{"a": 1}')
    with pytest.raises(DiffpoError, match="question_id"):
        benchmark_results.read("t2i-compbench", tmp_path)


def test_genai_bench_results(tmp_path, capsys):
    scores = torch.tensor([0.1, 0.3, 0.5, 0.9])
    torch.save(scores.reshape(4, 1, 1), tmp_path / "clip-flant5-xxl_1600_prompts.pt")
    skills = {name: [0, 1] for name in benchmark_results._SKILLS} | {"negation": [3], "advanced": [1, 3]}
    (tmp_path / "genai_skills.json").write_text(json.dumps(skills))
    arguments = ["read-benchmark", "genai-bench", str(tmp_path), "--skills", str(tmp_path / "genai_skills.json")]
    app([*arguments, "--out", str(tmp_path / "numbers.json")], standalone_mode=False)
    assert "advanced" in capsys.readouterr().out
    found = {each["name"]: each for each in json.loads((tmp_path / "numbers.json").read_text())["scores"]}
    assert found["basic"]["value"] == pytest.approx(0.2) and found["negation"]["value"] == pytest.approx(0.9)
    assert found["all"]["value"] == pytest.approx(np.mean([0.1, 0.3, 0.9])) and found["all"]["n"] == 3
    skills["basic"] = [7]
    (tmp_path / "genai_skills.json").write_text(json.dumps(skills))
    with pytest.raises(DiffpoError, match=r"4 prompts.*prompt 7"):
        benchmark_results.read("genai-bench", tmp_path, tmp_path / "genai_skills.json")
    with pytest.raises(DiffpoError, match=r"genai_skills\.json"):
        benchmark_results.read("genai-bench", tmp_path)  # offline: the command that fetches it
    (tmp_path / "x_prompts.pt").write_bytes(b"no")
    with pytest.raises(DiffpoError, match=r"x_prompts\.pt"):
        benchmark_results.read("genai-bench", tmp_path / "x_prompts.pt", tmp_path / "genai_skills.json")


def test_results_that_are_not_there(tmp_path):
    for name in benchmarks.LAYOUTS:
        for path in (tmp_path, tmp_path / "missing"):
            with pytest.raises(DiffpoError, match=str(path)):
                benchmark_results.read(name, path, tmp_path / "skills.json")
