"""The two scripts for pipelines of others, as a user would start them."""

import json

import compare_pipelines
import score_pipeline
from on_policy import Brightness


def test_two_pipelines_are_compared(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a\nb\nc")
    compare_pipelines.main(str(tmp_path / "p.txt"), str(tmp_path / "out"), "on_policy:Brightness")
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/*.png")}
    assert len(first) == 13 and (tmp_path / "out" / "eval" / "report.html").is_file()  # 2 x 3 x 2, and the grid
    compare_pipelines.main(str(tmp_path / "p.txt"), str(tmp_path / "out"), "on_policy:Brightness")
    assert all(path.stat().st_mtime_ns == time for path, time in first.items() if path.parent.name != "eval")


def test_a_pipeline_is_scored_once_a_prompt(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join("abcde"))
    out = tmp_path / "scores.jsonl"
    score_pipeline.main(str(tmp_path / "p.txt"), str(out), "on_policy:Brightness", 2)
    whole = out.read_text()
    out.write_text("".join(line + "\n" for line in whole.splitlines()[:3]))
    score_pipeline.main(str(tmp_path / "p.txt"), str(out), "on_policy:Brightness", 2)
    assert out.read_text() == whole
    picture = score_pipeline.picture("e", 4)
    (name, value) = list(json.loads(whole.splitlines()[4]).items())[1]
    assert value == Brightness().score([picture], ["e"])[name][0]
