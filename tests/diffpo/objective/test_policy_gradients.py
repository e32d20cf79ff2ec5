"""Policy, behaviour policy and reference on a network of a few numbers: ratios, divergences and gradients against
torch's Normal and autograd."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffpo.config import ObjectiveSettings
from diffpo.data.judgement import Judgement
from diffpo.objective.reference import Reference
from diffpo.objective.reward import Objective, group_losses, score
from diffpo.problems.policy import Policy
from diffpo.problems.regression import Conditioning, Regression
from diffpo.problems.transitions import StepGroup, regression, sampler_steps
from diffpo.train.update import RATIO, compared, rows
from samplers import RectifiedFlow, VPDiscrete

N, SHAPE = 6, (2, 3, 3)
ADVANTAGES = torch.tensor([1.5, -0.7, 0.4, -2.0, 0.9, -0.1])


class Network(torch.nn.Module):
    """gain x + shift, of three numbers."""

    def __init__(self, gain=0.3, shift=(0.1, -0.2)):
        super().__init__()
        self.gain, self.shift = (torch.nn.Parameter(torch.tensor(value).double()) for value in (gain, shift))

    def forward(self, x):
        return self.gain * x + self.shift.view(1, 2, 1, 1)


class Family:
    """Predicts noise, or a flow's velocity, in float64."""

    train_timesteps = 1000

    def __init__(self, prediction):
        self.prediction = prediction
        self.schedule = RectifiedFlow(shift=3.0) if prediction == "flow" else VPDiscrete.scaled_linear()

    def predict(self, network, x_t, t, cond):
        return network(x_t.double())

    def alpha_sigma(self, t):
        time = (t.double() + 1) / 1000
        return tuple(
            torch.as_tensor(level(time)).view(-1, 1, 1, 1) for level in (self.schedule.alpha, self.schedule.sigma)
        )


class Old:
    """A behaviour policy that is another network."""

    def __init__(self, policy, network=None):
        self.policy, self.network, self.same = policy, network, network is None

    def on(self):
        return nullcontext(replace(self.policy, network=self.network.requires_grad_(False)))


class Base(Old, Reference):
    def __init__(self, policy, network):
        Old.__init__(self, policy, network)
        self.free = False


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.fixture(autouse=True)
def in_float64(monkeypatch):
    """The errors are float32 in training; here they show the formulas to 1e-10."""
    exact = lambda a, b, mask=None: (a - b).square().flatten(1).mean(1)  # noqa: E731
    monkeypatch.setattr("diffpo.objective.reward.squared_error", exact)


def made(name, prediction="flow", old=None, base=None, **settings):
    """(policy, objective, regression, steps): six steps of a sampler drawn by ``old`` or by the policy itself."""
    options = {"scorers": ["a"], "steps": 6, **settings.pop("rollout", {})}
    if prediction != "flow":
        options |= {"step": "ddim", "eta": 0.8}
    chosen = ObjectiveSettings(name=name, rollout=options, **settings)
    policy = Policy(Family(prediction), Network())
    steps = sampler_steps(chosen.rollout, policy.family.schedule, prediction)[:5]
    sampler = old or policy.network
    groups = []
    for i in range(N):
        step, x = steps[i % 5], random(1, *SHAPE, seed=i)
        with torch.no_grad():
            after = step.transition.sample(x, sampler(x), random(1, *SHAPE, seed=50 + i))
        advantage = ADVANTAGES[i].item()
        target = step.transition.target(x, after)[0]
        groups.append(StepGroup(0, step, (x[0],), (target,), None, float(advantage > 0), (advantage,)))
    reference = Reference(policy, free=True) if base is None else Base(policy, base)
    problem = regression(groups, lambda prompts: Conditioning({}), "cpu")
    problem = replace(problem, weight=torch.tensor([g.at.transition.weight for g in groups], dtype=torch.float64))
    objective = Objective(chosen, reference, lambda t: torch.ones(len(t)).double(), None, Old(policy, old))
    return policy, objective, problem, groups


def densities(network, groups):
    """log p of each drawn step under ``network``, a mean over its dimensions, by torch's Normal."""
    found = []
    for group in groups:
        step = group.at.transition
        after = step.mean(group.x[0][None], group.target[0][None])  # the state that was drawn
        found.append(Normal(step.mean(group.x[0][None], network(group.x[0][None])), step.std).log_prob(after).mean())
    return torch.stack(found)


def gradient(loss, network):
    return torch.cat(
        [each.flatten() for each in torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)]
    )


NAMES = ("ddpo", "ddpo_sf", "flow_grpo", "dance_grpo", "mix_grpo", "flow_dppo")


@pytest.mark.parametrize("prediction", ["flow", "epsilon"])
@pytest.mark.parametrize("name", NAMES)
def test_at_ratio_one_the_gradient_is_reinforces(name, prediction):
    extra = {"rollout": {"window": None}} if name == "mix_grpo" else {}
    policy, objective, problem, groups = made(name, prediction, base=None, **extra, **NO_KL)
    outcome = score(policy, objective, problem)
    assert torch.equal(outcome.more["log_ratio"], torch.zeros(N).double())
    losses = group_losses(outcome, objective.settings, torch.tensor(0.0))
    expected = -(ADVANTAGES.double() * densities(policy.network, groups))
    ours, theirs = gradient(losses.sum(), policy.network), gradient(expected.sum(), policy.network)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


NO_KL = {"kl": 0.0, "reference": {"policy": "none"}}


@pytest.mark.parametrize("prediction", ["flow", "epsilon"])
def test_the_ratio_is_that_of_the_densities_and_is_clipped_as_ppo_does(prediction):
    old = Network(0.32, (0.13, -0.18))
    policy, objective, problem, groups = made("flow_grpo", prediction, old, link_options={"clip": 5e-3}, **NO_KL)
    outcome = score(policy, objective, problem)
    log_ratio = (densities(policy.network, groups) - densities(old, groups)).detach()
    torch.testing.assert_close(outcome.more["log_ratio"].detach(), log_ratio, rtol=1e-9, atol=1e-10)
    losses, ratio = group_losses(outcome, objective.settings, torch.tensor(0.0)), log_ratio.exp()
    a, inside = ADVANTAGES.double(), ratio.clamp(1 - 5e-3, 1 + 5e-3)
    torch.testing.assert_close(losses.detach(), torch.maximum(-a * ratio, -a * inside))
    assert 0 < (ratio != inside).sum() < N
    for i in range(N):  # nothing is learnt from a sample whose ratio has gone beyond the clip with its advantage
        stopped = (ratio[i] - 1) * a[i] > 0 and ratio[i] != inside[i]
        assert (gradient(losses[i], policy.network).abs().max() == 0) == bool(stopped)


def test_both_divergences_are_those_of_the_gaussians():
    old, base = Network(0.35, (0.2, -0.1)), Network(0.2, (0.0, 0.0))
    policy, objective, problem, groups = made("flow_grpo", "flow", old, base, kl=0.7, behaviour={"kl": 0.3})
    outcome = score(policy, objective, problem)

    def kl(other):
        found = []
        for group in groups:
            step, x = group.at.transition, group.x[0][None]
            mine, theirs = (Normal(step.mean(x, network(x)), step.std) for network in (policy.network, other))
            found.append(kl_divergence(mine, theirs).mean())
        return torch.stack(found)

    torch.testing.assert_close(outcome.kl, kl(base), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(outcome.more["behaviour_kl"], kl(old), rtol=1e-9, atol=1e-12)
    plain = group_losses(replace(outcome, penalty=None), objective.settings, torch.tensor(0.0))
    losses = group_losses(outcome, objective.settings, torch.tensor(0.0))
    torch.testing.assert_close(losses - plain, 0.7 * kl(base) + 0.3 * kl(old), rtol=1e-9, atol=1e-12)
    metrics = compared(rows(outcome, losses, problem.t)[:, RATIO:], objective)
    assert metrics["kl/reference"] == pytest.approx(kl(base).mean().item(), rel=1e-4)
    assert metrics["ratio/mean"] == pytest.approx(outcome.more["log_ratio"].exp().mean().item(), rel=1e-5)


def test_grpo_guard_has_ratios_without_bias_and_gradients_of_one_size():
    """log rho~ = -b mean(z d), from the noise z that was drawn; over b the gradient is that of mean(z d) alone."""
    old = Network(0.32, (0.13, -0.18))
    policy, objective, problem, groups = made("grpo_guard", "flow", old, link_options={"clip": 0.9}, **NO_KL)
    outcome = score(policy, objective, problem)
    losses = group_losses(outcome, objective.settings, torch.tensor(0.0))
    expected = []
    for i, group in enumerate(groups):
        step, x, z = group.at.transition, group.x[0][None], random(1, *SHAPE, seed=50 + i)
        b = step.outputs[0]
        moved = (z * (policy.network(x) - old(x))).mean() * math.copysign(1, b)
        expected.append(-ADVANTAGES[i].double() * (abs(b) * moved).exp() / abs(b))
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-5, atol=1e-7)  # std is float32 in a regression
    plain = outcome.more["log_ratio"]
    bias = (plain + outcome.more["behaviour_kl"]).detach()
    assert torch.all(bias > plain.detach())


def test_a_trust_region_stops_what_leaves_it_and_nothing_else():
    old = Network(0.32, (0.13, -0.18))
    policy, objective, problem, _ = made("flow_dppo", "flow", old, link_options={"limit": 1e-9}, **NO_KL)
    outcome = score(policy, objective, problem)
    losses, log_ratio = group_losses(outcome, objective.settings, torch.tensor(0.0)), outcome.more["log_ratio"].detach()
    torch.testing.assert_close(losses.detach(), -ADVANTAGES.double() * log_ratio.exp())
    leaving = (log_ratio * ADVANTAGES > 0).tolist()
    assert [gradient(loss, policy.network).abs().max().item() == 0 for loss in losses] == leaving
    wide = replace(objective, settings=objective.settings.model_copy(update={"link_options": {"limit": 1e9}}))
    assert all(gradient(loss, policy.network).abs().max() > 0 for loss in group_losses(outcome, wide.settings, None))


def noised(prediction, members, advantages, seed=3):
    """Images with noise, as source samples makes them: N rows of ``members``."""
    family = Family(prediction)
    t = torch.tensor([100, 400, 700, 250, 600, 900][: N // members]).repeat(members)
    x_0, eps = random(N, *SHAPE, seed=seed), random(N, *SHAPE, seed=seed + 1)
    alpha, sigma = family.alpha_sigma(t)
    target = eps - x_0 if prediction == "flow" else eps
    table = advantages.double().view(members, -1)
    judgement = Judgement((table[0] > 0).double(), members, None, table)
    return x_0, Regression(alpha * x_0 + sigma * eps, t, target, Conditioning({}), judgement)


@pytest.mark.parametrize("prediction", ["flow", "epsilon"])
def test_nft_in_full(prediction):
    """5 [liked |x_0+ - x_0|^2/mean|.| + (1 - liked) ...]/b + w |v - v_base|^2, from x_0 itself."""
    old, base, mix = Network(0.32, (0.13, -0.18)), Network(0.2, (0.0, 0.0)), 0.4
    policy = Policy(Family(prediction), Network())
    chosen = ObjectiveSettings(name="diffusion_nft", link_options={"mix": mix}, rollout={"scorers": ["a"]}, kl=0.2)
    x_0, problem = noised(prediction, 1, ADVANTAGES)
    liked = torch.linspace(0, 1, N).double()
    problem = replace(problem, judgement=replace(problem.judgement, preference=liked))
    objective = Objective(chosen, Base(policy, base), lambda t: torch.ones(len(t)).double(), None, Old(policy, old))
    losses = group_losses(score(policy, objective, problem), chosen, torch.tensor(0.0))
    alpha, sigma = policy.family.alpha_sigma(problem.t)
    out, before = policy.network(problem.x_t), old(problem.x_t)
    branches = []
    for sign in (1, -1):
        mirrored = before + sign * mix * (out - before)
        image = problem.x_t - sigma * mirrored if prediction == "flow" else (problem.x_t - sigma * mirrored) / alpha
        error = image - x_0
        branches.append(error.square().mean((1, 2, 3)) / error.detach().abs().mean((1, 2, 3)))
    drift = (out - base(problem.x_t)).square().mean((1, 2, 3))
    expected = 5 * (liked * branches[0] + (1 - liked) * branches[1]) / mix + 0.2 * drift
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)  # predictions are float32 in links
    ours, theirs = gradient(losses.sum(), policy.network), gradient(expected.sum(), policy.network)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_awm_at_ratio_one_is_the_advantage_times_the_pretraining_loss():
    policy = Policy(Family("flow"), Network())
    chosen = ObjectiveSettings(name="awm", rollout={"scorers": ["a"]}, **NO_KL)
    _, problem = noised("flow", 1, ADVANTAGES)
    objective = Objective(
        chosen, Reference(policy, free=True), lambda t: torch.ones(len(t)).double(), None, Old(policy)
    )
    losses = group_losses(score(policy, objective, problem), chosen, torch.tensor(0.0))
    torch.testing.assert_close(losses.detach(), -ADVANTAGES.double())
    errors = (policy.network(problem.x_t) - problem.target).square().mean((1, 2, 3))
    weighted = gradient((ADVANTAGES.double() * errors).sum(), policy.network)
    torch.testing.assert_close(gradient(losses.sum(), policy.network), weighted, rtol=1e-9, atol=1e-9)


def test_dgpo_has_the_published_gradient():
    """sigma(beta/2 mean A (err - err_ref)) A_i grad err_i beta/2, the released code's form."""
    base = Network(0.2, (0.0, 0.0))
    policy = Policy(Family("flow"), Network())
    chosen = ObjectiveSettings(name="dgpo", beta=3.0, rollout={"scorers": ["a"]})
    _, problem = noised("flow", 3, ADVANTAGES)
    objective = Objective(chosen, Base(policy, base), lambda t: torch.ones(len(t)).double())
    losses = group_losses(score(policy, objective, problem), chosen, torch.tensor(0.0))
    errors, before = (
        (net(problem.x_t) - problem.target).square().mean((1, 2, 3)).view(3, 2) for net in (policy.network, base)
    )
    a = ADVANTAGES.double().view(3, 2)
    factor = ((3.0 / 2) * a * (errors - before)).mean(0).sigmoid().detach()
    published = (factor * a * errors).mean(0).sum() * 3.0 / 2
    ours = gradient(losses.sum(), policy.network)
    torch.testing.assert_close(ours, gradient(published, policy.network), rtol=1e-9, atol=1e-9)


def test_hybrid_dpo_takes_a_pessimistic_reference_for_a_neutral_one():
    base = Network(0.2, (0.0, 0.0))
    policy = Policy(Family("flow"), Network())
    chosen = ObjectiveSettings(name="hybrid_dpo", beta=20.0)
    _, problem = noised("flow", 2, ADVANTAGES)
    problem = replace(problem, judgement=Judgement(torch.ones(3).double()))
    objective = Objective(chosen, Base(policy, base), lambda t: torch.ones(len(t)).double())
    losses = group_losses(score(policy, objective, problem), chosen, torch.tensor(0.0))
    own, theirs = (
        (net(problem.x_t) - problem.target).square().mean((1, 2, 3)).chunk(2) for net in (policy.network, base)
    )
    margin, reference = own[1] - own[0], theirs[1] - theirs[0]
    assert (reference < 0).any() and (reference > 0).any()
    expected = -torch.nn.functional.logsigmoid(10.0 * (margin - reference.clamp(min=0)))
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("name", ["ddpo", "flow_grpo", "grpo_guard", "awm", "crd", "dgpo", "flow_dppo"])
def test_mirrored_advantages_mirror_the_gradient_at_the_start(name):
    """Where policy and behaviour policy agree, and the reference too, -A has minus the gradient of A."""
    found = []
    for sign in (1, -1):
        policy = Policy(Family("flow"), Network())
        chosen = ObjectiveSettings(name=name, rollout={"scorers": ["a"], "steps": 6})
        if chosen.source == "samples":
            _, problem = noised("flow", 1 if name == "awm" else 3, sign * ADVANTAGES)
        else:
            policy, _, problem, _ = made(name)
            judgement = replace(problem.judgement, advantages=sign * problem.judgement.advantages)
            problem = replace(problem, judgement=judgement)
        base = Base(policy, Network())
        objective = Objective(chosen, base, lambda t: torch.ones(len(t)).double(), None, Old(policy))
        losses = group_losses(score(policy, objective, problem), chosen, torch.tensor(0.0))
        found.append(gradient(losses.sum(), policy.network))
    assert found[0].abs().max() > 1e-6
    torch.testing.assert_close(found[0], -found[1], rtol=1e-6, atol=1e-9)


def test_crd_is_least_where_centred_ratios_are_centred_rewards():
    from diffpo import links

    advantages = ADVANTAGES.double().view(3, 2)
    solved = 0.1 * advantages + torch.tensor([0.7, -2.0])  # any constant for each prompt
    assert links.losses("crd", {}, {"log_ratios": solved, "advantages": advantages}).abs().max() < 1e-20
    q = (solved + 0.1 * random(3, 2, seed=2)).requires_grad_()
    loss = links.losses("crd", {}, {"log_ratios": q, "advantages": advantages})
    (slope,) = torch.autograd.grad(loss.sum(), q)
    torch.testing.assert_close(slope.sum(0), torch.zeros(2).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("prediction", ["flow", "epsilon"])
def test_the_score_of_new_samples_rises(prediction):
    """Thirty rounds of two updates on the toy, whose score is minus the distance of x_0's channel means to a colour."""
    chosen = {"step": "ddim", "eta": 0.9} if prediction == "epsilon" else {"step": "flow_sde"}
    settings = ObjectiveSettings(
        name="ddpo", link_options={"clip": 0.2}, rollout={**chosen, "scorers": ["a"], "steps": 6}
    )
    policy = Policy(Family(prediction), Network())
    steps = sampler_steps(settings.rollout, policy.family.schedule, prediction)
    colour, optimizer = torch.tensor([0.4, -0.3]).double(), torch.optim.Adam(policy.network.parameters(), 0.02)

    def walk(seed, n=32):
        x, groups = random(n, *SHAPE, seed=seed), []
        with torch.no_grad():
            for k, step in enumerate(steps):
                out = policy.network(x)
                after = step.transition.sample(x, out, random(n, *SHAPE, seed=1000 * seed + k))
                if step.transition.std:
                    groups += list(zip([step] * n, x, step.transition.target(x, after), range(n), strict=True))
                x = after
        return groups, -(x.mean((2, 3)) - colour).square().sum(1)

    before = walk(999, 512)[1].mean()
    for number in range(1, 31):
        walked, scores = walk(number)
        merits = ((scores - scores.mean()) / scores.std()).tolist()
        groups = [StepGroup(0, s, (x,), (y,), None, 1.0, (merits[i],)) for s, x, y, i in walked]
        problem = regression(groups, lambda prompts: Conditioning({}), "cpu")
        old = Network()
        old.load_state_dict(policy.network.state_dict())
        for update in range(2):
            behaviour = Old(policy, old if update else None)
            ones = lambda t: torch.ones(len(t)).double()  # noqa: E731
            objective = Objective(settings, Reference(policy, free=True), ones, None, behaviour)
            optimizer.zero_grad()
            group_losses(score(policy, objective, problem), settings, torch.tensor(0.0)).mean().backward()
            optimizer.step()
    after = walk(999, 512)[1].mean()
    assert after > before / 2, (before, after)  # the mean squared distance is halved
