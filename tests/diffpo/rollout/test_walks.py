from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from on_policy import Brightness, StepBrightness

from diffpo.common.errors import DiffpoError
from diffpo.common.worker import ALONE
from diffpo.config import ObjectiveSettings, RolloutSettings
from diffpo.objective.reference import Reference
from diffpo.objective.reward import Objective, group_losses, score
from diffpo.problems.policy import Policy
from diffpo.problems.regression import Conditioning
from diffpo.rollout import round
from diffpo.rollout.feed import OnPolicy
from diffpo.rollout.sampler import Walker


class Toy:
    """A network that returns 0.1 x + the label's share, and counts the rows that it sees."""

    prediction, train_timesteps = "epsilon", 1000

    def __init__(self):
        self.rows = []

    def schedule(self):
        from samplers import VPDiscrete

        return VPDiscrete.scaled_linear()

    def predict(self, network, x_t, t, cond):
        self.rows.append((int(t[0]), x_t))
        return 0.1 * x_t + (t / 1000).view(-1, 1, 1, 1)


def own_noise(draw):
    """Two single steps, then three pools of three, each with a choice after it."""
    for _ in range(2):
        torch.randn(1, 4, 4, generator=draw)
    pools = []
    for _ in range(3):
        pools.append(torch.randn(3, 1, 4, 4, generator=draw))
        torch.randint(3, (1,), generator=draw)
    return pools


def test_the_pool_takes_best_and_worst_of_one_state_and_goes_on_without_another_call():
    toy, scorer = Toy(), StepBrightness()
    settings = RolloutSettings(steps=6, pool=3, start=2, threshold=0.0, guidance=1.0, eta=1.0)
    walker = Walker(settings, toy)
    draws = [torch.Generator().manual_seed(i) for i in range(2)]
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(9))
    found = walker.forks(Policy(toy, None), x, draws, Conditioning({"c": torch.zeros(2, 1)}), scorer, ["a", "b"])

    # one call at each of the first three steps, then all candidates at the next ones: nothing is evaluated twice
    assert [(t, len(rows)) for t, rows in toy.rows] == [(999, 2), (832, 2), (666, 2), (499, 6), (332, 6), (166, 6)]
    assert [call[2].tolist() for call in scorer.calls] == [[499] * 6, [332] * 6, [166] * 6]
    assert scorer.calls[0][3] == ["a"] * 3 + ["b"] * 3 and scorer.calls[0][4]["c"].shape == (6, 1)
    noise = [own_noise(torch.Generator().manual_seed(i)) for i in range(2)]
    for k, (x_t, x_0, t, _, _) in enumerate(scorer.calls):
        alpha = toy.schedule().alpha((int(t[0]) + 1) / 1000)
        sigma = (1 - alpha**2) ** 0.5
        expected = (x_t - sigma * (0.1 * x_t + t[0] / 1000)) / alpha
        torch.testing.assert_close(x_0, expected, rtol=1e-5, atol=1e-5)
        for row, forks in enumerate(found):
            pool, values = x_t.unflatten(0, (2, 3))[row], x_0.mean((1, 2, 3)).unflatten(0, (2, 3))[row]
            assert forks.steps == [2, 3, 4] and forks.pools == 3
            (state, best), (same, worst) = forks.states[k]
            assert torch.equal(best, pool[values.argmax()]) and torch.equal(worst, pool[values.argmin()])
            assert torch.equal(state, same)
            assert forks.scores[k].tolist() == pytest.approx([values.max().item(), values.min().item()])
            if k == 0:
                assert torch.equal(state, toy.rows[2][1][row])
            else:  # goes on from a member of the pool before
                earlier = scorer.calls[k - 1][0].unflatten(0, (2, 3))[row]
                assert any(torch.equal(state, member) for member in earlier)
            step = walker.steps[k + 2]
            mean = step.transition.mean(state, 0.1 * state + step.t / 1000)
            torch.testing.assert_close(pool, mean + step.transition.std * noise[row][k], rtol=1e-5, atol=1e-5)


def test_inner_steps_are_made_before_a_candidate_is_judged_and_all_belong_to_its_pair():
    """SPO's for SDXL: of 20 steps from the fourth on, four pools of four steps each, the last one finished images."""
    toy, scorer = Toy(), StepBrightness()
    settings = RolloutSettings(steps=20, pool=2, start=4, threshold=0.0, guidance=1.0, inner=3, end="lowest")
    walker = Walker(settings, toy)
    draws, x = [torch.Generator().manual_seed(0)], torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(9))
    given = Conditioning({"c": torch.zeros(1, 1)})
    (found,) = walker.forks(Policy(toy, None), x, draws, given, scorer, ["a"])
    assert found.steps == list(range(4, 20)) and (found.pools, found.decided) == (4, 4)
    assert [int(call[2][0]) for call in scorer.calls] == [walker.steps[k].t for k in (8, 12, 16)] + [0]
    x_t, x_0 = scorer.calls[-1][:2]
    assert torch.equal(x_t, x_0), "nothing is left to estimate"
    assert [len(rows) for _, rows in toy.rows] == [1] * 5 + [2] * 15, "the network sees a state once"
    for fork in range(4):
        pair = found.states[4 * fork : 4 * fork + 4]  # (steps, best and worst, before and after, C, h, w)
        assert torch.equal(pair[0, 0, 0], pair[0, 1, 0]) and not torch.equal(pair[1, 0, 0], pair[1, 1, 0])
        assert torch.equal(pair[:-1, :, 1], pair[1:, :, 0]), "a step begins where the one before ends"
        values = scorer.calls[fork][1].mean((1, 2, 3))
        end = scorer.calls[fork][0][torch.stack([values.argmax(), values.argmin()])]
        assert torch.equal(pair[-1, :, 1], end)
    noise = found.states[:, :, 1] - torch.stack(
        [
            torch.stack([step.transition.mean(x[None], (0.1 * x + step.t / 1000)[None])[0] for x in pair[:, 0]])
            for step, pair in zip(walker.steps[4:], found.states, strict=True)
        ]
    )
    std = torch.tensor([step.transition.std for step in walker.steps[4:]])
    assert (noise.flatten(1).std(1) / std).sub(1).abs().max() < 0.5, "each step has its own noise"


def test_the_lowest_level_leaves_no_step_without_noise_and_clean_ends_at_none():
    lowest, clean = (Walker(RolloutSettings(steps=5, end=end), Toy()).steps for end in ("lowest", "clean"))
    assert [step.t for step in lowest] == [step.t for step in clean]
    assert clean[-1].transition.std == 0 and all(step.transition.std for step in lowest)
    schedule = Toy().schedule()
    alpha, sigma = schedule.alpha(200 / 1000), schedule.sigma(200 / 1000)
    alpha_to, sigma_to = schedule.alpha(1 / 1000), schedule.sigma(1 / 1000)
    variance = (sigma_to / sigma) ** 2 * (1 - (alpha / alpha_to) ** 2)  # DDPM's posterior, Ho et al. 2020, eq. 7
    assert lowest[-1].transition.std == pytest.approx(variance**0.5, rel=1e-9)


def one_walk(walker, scorer, caption):
    policy, given = Policy(walker.family, None), Conditioning({"c": torch.zeros(1, 1)})
    return walker.forks(policy, torch.zeros(1, 1, 2, 2), [torch.Generator()], given, scorer, [caption])[0]


def test_the_threshold_is_on_the_difference_of_the_softmax():
    class Fixed:
        def score(self, x_t, *_):
            return torch.tensor([0.0, 0.4, 1.0]).repeat(len(x_t) // 3)

    def groups(threshold):
        walker = Walker(RolloutSettings(steps=4, pool=3, start=0, threshold=threshold, guidance=1.0), Toy())
        return one_walk(walker, Fixed(), "a")

    gap = torch.tensor([1.0, 0.0]).softmax(0)
    gap = (gap[0] - gap[1]).item()
    assert len(groups(gap - 1e-3).steps) == 3 and groups(gap + 1e-3).steps == []
    assert groups(gap + 1e-3).pools == 3


def test_a_step_scorer_that_returns_nan_is_named():
    class Broken:
        def score(self, x_t, *_):
            return torch.full((len(x_t),), torch.nan)

    walker = Walker(RolloutSettings(steps=4, start=0, guidance=1.0, step_scorer="mine"), Toy())
    with pytest.raises(DiffpoError, match=r"mine .*nan.*'a cat'"):
        one_walk(walker, Broken(), "a cat")


class Shift(torch.nn.Module):
    """A policy of one number, added to the toy's output."""

    def __init__(self, value=0.0):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))
        self.config = SimpleNamespace(in_channels=1)


class Shifted(Toy):
    def predict(self, network, x_t, t, cond):
        return 0.1 * x_t + network.value

    def latent_shape(self, network, resolution):
        return network.config.in_channels, resolution, resolution

    def decode(self, x_0):
        return x_0.repeat(1, 3, 1, 1)


class Still(Reference):
    def on(self):
        return nullcontext(replace(self.policy, network=Shift().requires_grad_(False)))


class Nothing:
    prompts, resolution = ("a", "b"), 2

    def __call__(self, indices, guidance=1.0):
        return Conditioning({"c": torch.zeros(len(indices), 1)})


@pytest.mark.parametrize("name", ["d3po", "pso", "spo"])
def test_training_raises_the_score_that_judges(monkeypatch, name):
    """The mean of x_0, with the same noise before and after twelve updates."""
    monkeypatch.setattr("diffpo.scorers.judge.scorers.load", lambda spec, device: Brightness())
    monkeypatch.setattr(round, "load_step_scorer", lambda spec, family, unet: StepBrightness())
    monkeypatch.setattr(round.ImageRounds, "_judged", lambda self, x_0, prompts: x_0.mean((1, 2, 3))[:, None].double())
    monkeypatch.setattr("diffpo.rollout.feed.trained.of", lambda unet: SimpleNamespace(state=dict))
    extra = {"step_scorer": "shapes.total", "start": 0, "threshold": 0.0} if name == "spo" else {}
    rollout = {"prompts": 64, "steps": 4, "guidance": 1.0, "scorers": ["shapes.total"], **extra}
    settings = ObjectiveSettings(name=name, beta=0.2, rollout=rollout)  # a larger one stops at a smaller step
    policy = Policy(Shifted(), Shift())
    still = Still(policy)
    kind = round.PoolRounds if name == "spo" else round.ImageRounds
    made = OnPolicy(kind(settings, Nothing(), policy, still, 0), ALONE, 192)
    optimizer = torch.optim.Adam(policy.network.parameters(), 0.02)
    for step in range(12):
        made.begin(step)
        outcome = score(policy, Objective(settings, still, torch.ones_like), made.regression(range(192)))
        optimizer.zero_grad()
        group_losses(outcome, settings, torch.tensor(0.0)).mean().backward()
        optimizer.step()
    walker, given = made.rounds.walker, Conditioning({"c": torch.zeros(512, 1)})
    x = torch.randn(512, 1, 2, 2, generator=torch.Generator().manual_seed(0))

    def images(network):
        draws = [torch.Generator().manual_seed(i) for i in range(512)]
        policy = Policy(Shifted(), network)
        return walker.trajectories(policy, x, draws, given)[:, -1].mean((1, 2, 3))

    gain = images(policy.network) - images(Shift())
    assert (gain > 0.05).all(), gain
