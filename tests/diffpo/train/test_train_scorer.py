"""`diffpo train-scorer`: the loss, the noise, learning, resuming, measuring."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from step_scorers import family_of, inputs
from tiny import metrics_of

from diffpo import models
from diffpo.common.errors import DiffpoError
from diffpo.config import Model, ScorerConfig, ScorerTrain, load_config
from diffpo.models.sd import StableDiffusion
from diffpo.problems.policy import Policy
from diffpo.scorers.step import load
from diffpo.train import checkpoint, step_heldout
from diffpo.train.claim import check_folder
from diffpo.train.step_scorer import load_data, preference_loss, train_scorer


def test_the_loss_is_least_and_zero_at_the_labels_own_odds():
    preference = torch.tensor([0.5, 0.8, 1.0], dtype=torch.float64)
    odds = torch.tensor([0.0, math.log(4), 40.0], dtype=torch.float64).requires_grad_()
    loss = preference_loss(odds, torch.zeros(3, dtype=torch.float64), preference)
    torch.testing.assert_close(loss.detach(), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    (slope,) = torch.autograd.grad(loss.sum(), odds)
    torch.testing.assert_close(slope, torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    zero = torch.zeros(1, dtype=torch.float64)
    assert preference_loss(zero, zero, torch.ones(1, dtype=torch.float64)).item() == pytest.approx(math.log(2))
    # swapping the images and the label changes nothing
    swapped = preference_loss(-odds, torch.zeros(3, dtype=torch.float64), 1 - preference)
    torch.testing.assert_close(swapped, loss)


# ---- training, saving, loading


@pytest.mark.parametrize("kind", ["latent", "pixel"])
def test_a_scorer_learns_its_pairs_is_saved_and_scores_the_same_when_loaded(
    kind, tiny_sdxl, tiny_clip, make_scorer_config, tmp_path, monkeypatch
):
    def average(self, pixels):  # a random VAE's own posterior is nearly all noise
        mean = torch.nn.functional.avg_pool2d(pixels, 2).mean(1, keepdim=True).repeat(1, 4, 1, 1)
        return {"mean": mean, "logvar": torch.full_like(mean, -20.0)}

    monkeypatch.setattr(StableDiffusion, "encode_image", average)
    pixel = ["scorer.kind=pixel", f"scorer.clip={tiny_clip}", "scorer.guidance=3"]
    common = ["train.steps=40", "train.batch_size=8", "train.lr=3e-3", "scorer.times=clean", f"data.cache={tmp_path}"]
    config = make_scorer_config(tiny_sdxl, *common, *(pixel if kind == "pixel" else []))
    folder = train_scorer(config)
    losses = [line["loss"] for line in metrics_of(folder)]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])
    assert not checkpoint.folders(folder) and not list(folder.glob("*.pt"))
    about = json.loads((folder / "scorer.json").read_text())
    assert about["kind"] == kind and [line["times"] for line in about["held_out"]][:2] == ["clean", "0-199"]
    assert about["held_out"][0]["accuracy"][0] == 1.0 and about["held_out"][0]["pairs"] == 8  # ties are left out

    assert load.needs_vae(str(folder)) == (kind == "pixel")
    family, unet = family_of(tiny_sdxl)
    x_t, x_0, t, captions, cond = inputs(family)
    scorer = load.load(str(folder), family, unet)
    scores = scorer.score(x_t, x_0, t, captions, cond)
    assert scores.shape == (3,) and scores.dtype == torch.float32 and not scores.requires_grad
    one = [
        scorer.score(
            x_t[i : i + 1],
            x_0[i : i + 1],
            t[i : i + 1],
            captions[i : i + 1],
            {k: v[i : i + 1] for k, v in cond.items()},
        )
        for i in range(3)
    ]
    torch.testing.assert_close(scores, torch.cat(one), rtol=1e-4, atol=1e-4)
    with pytest.raises(DiffpoError, match="finished"):
        train_scorer(config)
    with pytest.raises(DiffpoError, match="'cat 1'"):
        x_t[1] = x_0[1] = float("nan")
        load.load(str(folder), family, unet).score(x_t, x_0, t, captions, cond)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tiny_sd, make_scorer_config, tmp_path, monkeypatch):
    whole = train_scorer(make_scorer_config(tiny_sd, f"output={tmp_path / 'whole'}"))
    config = make_scorer_config(tiny_sd, f"output={tmp_path / 'cut'}")

    from diffpo.train import step_scorer as verb

    real, calls = verb.accuracy, []

    def stopping(margins):
        calls.append(1)
        if len(calls) == 4:  # in the last update, after the state of step 2 was saved
            raise KeyboardInterrupt
        return real(margins)

    monkeypatch.setattr(verb, "accuracy", stopping)
    with pytest.raises(KeyboardInterrupt):
        train_scorer(config)
    assert [each.name for each in checkpoint.folders(config.output)] == ["checkpoint-000002"]
    monkeypatch.setattr(verb, "accuracy", real)
    other = make_scorer_config(tiny_sd, f"output={tmp_path / 'cut'}", "train.lr=1e-3")
    for text in (other.to_yaml(), "a: [", None):  # whatever config.yaml says, the state's own settings decide
        (config.output / "config.yaml").write_text(text) if text else (config.output / "config.yaml").unlink()
        with pytest.raises(DiffpoError, match=r"train\.lr: 0\.01 there, 0\.001 here"):
            train_scorer(other)
    moved = shutil.copy(config.data.train, tmp_path / "moved.parquet")
    config = make_scorer_config(tiny_sd, f"output={tmp_path / 'cut'}", f"data.train={moved}")
    train_scorer(config)
    assert load_config(config.output / "config.yaml", kind=ScorerConfig) == config
    assert (config.output / "head.safetensors").read_bytes() == (whole / "head.safetensors").read_bytes()
    assert [line["step"] for line in metrics_of(config.output)] == [1, 2, 3, 4]
    assert not checkpoint.folders(config.output)


def test_a_scorer_does_not_resume_on_other_pairs(tiny_sd, make_scorer_config, tmp_path):
    origin = {"base": {}, "data_hash": "of other pairs", "pairs_per_update": 4}
    config = make_scorer_config(tiny_sd)
    settings = {"settings": config.model_dump(mode="json")}
    checkpoint.save(config.output, 2, lambda folder: None, {}, {**origin, **settings}, keep=1)
    with pytest.raises(DiffpoError, match=rf"cannot resume {config.output}/checkpoint-000002: .*of other pairs there"):
        train_scorer(config)


def test_a_scorer_and_a_lora_do_not_share_a_folder(tiny_sd, make_scorer_config, make_config, tmp_path):
    origin = {"base": {}, "data_hash": "d", "pairs_per_update": 4}
    lora, scorer = (make(tiny_sd, f"output={tmp_path / 'run'}") for make in (make_config, make_scorer_config))
    for theirs, ours, command in ((lora, scorer, "train"), (scorer, lora, "train-scorer")):
        settings = {"settings": theirs.model_dump(mode="json")}
        checkpoint.save(tmp_path / "run", 2, lambda folder: None, {}, {**origin, **settings}, keep=1)
        with pytest.raises(DiffpoError, match=f"checkpoint-000002.* a run of `diffpo {command}`"):
            check_folder(ours)
        check_folder(theirs)


def test_what_older_versions_saved_of_a_scorer_is_refused_with_the_reason(tiny_sd, make_scorer_config, tmp_path):
    """They kept one file of weights and optimiser, without hashes."""
    (tmp_path / "old").mkdir()
    config = make_scorer_config(tiny_sd, f"output={tmp_path / 'old'}")
    torch.save({"step": 2, "settings": "[]", "module": {}}, tmp_path / "old" / "unfinished.pt")
    (tmp_path / "old" / "config.yaml").write_text(config.to_yaml())
    with pytest.raises(DiffpoError, match=r"unfinished\.pt .*older version"):
        train_scorer(config)
    assert sorted(path.name for path in (tmp_path / "old").iterdir()) == ["config.yaml", "unfinished.pt"]


def test_both_images_of_a_pair_get_the_same_noise_and_time(tiny_sd, make_scorer_config):
    from diffpo.train.step_scorer import load_data

    family = models.load(Model(path=str(tiny_sd)))
    batches, _ = load_data(make_scorer_config(tiny_sd), family, "cpu")
    batch = batches.batch([0, 1, 2], [5, 6, 7])
    problem = step_heldout.noised(family, batches, batch, clean=False)
    alpha, sigma = family.alpha_sigma(problem.t)
    noise = (problem.x_t - alpha * batch.x_0) / sigma
    torch.testing.assert_close(noise[:3], noise[3:], atol=1e-3, rtol=0)
    assert problem.t[:3].tolist() == problem.t[3:].tolist() and len(set(problem.t.tolist())) > 1
    assert torch.equal(step_heldout.noised(family, batches, batch, clean=True).x_t, batch.x_0)


def test_held_out_accuracy_is_counted_pair_by_pair(tiny_sd, make_scorer_config, monkeypatch):
    """A scorer that is always right, and one that is right at clean pictures only."""

    class Told:
        def __init__(self, noisy):
            self.noisy = noisy

        def score(self, x_t, x_0, t, captions, cond):
            n = len(t) // 2
            right = torch.where(t > 0, self.noisy, 1.0)
            return torch.cat([right[:n], torch.zeros(n)])

    family = models.load(Model(path=str(tiny_sd)))
    _, validation = load_data(make_scorer_config(tiny_sd), family, "cpu")
    told = {"right": Told(1.0), "blind": Told(-1.0)}
    settings = ScorerTrain(steps=1, lr=1e-3, batch_size=4, eval_pairs=6, eval_draws=2)
    policy = Policy(family, family.load_network())
    lines = step_heldout.measure(told, validation, policy, 1.0, settings)
    assert [line["times"] for line in lines[::2]] == ["clean", "0-199", "200-399", "400-599", "600-799", "800-999"]
    for right, blind in zip(lines[::2], lines[1::2], strict=True):
        assert right["pairs"] == 6 and right["accuracy"][0] == 1.0
        clean = right["times"] == "clean"
        assert blind["accuracy"][0] == clean and blind["first_minus"] == [1.0 - clean] * 3
    assert "| clean | 100.0 % [" in step_heldout.table(lines) and "+100.0 [+100.0, +100.0]" in step_heldout.table(lines)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scorer.kind=pixel", r"scorer\.clip is the CLIP"),
        ("scorer.clip=x", r"scorer\.clip is the CLIP"),
        ("scorer.guidance=3", "guidance"),
        ("data.caption_dropout=0.1", "caption_dropout"),
        ("data.validation=null", "validation"),
        ("scorer.tims=all", "did you mean scorer.times"),
    ],
)
def test_settings_that_make_no_sense_are_refused(override, message, tiny_sd, make_scorer_config):
    with pytest.raises(DiffpoError, match=message):
        make_scorer_config(tiny_sd, override)


def test_a_score_may_label_the_training_pairs(tiny_sd, make_scorer_config, monkeypatch):
    class Darkness:
        names, optional = ("shapes.total",), frozenset()

        def score(self, images, prompts):
            return {"shapes.total": np.array([-np.asarray(image).mean() for image in images])}

    monkeypatch.setattr("diffpo.scorers.judge.scorers.load", lambda spec, device: Darkness())
    config = make_scorer_config(tiny_sd, "scorer.labels=shapes.total")
    people, _ = load_data(make_scorer_config(tiny_sd), models.load(config.model), torch.device("cpu"))
    training, held_out = load_data(config, models.load(config.model), torch.device("cpu"))
    assert held_out.groups.data_hash == people.groups.data_hash, "people judge what is measured on"
    turned = {group.row: group.images[::-1] for group in people.groups.groups if group.preference == 1}
    ours = {group.row: group.images for group in training.groups.groups}
    assert turned and all(ours[row] == images for row, images in turned.items())
