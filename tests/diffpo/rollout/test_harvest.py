from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffpo import models
from diffpo.common.errors import DiffpoError
from diffpo.config import ObjectiveSettings
from diffpo.problems.regression import Conditioning
from diffpo.rollout import groups as harvest
from diffpo.rollout import round


def record(scores, prompt=2):
    scores = torch.tensor(scores, dtype=torch.float64)
    return harvest.Sampled(0, prompt, torch.arange(len(scores)).float().view(-1, 1, 1, 1, 1), scores)


LINKS = {"pair": "sigmoid", "list": "plackett_luce", "single": "kto"}


def settings(link, source="samples", **rollout):
    rollout = {"scorers": ["a"], "samples": 8, **rollout}
    behaviour = {"policy": "sync" if link in ("clipped_ratio", "crd") else "none"}
    policy = "none" if link == "clipped_ratio" else "adapter_off"
    given = {"name": "online_dpo", "link": link, "source": source, "rollout": rollout, "behaviour": behaviour}
    kl = {"kl": 0.1} if link == "crd" else {}
    return ObjectiveSettings.model_validate({**given, **kl, "reference": {"policy": policy}})


def groups_of(records, chosen):
    return harvest.harvest(records, chosen, [], ["a"])[0]


def chosen(record, kind, **rollout):
    found = groups_of([record], settings(LINKS[kind], **rollout))
    return [([x.item() for x in group.x_0], group.preference) for group in found]


def test_samples_become_pairs_lists_and_likings():
    one = record([[0.2], [0.9], [0.1], [0.4]])
    assert chosen(one, "pair") == [([1, 2], 1.0)]
    assert chosen(one, "list") == [([1, 3, 0, 2], 1.0)]
    mean, std = np.mean([0.2, 0.9, 0.1, 0.4]), np.std([0.2, 0.9, 0.1, 0.4])
    liked = [np.clip((v - mean) / std / 5, -1, 1) / 2 + 0.5 for v in (0.2, 0.9, 0.1, 0.4)]
    assert [group[1] for group in chosen(one, "single")] == pytest.approx(liked)
    assert chosen(record([[1.0, 2.0], [1.0, 1.0], [2.0, 0.0]]), "pair") == [([0, 1], 1.0)]
    assert chosen(record([[0.5], [0.5]]), "single") == []


def test_noised_samples_are_the_forward_process_at_the_trainings_positions(feed):
    made = feed("diffusion_dpo", objective={"source": "samples"}, samples=3)
    made.begin(0)
    assert len(made.items) == 3
    found = made.regression([0, 1])
    assert found.judgement.members == 2 and found.weight is None and found.conditioning.uncond is None
    alpha, sigma = made.rounds.family.alpha_sigma(found.t)
    assert torch.equal(found.t[:2], found.t[2:]), "one timestep for a pair"
    items = [made.items[i] for i in (0, 1, 2)]
    x_0 = (found.x_t - sigma * found.target) / alpha  # epsilon-prediction: the target is the noise
    for x in x_0.unflatten(0, (2, 2)).transpose(0, 1):
        assert any(torch.allclose(x, torch.stack(item.x_0), atol=1e-3) for item in items)
    assert not torch.equal(made.regression([4, 5]).x_t, found.x_t), "other positions, other noise"


def test_self_play_puts_the_data_before_the_references_own_image(feed, tiny_sd, make_config):
    from diffpo.data.batches import Batches
    from diffpo.data.groups import load_groups

    config = make_config(tiny_sd)
    family = models.load(config.model)
    family.load_encoders()
    groups = load_groups(config.data, config.data.train, "train", "pair", quiet=True)
    batches = Batches(groups, config.data, family, 5)
    objective = {"source": "self_play", "forward": {"shared_noise": True}}
    made = feed("diffusion_dpo", objective=objective, batches=batches, guidance=1.0, scorers=[])
    metrics = made.begin(1)
    assert metrics["rollout/groups"] == 3
    found = made.regression([4])
    alpha, sigma = family.alpha_sigma(found.t)
    data, own = (found.x_t - sigma * found.target) / alpha
    item = next(item for item in made.items if torch.allclose(item.x_0, own, atol=1e-3))
    batch = batches.batch([item.index], [item.position])
    torch.testing.assert_close(data, batch.x_0[0], rtol=1e-3, atol=1e-3)
    with torch.no_grad(), made.rounds.reference.on() as base:  # the base samples, not the policy
        draw = made.rounds._draw(1, item.position - 3)
        noise = torch.randn(1, *own.shape, generator=draw)
        given = Conditioning({name: value[:1] for name, value in batch.cond.items()})
        states = made.rounds.walker.trajectories(base, noise, [draw], given)
    torch.testing.assert_close(states[0, -1], item.x_0, rtol=1e-4, atol=1e-4)


def test_self_play_imitates_no_disliked_image():
    def groups(members, *preferences):
        each = [SimpleNamespace(preference=preference) for preference in preferences]
        return SimpleNamespace(members=members, groups=each, source="here")

    assert round.worth_imitating(groups(1, 1.0, 0.0, 0.7)) == [0, 2]
    assert round.worth_imitating(groups(2, 1.0, 0.4)) == [0, 1]
    with pytest.raises(DiffpoError, match=r"^here .*self_play"):
        round.worth_imitating(groups(1, 0.0))
