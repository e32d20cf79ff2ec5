import contextlib
import math
from types import SimpleNamespace

import pytest
import torch

from diffpo import models
from diffpo.common.errors import DiffpoError
from diffpo.common.rng import Draws
from diffpo.config import InversionSettings as Settings
from diffpo.config import Lora, Model, ReferenceSettings
from diffpo.data.judgement import Judgement
from diffpo.objective import reference, reward
from diffpo.problems.inversion import IMAGES, Inversion
from diffpo.problems.policy import Policy
from diffpo.weights.lora import add_lora


def inversion(settings, family, network):
    """By a reference without an adapter."""
    policy = Policy(family, network)
    return Inversion(settings, policy, lambda: contextlib.nullcontext(policy))


class Analytic:
    """A family in float64 whose "network" says what eps is at (x, alpha, sigma); it may predict v."""

    train_timesteps, dtype = 1000, torch.float64

    def __init__(self, prediction="epsilon"):
        self.prediction = prediction

    def alpha_sigma(self, t):
        angle = (t.double().view(-1, 1, 1, 1) + 1) / (self.train_timesteps + 1) * math.pi / 2
        return angle.cos(), angle.sin()

    def predict(self, unet, x_t, t, cond):
        alpha, sigma = self.alpha_sigma(t)
        eps = unet(x_t, alpha, sigma, cond)
        return eps if self.prediction == "epsilon" else alpha * eps - sigma * (x_t - sigma * eps) / alpha

    def target(self, x_0, noise, t):
        alpha, sigma = self.alpha_sigma(t)
        return noise if self.prediction == "epsilon" else alpha * noise - sigma * x_0


def gaussian(x, alpha, sigma, cond):
    """The perfect network for data N(cond["mean"], 0.5^2)."""
    return sigma * (x - alpha * cond["mean"]) / (0.25 * alpha**2 + sigma**2)


def batch(n=3, members=2, shape=(4, 8, 8), seed=0, dtype=torch.float64, positions=None, **cond):
    draw = torch.Generator().manual_seed(seed)
    return SimpleNamespace(
        x_0=torch.randn(members * n, *shape, generator=draw, dtype=dtype),
        cond=cond,
        judgement=Judgement(torch.ones(n), members),
        indices=list(range(n)),
        draws=Draws(0, "train", list(range(n)) if positions is None else positions),
        mask=None,
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("settings", [Settings(steps=7), Settings(steps=4, average=True)])
def test_a_network_that_says_one_noise_is_followed_exactly_to_the_level_it_is_told(prediction, settings):
    """Then x_t = alpha_t x_0 + sigma_t eps solves the probability-flow ODE, whatever the steps."""
    family, n = Analytic(prediction), 40
    noise = torch.randn(2 * n, 4, 8, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    given = batch(n, noise=noise)
    found = inversion(settings, family, lambda x, alpha, sigma, cond: cond["noise"])(given)
    alpha, sigma = family.alpha_sigma(found.t)
    torch.testing.assert_close(found.x_t, alpha * given.x_0 + sigma * noise, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.target, family.target(given.x_0, noise, found.t), rtol=0, atol=1e-10)
    # one t per group, every level of the grid and none beside it; the last is the noisiest there is
    assert found.t.chunk(2)[0].tolist() == found.t.chunk(2)[1].tolist()
    grid = [round(1000 * (k + 1) / settings.steps) - 1 for k in range(settings.steps)]
    assert sorted(set(found.t.tolist())) == grid and grid[-1] == 999


def flow_error(settings, prediction="epsilon"):
    """Largest distance from the closed-form solution of the probability-flow ODE, at the noisiest level."""
    family, given = Analytic(prediction), batch(n=1)
    cond = {"mean": torch.full_like(given.x_0, 0.3)}
    source = inversion(settings, family, gaussian)
    reached = source.invert(given.x_0, cond, [settings.steps // 2], [None])[-1]
    alpha, sigma = family.alpha_sigma(torch.tensor([499]))
    exact = alpha * 0.3 + (given.x_0 - 0.3) * (alpha**2 + sigma**2 / 0.25).sqrt()
    return (reached - exact).abs().max().item()


@pytest.mark.parametrize(("average", "order"), [(False, 1), (True, 2)])
def test_gaussian_data_are_inverted_along_the_probability_flow(average, order):
    errors = [flow_error(Settings(steps=steps, average=average)) for steps in (20, 40)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)
    assert errors[1] < (0.2, 0.01)[average]


def test_networks_that_predict_v_and_epsilon_lead_to_the_same_latents():
    for settings in (Settings(steps=6), Settings(steps=6, average=True), Settings(steps=6, eta=0.7)):
        given = batch(8)
        given.cond = {"mean": torch.full_like(given.x_0, 0.3)}
        found = {p: inversion(settings, Analytic(p), gaussian)(given) for p in ("epsilon", "v_prediction")}
        one, other = found.values()
        torch.testing.assert_close(one.x_t, other.x_t, rtol=0, atol=1e-10)
        alpha, sigma = Analytic().alpha_sigma(one.t)
        torch.testing.assert_close(other.target, alpha * one.target - sigma * given.x_0, rtol=0, atol=1e-10)


def test_noise_of_eta_does_not_leave_the_level():
    """Data N(0, 1) have variance 1 at every level, with a perfect network and any eta."""
    standard = lambda x, alpha, sigma, cond: sigma * x  # noqa: E731
    for eta in (0.0, 1.0):
        given = batch(n=1, shape=(4, 64, 64))
        source = inversion(Settings(steps=200, eta=eta), Analytic(), standard)
        path = source.invert(given.x_0, {}, [200], [torch.Generator().manual_seed(0)])
        for x in path:
            assert x.var().item() == pytest.approx(1, abs=0.03)
        moved = (path[-1] - given.x_0).square().mean().item()
        assert (moved > 1) == bool(eta)  # at eta = 1 little of x_0 is left


def ddim(family, unet, x, cond, times):
    """Sample from times[0] down to the clean image, by the textbook."""
    for t, after in zip(times, [*times[1:], None], strict=True):
        alpha, sigma = family.alpha_sigma(torch.tensor([t]))
        output = family.predict(unet, x, torch.full((len(x),), t), cond)
        eps = output if family.prediction == "epsilon" else alpha * output + sigma * x
        x_0 = (x - sigma * eps) / alpha
        if after is None:
            return x_0
        alpha, sigma = family.alpha_sigma(torch.tensor([after]))
        x = alpha * x_0 + sigma * eps
    return x


@pytest.fixture(scope="module", params=["tiny_sd", "tiny_sd_v"])
def network(request):
    family = models.load(Model(path=str(request.getfixturevalue(request.param))))
    unet = family.load_network()
    # random weights say next to nothing; a network that answers makes errors visible
    torch.nn.init.normal_(unet.conv_out.weight, std=0.15, generator=torch.Generator().manual_seed(0))
    return family, unet


def text(unet, rows):
    draw = torch.Generator().manual_seed(1)
    return torch.randn(rows, 6, unet.config.cross_attention_dim, generator=draw)


@torch.no_grad()
def test_sampling_with_ddim_leads_back_to_the_image(network):
    family, unet = network
    given = batch(n=1, dtype=torch.float32, prompt_embeds=text(unet, 2))

    def round_trip(steps, average=False):
        source = inversion(Settings(steps=steps, average=average), family, unet)
        x_t = source.invert(given.x_0, given.cond, [steps // 2], [None])[-1]
        back = ddim(family, unet, x_t, given.cond, source.grid[: steps // 2].tolist()[::-1])
        return (back - given.x_0).square().mean().sqrt().item()

    coarse, fine, average = round_trip(10), round_trip(80), round_trip(10, average=True)
    assert fine < coarse / 4
    assert fine < 0.05
    assert average < coarse


@torch.no_grad()
def test_a_batch_is_its_groups_and_a_draw_is_addressed(network):
    family, unet = network
    embeds = text(unet, 10)
    whole = batch(n=5, dtype=torch.float32, prompt_embeds=embeds)
    source = inversion(Settings(steps=6, eta=0.5), family, unet)
    together = source(whole)
    assert len(set(together.t.tolist())) > 1
    for i in range(5):
        rows = torch.tensor([i, 5 + i])
        one = batch(n=1, positions=[i], prompt_embeds=embeds[rows])
        one.x_0 = whole.x_0[rows]
        alone = source(one)
        assert alone.t.tolist() == together.t[rows].tolist()
        torch.testing.assert_close(alone.x_t, together.x_t[rows], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.target, together.target[rows], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(source(whole).x_t, together.x_t, rtol=0, atol=0)
    whole.draws = Draws(0, "train", [100 + i for i in range(5)])
    assert not torch.equal(source(whole).x_t, together.x_t)


def test_rewards_begin_at_zero_and_the_base_inverts(tiny_sdxl):
    """A trained LoRA does not change the latents, which the reference inverts; a fresh one has no reward."""
    family = models.load(Model(path=str(tiny_sdxl)))
    unet = family.load_network()
    parameters = add_lora(unet, Lora(rank=4), family.lora_targets)
    policy = Policy(family, unet)
    base = reference.make(ReferenceSettings(), policy)
    settings = SimpleNamespace(
        strength=5000, winner_safeguard=None, clip=None, divergence="reverse_kl", divergence_alpha=0.5, kl=0.0
    )
    objective = reward.Objective(settings, base, omega=lambda t: torch.ones(len(t)))
    sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).repeat(4, 1)
    cond = {"prompt_embeds": torch.randn(4, 6, 32), "pooled_prompt_embeds": torch.randn(4, 16), "time_ids": sizes}
    given = batch(n=2, dtype=torch.float32, **cond)
    source = Inversion(Settings(steps=3), policy, base.on)
    regression = source(given)
    assert reward.score(policy, objective, regression).reward.tolist() == [0] * 4
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1)
    torch.testing.assert_close(source(given).x_t, regression.x_t, rtol=0, atol=0)
    assert not regression.x_t.requires_grad
    assert (reward.score(policy, objective, regression).reward != 0).all()


def test_more_steps_than_timesteps_are_refused():
    with pytest.raises(DiffpoError, match=r"objective\.inversion\.steps.*1001.*1000"):
        inversion(Settings(steps=1001), Analytic(), gaussian)


# ---- the cache


@pytest.fixture
def data(tiny_sdxl, make_config):
    """Batches of real pairs, the base network, and how often it was called."""
    from diffpo.data.batches import Batches
    from diffpo.data.groups import load_groups

    config = make_config(tiny_sdxl)
    family = models.load(config.model)
    family.load_encoders()
    groups = load_groups(config.data, config.data.train, "train", "pair")
    batches = Batches(groups, config.data, family)
    unet = family.load_network()
    calls = []
    unet.register_forward_pre_hook(lambda *_: calls.append(1))
    return SimpleNamespace(batches=batches, family=family, unet=unet, calls=calls, config=config)


def source_of(data, **settings):
    return inversion(Settings(steps=4, **settings), data.family, data.unet)


def test_cached_latents_are_those_of_inverting_the_mean(data, tmp_path):
    kept = source_of(data)
    kept.prepare(data.batches, tmp_path)
    del data.calls[:]
    given = data.batches.batch([7, 0, 3, 3], [11, 12, 13, 14])
    cached = kept(given)
    assert not data.calls
    mean = SimpleNamespace(**{**vars(given), "x_0": data.batches.means(given.indices)})
    assert not torch.equal(mean.x_0, given.x_0)
    fresh = source_of(data)(mean)
    assert cached.t.tolist() == fresh.t.tolist() and len(set(cached.t.tolist())) > 1
    torch.testing.assert_close(cached.x_t, fresh.x_t, rtol=1e-3, atol=1e-3)
    # the target belongs to the very latents that are kept, and they to the mean
    alpha, sigma = data.family.alpha_sigma(cached.t)
    torch.testing.assert_close(alpha * mean.x_0 + sigma * cached.target, cached.x_t, rtol=1e-4, atol=1e-5)


def test_every_image_is_inverted_once_and_again_only_for_other_settings(data, tmp_path):
    images = len({key for group in data.batches.groups.groups for key in group.hashes})
    for settings, fresh in (({}, True), ({}, False), ({"eta": 0.1}, True), ({"average": True}, True)):
        rows = []
        handle = data.unet.register_forward_pre_hook(lambda module, inputs, rows=rows: rows.append(len(inputs[0])))
        source_of(data, **settings).prepare(data.batches, tmp_path)
        handle.remove()
        filled = -(-images // IMAGES) * IMAGES  # the last batch is filled up with repetitions
        assert sum(rows) == fresh * filled * (8 if "average" in settings else 4)
    with torch.no_grad():
        data.unet.conv_in.weight.mul_(1.5)
    del data.calls[:]
    source_of(data).prepare(data.batches, tmp_path)
    assert data.calls  # another base


def test_what_changes_from_step_to_step_is_not_cached(data, tmp_path):
    for override, message in (
        ({"flip": True}, r"data\.flip=false.*objective\.inversion\.cache=false"),
        ({"caption_dropout": 0.1}, r"data\.caption_dropout.*objective\.inversion\.cache=false"),
    ):
        settings = data.config.data.model_copy(update=override)
        changing = SimpleNamespace(cached="flip" not in override, data=settings)
        with pytest.raises(DiffpoError, match=message):
            source_of(data).prepare(changing, tmp_path)
