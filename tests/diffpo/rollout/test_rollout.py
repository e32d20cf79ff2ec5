import numpy as np
import pytest
import torch
from on_policy import Brightness, shake

from diffpo.common.worker import Worker
from diffpo.rollout import round
from diffpo.weights import lora


def same(one, other, exactly=True):
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("x_t", "t", "target", "weight")]
    for a, b in [*pairs, (one.judgement.preference, other.judgement.preference)]:
        assert torch.equal(a, b) if exactly else torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    cond = other.conditioning.cond
    assert all(torch.equal(value, cond[key]) for key, value in one.conditioning.cond.items())


def test_a_round_gives_every_noisy_step_of_every_pair(feed):
    made = feed(samples=3)
    metrics = made.begin(0)
    assert metrics["rollout/groups"] == 3 * 3 * 3 and metrics["rollout/empty"] == 0  # prompts x pairs x noisy steps
    scores = Brightness()
    assert 0 < metrics["rollout/score"] < 1 and metrics["rollout/ties"] == 0
    assert made.begin(0) == {}
    for item in made.items:  # the chosen one ends brighter
        assert item.scores[0] > item.scores[1] and item.at.t > 249
    first = [item for item in made.items if item.at.t == 999]
    assert all(torch.equal(*item.x) for item in first), "the images of a prompt start from one noise"
    assert scores.names == tuple(made.rounds.judge.names)


def test_transitions_limit_the_steps_and_same_noise_can_be_switched_off(feed):
    made = feed("pso", transitions=2, same_noise=False)
    made.begin(0)
    assert {item.at.t for item in made.items} == {999, 749}
    assert not any(torch.equal(*item.x) for item in made.items)


def test_the_chain_of_a_trajectory_is_what_the_policy_samples(feed):
    """Each x' is a x + b out + s z with the policy's own guided output, and z is standard normal."""
    made = feed(prompts=1, same_noise=False)
    made.begin(0)
    residuals = []
    for item in made.items:
        given = made.rounds.conditions([item.prompt], 2.0)
        for x, target in zip(item.x, item.target, strict=True):
            with torch.no_grad():
                t = torch.tensor([item.at.t])
                family = made.rounds.family
                plain, without = (family.predict(made.network, x[None], t, each) for each in (given.cond, given.uncond))
            out = without + 2.0 * (plain - without)
            step = item.at.transition
            x_next = step.anchor * x + step.outputs[0] * target
            residuals.append((x_next - step.anchor * x - step.outputs[0] * out[0]) / step.std)
    z = torch.stack(residuals)
    assert abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.1


@pytest.mark.parametrize("name", ["d3po", "spo"])
def test_two_processes_and_small_batches_sample_the_same_round(feed, monkeypatch, name):
    options = {"start": 1, "threshold": 0.0} if name == "spo" else {}
    alone = feed(name, **options)
    alone.begin(3)
    monkeypatch.setattr(round, "LATENTS", 1)  # a prompt at a time
    two = [feed(name, Worker("cpu", process, 2), **options) for process in (0, 1)]
    shares = [each.rounds.sample(3, range(each.worker.index, 3, 2)) for each in two]
    assert [[record.place for record in share] for share in shares] == [[0, 2], [1]]
    for each in two:
        monkeypatch.setattr("accelerate.utils.gather_object", lambda share: shares[0] + shares[1])
        each.begin(3)
        assert [item.prompt for item in each.items] == [item.prompt for item in alone.items]
        same(each.regression(range(12, 16)), alone.regression(range(12, 16)), exactly=False)


@pytest.mark.parametrize("name", ["d3po", "spo", "diffusion_nft"])
def test_a_resumed_feed_samples_the_round_again_bit_for_bit(feed, name):
    options = {"start": 1, "threshold": 0.0} if name == "spo" else {"samples": 3}
    made = feed(name, updates=3, per_update=2, **options)
    made.begin(3)
    before = made.regression([6, 7])
    shake([p for p in made.network.parameters() if p.requires_grad], 1)  # an update
    made.begin(4)
    state = made.state()
    now = lora.lora_state(made.network)

    resumed = feed(name, updates=3, per_update=2, **options)
    lora.set_lora_state(resumed.network, now)
    resumed.load(state)
    assert all(torch.equal(now[key], value) for key, value in lora.lora_state(resumed.network).items())
    assert resumed.begin(5) == {}, "the round is not over"
    for positions in ([6, 7], [10, 11]):
        one, other = made.regression(positions), resumed.regression(positions)
        assert torch.equal(one.x_t, other.x_t) and torch.equal(one.target, other.target)
        assert torch.equal(one.judgement.preference, other.judgement.preference)
    assert torch.equal(made.regression([6, 7]).x_t, before.x_t)
    made.begin(5)
    assert made.state() == {}, "after its last update nothing is left to repeat"
    resumed.load({})


def test_every_group_is_visited_once_before_any_again_and_rounds_differ(feed):
    made = feed(per_update=3, updates=2)  # 6 visits of 9 groups
    made.begin(0)
    size = len(made.items)
    assert size == 9
    many = made.regression(range(6))
    assert len({tuple(x.flatten()[:4].tolist()) for x in many.target[:6]}) == 6
    first = made.items[0].x[0]
    made.begin(2)
    assert not torch.equal(first, made.items[0].x[0])


def test_prompts_of_rounds_go_through_the_list(feed):
    made = feed(prompts=5)
    prompts = [made.rounds._prompt(0, place) for place in range(5)]
    assert sorted(prompts) == [0, 1, 2, 3, 4]


def test_an_empty_round_is_counted_and_gives_nothing(feed, monkeypatch):
    monkeypatch.setattr(Brightness, "score", lambda self, images, prompts: {"shapes.total": np.ones(len(images))})
    made = feed()
    metrics = made.begin(0)
    assert metrics["rollout/empty"] == 1 and metrics["rollout/ties"] == 1 and metrics["rollout/groups"] == 0
    assert made.regression(range(4)) is None


def test_conditions_are_read_by_prompt(feed):
    made = feed()
    found = made.rounds.conditions([1, 1, 3], 2.0)
    prompted, empty = found.cond["prompt_embeds"], found.uncond["prompt_embeds"]
    assert torch.equal(prompted[0], prompted[1]) and not torch.equal(prompted[0], prompted[2])
    assert torch.equal(empty[0], empty[2])
    assert made.rounds.conditions([1]).uncond is None
