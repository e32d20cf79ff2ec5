import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import pick_a_pic_rows, picture, write_parquet

from diffpo import models
from diffpo.common.errors import DiffpoError
from diffpo.common.rng import Draws
from diffpo.config import Columns, Data, Lora, Model, ReferenceSettings
from diffpo.data.batches import Batches
from diffpo.data.groups import load_groups
from diffpo.objective import reference, users
from diffpo.objective.user_attention import attach, painting_for
from diffpo.problems.policy import Policy
from diffpo.weights import lora


def people(n: int, each: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, list[str], torch.Tensor]:
    """n users with ``each`` pairs of latents: chosen, rejected (n each, 4, 8, 8), whose pair it is, and what he likes:
    +1 for much of channel 0, -1 for little."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(2, n * each, 4, 8, 8, generator=draw)
    level = torch.randn(2, n * each, generator=draw)
    images[:, :, 0] += 1.5 * level[:, :, None, None]
    likes = torch.tensor([1.0, -1.0]).repeat(n)[:n].repeat_interleave(each)
    first = (level[0] - level[1]) * likes > 0
    chosen = torch.where(first[:, None, None, None], images[0], images[1])
    rejected = torch.where(first[:, None, None, None], images[1], images[0])
    return chosen, rejected, [f"user {seed} {i // each}" for i in range(n * each)], likes


def evidence(chosen, rejected, names) -> users.Tastes:
    return users.Tastes(users.features(chosen) - users.features(rejected), names)


def test_features_are_a_coarse_grid_and_each_channels_deviation():
    x = torch.zeros(1, 2, 8, 8)
    x[0, 1, :2, :2] = 3.0
    found = users.features(x)[0]
    assert (
        found.shape == (2 * 17,) and found[16] == 3.0 and found[:16].abs().max() == 0 and found[17:32].abs().max() == 0
    )
    # 4 of 64 pixels are 3: variance 9 (1/16)(15/16) 64/63
    torch.testing.assert_close(found[32:], torch.tensor([0.0, (9 * 15 / 256 * 64 / 63) ** 0.5]))


def test_a_taste_comes_from_other_pairs_of_the_same_user_alone():
    differences = torch.tensor([[1.0], [2.0], [4.0], [100.0], [200.0], [7.0]])
    tastes = users.Tastes(differences, ["a", "a", "a", "b", None, "c"])
    found = tastes.rows(range(6), Draws(0, "train", range(6)))
    assert found.flatten().tolist() == [
        3.0,
        2.5,
        1.5,
        0.0,
        0.0,
        0.0,
    ]


def test_shots_are_drawn_anew_at_each_position_and_only_by_address():
    tastes = users.Tastes(torch.randn(20, 3), ["a"] * 20)
    one = tastes.rows([0] * 8, Draws(0, "train", range(8)))
    assert torch.equal(tastes.rows([0] * 3, Draws(0, "train", [5, 6, 7])), one[5:])
    assert len(one.unique(dim=0)) == 8
    assert not torch.equal(tastes.rows([0] * 8, Draws(1, "train", range(8))), one)


def test_someone_with_two_pairs_is_needed():
    def groups(*names, kind="pair"):
        return SimpleNamespace(kind=kind, source="here", groups=[SimpleNamespace(user=name) for name in names])

    users.require_users(groups("a", None, "a"))
    with pytest.raises(DiffpoError, match=r"^here: .*data\.columns\.user=NAME"):
        users.require_users(groups("a", None, None, "b"))
    with pytest.raises(DiffpoError, match=r"^here holds single images"):
        users.require_users(groups("a", "a", kind="single"))


def test_tastes_are_read_from_the_latent_cache(tiny_sd, make_config, tmp_path):
    rows = [{**row, "user": f"user {i % 2}"} for i, row in enumerate(pick_a_pic_rows(6))]
    data = write_parquet(tmp_path / "users.parquet", rows)
    config = make_config(tiny_sd, "data.columns.user=user", data=data)
    family = models.load(config.model)
    family.load_encoders()
    batches = Batches(load_groups(config.data, str(data), "train"), config.data, family)
    tastes = users.read_tastes(batches)
    assert tastes.users == [f"user {i % 2}" for i in range(6)]
    for i in range(6):  # the first image wins in even rows
        better, worse = (2 * i, 2 * i + 1) if i % 2 == 0 else (2 * i + 1, 2 * i)
        images = torch.stack([torch.from_numpy(np.array(picture(each))) for each in (better, worse)])
        means = family.encode_image(images.permute(0, 3, 1, 2) / 127.5 - 1)["mean"]
        chosen, rejected = family.scale_latents(means).split(1)
        torch.testing.assert_close(tastes.differences[i], users.taste(chosen, rejected), rtol=1e-3, atol=1e-4)


def problem(family, x_0, seed: int):
    """x_t, t, target and conditions for the latents ``x_0``; one noise and one t for every two halves."""
    draw = torch.Generator().manual_seed(seed)
    n = len(x_0) // 2
    noise = torch.randn(n, 4, 8, 8, generator=draw).repeat(2, 1, 1, 1)
    t = torch.randint(200, 1000, (n,), generator=draw).repeat(2)
    cond = {"prompt_embeds": torch.ones(2 * n, 8, 16) * 0.3}
    if "text_encoder_2" in family.encoders:
        cond = {"prompt_embeds": torch.ones(2 * n, 8, 32), "pooled_prompt_embeds": torch.ones(2 * n, 16)}
        cond["time_ids"] = torch.full((2 * n, 6), 16.0)
    return family.add_noise(x_0, noise, t), t, family.target(x_0, noise, t), cond


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl"])
def test_users_change_nothing_at_the_start_and_never_the_reference(request, name, tmp_path):
    family = models.load(Model(path=str(request.getfixturevalue(name))))
    unet = family.load_network()
    chosen, rejected, owners, _ = people(4, 4, 0)
    tastes = evidence(chosen, rejected, owners)
    x_t, t, _, cond = problem(family, torch.cat([chosen, rejected]), 0)
    row = tastes.rows(range(16), Draws(0, "train", range(16))).repeat(2, 1)
    base = family.predict(unet, x_t, t, cond)
    lora.add_lora(unet, Lora(rank=2), family.lora_targets)
    module = attach(unet, tastes.scale)
    made = reference.make(ReferenceSettings(), Policy(family, unet))
    named = {**cond, "user": row}
    assert torch.equal(family.predict(unet, x_t, t, named), base)
    # gradients reach the values at once; after a step users differ from each other, and the reference from none
    family.predict(unet, x_t, t, named).square().mean().backward()
    assert all(values.weight.grad.abs().max() > 0 for values in module.values) and len(module.values) > 1
    for values in module.values:
        torch.nn.init.normal_(values.weight, std=0.3)
    output = family.predict(unet, x_t, t, named)
    assert not torch.allclose(output, base, atol=1e-4)
    assert not torch.allclose(family.predict(unet, x_t, t, {**cond, "user": -row}), output, atol=1e-4)
    assert torch.equal(family.predict(unet, x_t, t, cond), base)  # for nobody in particular
    with made.on() as reference_policy:
        still = reference_policy.network
        assert torch.equal(family.predict(still, x_t, t, named), base)
    assert torch.equal(family.predict(unet, x_t, t, named), output)
    # a run's end: saved, loaded on a fresh model, for a user who is known by his pairs
    users.save(tmp_path / "tokens", unet, 16)
    fresh = family.load_network()
    assert users.load(tmp_path / "tokens", fresh) == 16
    new = users.taste(chosen[:4], rejected[:4])
    expected = family.predict(unet, x_t, t, {**cond, "user": new.expand(len(x_t), -1)})
    with torch.no_grad(), painting_for(fresh, new):
        assert torch.equal(family.predict(fresh, x_t, t, cond), expected)
    assert torch.equal(family.predict(fresh, x_t, t, cond), base)


def test_a_pipeline_paints_for_a_user(tiny_sdxl):
    pipe = models.load_pipeline(str(tiny_sdxl), device="cpu")
    pipe.set_progress_bar_config(disable=True)

    def paint():
        options = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "latent"}
        return pipe("a cat", generator=torch.Generator().manual_seed(0), guidance_scale=3.0, **options).images

    before = paint()
    module = attach(pipe.unet, torch.ones(68))
    for values in module.values:
        torch.nn.init.normal_(values.weight)
    assert torch.equal(paint(), before)
    with painting_for(pipe.unet, torch.ones(68)):
        assert not torch.allclose(paint(), before, atol=1e-3)


def test_tokens_of_another_model_or_none_are_refused(tiny_sd, tiny_sdxl, tmp_path):
    small = models.load(Model(path=str(tiny_sd))).load_network()
    attach(small, torch.ones(68))
    users.save(tmp_path / "tokens", small, 16)
    other = models.load(Model(path=str(tiny_sdxl))).load_network()
    for path in (tmp_path / "tokens", tmp_path / "absent"):
        with pytest.raises(DiffpoError, match=re.escape(str(path))):
            users.load(path, other)


def test_opposite_tastes_are_learnt_together_and_serve_users_who_were_not_there(tiny_sd):
    """Half the users like much of channel 0, half little: on average there is nothing to learn, and yet the policy
    ranks the pairs of users that it never saw, by their tastes."""
    torch.manual_seed(0)
    family = models.load(Model(path=str(tiny_sd)))
    unet = family.load_network()
    chosen, rejected, owners, _ = people(20, 10, 1)
    tastes = evidence(chosen, rejected, owners)
    parameters = lora.add_lora(unet, Lora(rank=4), family.lora_targets)
    module = attach(unet, tastes.scale)
    against = reference.make(ReferenceSettings(), Policy(family, unet))
    optimizer = torch.optim.Adam([*parameters, *module.parameters()], lr=1e-2)

    def margins(chosen, rejected, row, seed):
        x_t, t, target, cond = problem(family, torch.cat([chosen, rejected]), seed)
        cond["user"] = row.repeat(2, 1)
        with against.on() as reference_policy:
            base = reference_policy.network
            before = (family.predict(base, x_t, t, cond) - target).square().mean((1, 2, 3))
        error = (family.predict(unet, x_t, t, cond) - target).square().mean((1, 2, 3))
        reward = 250 * (before - error)
        return reward.chunk(2)[0] - reward.chunk(2)[1]

    for step in range(45):
        indices = torch.randint(0, 200, (24,), generator=torch.Generator().manual_seed(step)).tolist()
        row = tastes.rows(indices, Draws(0, "train", range(step * 24, step * 24 + 24)))
        loss = torch.nn.functional.softplus(-margins(chosen[indices], rejected[indices], row, step)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    chosen, rejected, owners, _ = people(20, 10, 2)
    row = evidence(chosen, rejected, owners).rows(range(200), Draws(0, "eval", range(200)))

    def accuracy(row):
        with torch.no_grad():
            u = sum(margins(chosen, rejected, row, 1000 + draw) for draw in range(2))
        return (u > 0).float().mean().item()

    # the standard error of a coin's accuracy is 0.035
    assert accuracy(row) > 0.65 and accuracy(-row) < 0.35


class Bright:
    """Features of a picture: its three mean colours."""

    name = "bright"

    def embed(self, images):
        return np.stack([np.asarray(image, np.float32).mean((0, 1)) for image in images])


def test_tastes_may_be_read_from_features_of_the_pictures(tmp_path):
    rows = [{**row, "user": "a"} for row in pick_a_pic_rows(3)]
    data = write_parquet(tmp_path / "users.parquet", rows)
    groups = load_groups(Data(resolution=16, columns=Columns(user="user")), str(data), "train")
    tastes = users.read_tastes(SimpleNamespace(groups=groups), Bright())
    assert tastes.header == {"taste": "bright"}
    for i in range(3):
        better, worse = (2 * i, 2 * i + 1) if i % 2 == 0 else (2 * i + 1, 2 * i)
        units = [np.asarray(picture(each), np.float64).mean((0, 1)) for each in (better, worse)]
        expected = units[0] / np.linalg.norm(units[0]) - units[1] / np.linalg.norm(units[1])
        torch.testing.assert_close(tastes.differences[i].double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_prototypes_bound_users_to_mixtures(tiny_sd, tmp_path):
    unet = models.load(Model(path=str(tiny_sd))).load_network()
    module = attach(unet, torch.ones(5), prototypes=3)
    corners = module.tokens(torch.eye(3)).unflatten(1, (4, -1))
    found = module(100 * torch.randn(50, 5))
    weights = torch.linalg.lstsq(corners.flatten(1).T, found.flatten(1).T).solution.T
    torch.testing.assert_close(weights.sum(1), torch.ones(50), rtol=1e-3, atol=1e-3)
    assert (weights > -1e-3).all() and weights.max() > 0.8
    users.save(tmp_path / "tokens", unet, 16)
    other = models.load(Model(path=str(tiny_sd))).load_network()
    users.load(tmp_path / "tokens", other)
    assert other.user_tokens.tokens.bias is None and torch.equal(
        other.user_tokens(torch.ones(1, 5)), module(torch.ones(1, 5))
    )


def test_features_that_tastes_were_not_read_from_are_refused(tiny_sd, tmp_path):
    unet = models.load(Model(path=str(tiny_sd))).load_network()
    attach(unet, torch.ones(3))
    users.save(tmp_path / "user_tokens.safetensors", unet, 16, {"taste": "bright"})
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    assert users.header_of(tmp_path / "user_tokens.safetensors") == ([], "bright")
    pipe = SimpleNamespace(unet=models.load(Model(path=str(tiny_sd))).load_network())
    with pytest.raises(DiffpoError, match=r"--user-features \(bright\)"):
        users.welcome(users.Person(((None, 1.0),)), tmp_path, Model(path=str(tiny_sd)), pipe)
