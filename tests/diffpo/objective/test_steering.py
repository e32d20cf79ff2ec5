"""Weights of several rewards: drawn in training, given at generation."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import metrics_of, pick_a_pic_rows, write_parquet

from diffpo import links
from diffpo.common.errors import DiffpoError
from diffpo.common.rng import Draws
from diffpo.evaluation import generate
from diffpo.evaluation.generation import Generation
from diffpo.objective import steering
from diffpo.objective.users import shares
from diffpo.train.loop import train
from diffpo.weights import lora_file

GAPS = torch.tensor([[1.0, -10.0], [2.0, 30.0], [-2.0, 10.0], [1.0, 0.0]])


def test_weights_are_uniform_on_the_simplex_and_stand_at_their_address():
    one = steering.Steering(["a", "b", "c"], torch.randn(5, 3))
    found = one.weights(Draws(0, "train", range(4000)))
    torch.testing.assert_close(found.sum(1), torch.ones(4000))
    assert (found >= 0).all()
    torch.testing.assert_close(found.mean(0), torch.full((3,), 1 / 3), atol=0.02, rtol=0)
    torch.testing.assert_close(found.std(0), one.scale, atol=0.01, rtol=0)  # sqrt((K - 1)/(K^2 (K + 1)))
    assert torch.equal(one.weights(Draws(0, "train", [7, 8])), found[7:9])


def test_the_better_image_is_the_one_with_more_of_the_weighted_rewards():
    one = steering.Steering(["a", "b"], GAPS)
    units = GAPS.square().mean(0).sqrt()
    draws = Draws(0, "train", range(400))
    indices = [i % 4 for i in range(400)]
    w, found = one.weights(draws), one.preference(indices, draws)
    for i in range(400):
        total = sum(w[i, k] * GAPS[indices[i], k] / units[k] for k in range(2))
        assert found[i] == (1.0 if total > 0 else 0.0)
    assert 0.2 < found[indices.index(0) :: 4].mean() < 0.8, "either image may win, by the weights"
    assert torch.equal(one.condition(indices, draws)["user"], w - 0.5)
    tie = steering.Steering(["a", "b"], torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    assert tie.preference([0], Draws(0, "train", [0])).tolist() == [0.5]


def test_weights_are_read_by_name():
    assert steering.parse("b:3 a:1", ["a", "b"]).tolist() == [0.25, 0.75]
    assert steering.parse("b:2", ["a", "b"]).tolist() == [0.0, 1.0]
    for text, reason in (("c:1", "a, b"), ("a:-1", "'a:-1'"), ("a", "'a'"), ("a:0", "above 0")):
        with pytest.raises(DiffpoError, match=reason):
            steering.parse(text, ["a", "b"])
    with pytest.raises(DiffpoError, match="the reward b "):
        steering.Steering(["a", "b"], torch.tensor([[1.0, 0.0]]))


def test_modpos_optimum_is_that_of_the_weighted_sum():
    """With p(chosen) = sigma(s a), the loss of both orders is least at u = w s a + (1 - w) b."""
    w, a, b = 0.3, 0.8, -0.5
    u = torch.tensor([w * a + (1 - w) * b], dtype=torch.float64, requires_grad=True)
    gap, p = torch.tensor([b], dtype=torch.float64), torch.tensor([a], dtype=torch.float64).sigmoid()
    quantities = {"chosen": u, "rejected": torch.zeros_like(u), "gap": gap, "preference": p}
    loss = links.losses("modpo", {"weight": w}, quantities).sum()
    (slope,) = torch.autograd.grad(loss, u, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), u)
    assert abs(slope.item()) < 1e-12 and curvature.item() > 0


def rows(n):
    return [
        {**row, "red_0": float(i % 3), "red_1": 1.0, "blue_0": 1.0, "blue_1": float(i % 2)}
        for i, row in enumerate(pick_a_pic_rows(n))
    ]


def test_a_steered_run_starts_at_its_reference_and_its_pictures_follow_the_weights(tiny_sdxl, make_config, tmp_path):
    data = write_parquet(tmp_path / "pairs.parquet", rows(8))
    overrides = ["objective.name=dpa", "data.columns.rewards=[red, blue]", "train.lr=1e-3"]
    config = make_config(tiny_sdxl, *overrides, data=data)
    train(config)
    first, *_, last = metrics_of(config.output)
    assert first["rewards/margins"] == 0.0 != last["rewards/margins"]
    assert '--steer "red:0.5 blue:0.5"' in (config.output / "README.md").read_text()
    path = config.output / lora_file.USERS_FILE_NAME
    state = load_file(path)
    assert state["values.0.weight"].abs().max() > 0 and state["scale"].shape == (2,)
    save_file(
        {k: v * (1000 if k.startswith("values.") else 1) for k, v in state.items()},
        path,
        {"rewards": '["red", "blue"]'},
    )
    arms = {
        name: Generation(str(tiny_sdxl), lora=str(config.output), steps=2, guidance=3.0, steer=steer)
        for name, steer in {"red": "red:1", "blue": "blue:1", "half": "red:2 blue:2", "none": None}.items()
    }
    found = {row["arm"]: row for row in generate.run(arms, ["a cat"], tmp_path / "out")}
    assert len({row["sha256"] for row in found.values()}) == 4
    assert found["red"]["user_hash"] != found["blue"]["user_hash"] and found["none"]["user_hash"] is None
    with pytest.raises(DiffpoError, match="use --steer, not --user-pairs"):
        generate.run(
            {"x": Generation(str(tiny_sdxl), lora=str(config.output), user_pairs=str(data))}, ["a"], tmp_path / "x"
        )


def test_rewards_and_steering_belong_together(tiny_sdxl, make_config, tmp_path):
    data = write_parquet(tmp_path / "pairs.parquet", rows(4))
    for overrides in (["objective.name=dpa"], ["data.columns.rewards=[red, blue]"]):
        with pytest.raises(DiffpoError, match=r"data\.columns\.rewards"):
            make_config(tiny_sdxl, *overrides, data=data)
    config = make_config(tiny_sdxl, "objective.name=dpa", "data.columns.rewards=[red, green]", data=data)
    with pytest.raises(DiffpoError, match="'green_0'"):
        train(config)


def test_shares_of_users():
    assert shares("a.parquet") == [("a.parquet", 1.0)]
    assert shares("a+b.parquet@0.25+c@d.csv@.75") == [("a+b.parquet", 0.25), ("c@d.csv", 0.75)]
    with pytest.raises(DiffpoError, match="FILE@WEIGHT"):
        shares("a@0.5+b")
