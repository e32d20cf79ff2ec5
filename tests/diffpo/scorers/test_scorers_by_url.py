"""Wherever a scorer can be named, the URL of a server can."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from http_scorers import PROMPTS, Both, pictures, served
from on_policy import Brightness
from safetensors.torch import load_file
from tiny import metrics_of

from diffpo import scorers
from diffpo.common.errors import DiffpoError
from diffpo.evaluation import evaluate
from diffpo.evaluation.scoring import Scoring
from diffpo.scorers.judge import Judge
from diffpo.scorers.step import base, load
from diffpo.train.loop import train


@pytest.fixture(scope="module")
def images():
    return pictures()


def test_a_url_is_split_without_torch_and_without_a_server():
    parsed = scorers.parse("http://127.0.0.1:8000/shapes.total")
    assert parsed == ("http://127.0.0.1:8000", None, "shapes.total")
    assert scorers.parse("http://gpu-2:8000/") == ("http://gpu-2:8000", None, None)
    assert scorers.parse("https://[::1]/a_b-c") == ("https://[::1]", None, "a_b-c")
    assert not base.is_folder("http://127.0.0.1:8000/shapes.total") and load.needs_vae("http://h:1/a")
    code = "import sys, diffpo.commands.check as c; c.scorers.parse('http://h:1/a'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(
    "spec",
    "http:// http://h:x http://h:99999 http://h:0 http://u:p@h http://h/a/b http://h?a http://[::1 http://h/a=b "
    "http://h\th http://h/a#b http:///a".split(" "),
)
def test_what_is_no_url_of_a_scorer_is_said(spec):
    for each in (scorers.parse, scorers.load):
        with pytest.raises(DiffpoError, match=r"not the URL of a scorer: write http://HOST:PORT"):
            each(spec)


def test_the_judge_asks_a_server_once_for_all_its_numbers(images):
    scorer = Both()
    with served(scorer) as server, served(Brightness()) as other:
        judge = Judge([f"{server.url}/both.long", other.url, f"{server.url}/both.mean"])
        assert judge.names == ["both.long", "shapes.total", "both.mean"]
        found = judge.scores(images, PROMPTS)
        assert scorer.batches == [7]
        local = Both().score(images, PROMPTS)
        expected = [
            np.nan_to_num(local["both.long"]),
            Brightness().score(images, [])["shapes.total"],
            local["both.mean"],
        ]
        assert torch.equal(found, torch.tensor(np.stack(expected, 1)))
        with pytest.raises(DiffpoError, match=rf"both.mean, both.long; choose one, as in {server.url}/both.mean"):
            Judge([server.url])
        with pytest.raises(DiffpoError, match=f"{server.url} gives no number 'both.meen': did you mean both.mean"):
            Judge([f"{server.url}/both.meen"])
        with pytest.raises(DiffpoError, match=f"{server.url} gives no number 'both.meen': did you mean both.mean"):
            scorers.load(f"{server.url}/both.meen")


def test_eval_takes_a_url(images, tmp_path):
    for arm, shift in (("base", 0), ("tuned", 3)):
        (tmp_path / "images" / arm).mkdir(parents=True)
        for i in range(4):
            images[(i + shift) % 7].save(tmp_path / "images" / arm / f"{i:05d}_0.png")
    given = {"arms": tmp_path, "prompts": ["a", "b", "c", "d"]}
    with served(Brightness(), max_images=3) as server:
        found = evaluate.run(tmp_path / "out", scoring=Scoring((server.url,), "shapes.total"), **given)
        with pytest.raises(DiffpoError, match=r"two of the scorers give the number 'shapes\.total'"):
            evaluate.run(tmp_path / "two", scoring=Scoring(("shapes", f"{server.url}/shapes.total")), **given)
    row = found.row("shapes.total")
    assert row.training_signal == "yes"
    assert row.tuned == Brightness().score([images[(i + 3) % 7] for i in range(4)], [])["shapes.total"].mean()


@pytest.mark.parametrize("objective", ["d3po", "spo"])
def test_training_with_a_remote_scorer_equals_training_with_the_local_one(
    tiny_sdxl, make_config, tmp_path, monkeypatch, objective
):
    def run(name, spec):
        options = [
            f"objective.name={objective}",
            "objective.beta=500",
            "data.train=null",
            "data.prompts=shapes:train:6",
        ]
        options += ["objective.rollout.prompts=4", "objective.rollout.steps=4", "objective.rollout.guidance=1"]
        if objective == "spo":
            options += [f"objective.rollout.step_scorer={spec}", "objective.rollout.start=2"]
            options += ["objective.rollout.pool=3", "objective.rollout.threshold=0"]
        else:
            options += [f"objective.rollout.scorers=[{spec}]"]
        output = tmp_path / name
        config = make_config(tiny_sdxl, *options, "train.steps=2", "train.batch_size=2", f"output={output}")
        return load_file(train(config)), metrics_of(output)

    with served(Brightness(), max_images=3) as server:
        weights, metrics = run("remote", f"{server.url}/shapes.total")
    monkeypatch.setattr("diffpo.scorers.judge.scorers.load", lambda spec, device: Brightness())
    local_weights, local_metrics = run("local", "shapes.total")
    for ours, theirs in zip(metrics, local_metrics, strict=True):
        assert {k: v for k, v in ours.items() if k not in ("time", "pairs_per_second")} == {
            k: v for k, v in theirs.items() if k not in ("time", "pairs_per_second")
        }
    assert metrics[-1]["rewards/margins"] != 0 and "rollout/score" in metrics[0]
    assert all(torch.equal(weights[name], value) for name, value in local_weights.items())
