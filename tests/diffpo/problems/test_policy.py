"""A network as a policy: guidance, autocast, and the same network with another adapter."""

from contextlib import contextmanager

import pytest
import torch

from diffpo import models
from diffpo.config import Lora, Model
from diffpo.data.judgement import Judgement
from diffpo.problems.policy import Policy
from diffpo.problems.regression import Conditioning, Regression
from diffpo.weights import lora
from samplers.prediction import guide


class Linear:
    """A family whose network's output is x_t + the condition."""

    guided = staticmethod(guide)

    def __init__(self):
        self.rows = []

    def predict(self, network, x_t, t, cond):
        self.rows.append(len(x_t))
        return x_t + (t + cond["c"]).view(-1, 1, 1, 1)


def cond(*values):
    return {"c": torch.tensor(values)}


def test_guidance_is_one_call_of_twice_the_rows():
    family, x, t = Linear(), torch.zeros(2, 1, 2, 2), torch.tensor([10, 20])
    found = Policy(family, None).output(x, t, Conditioning(cond(1.0, 2.0), cond(0.5, 0.5), 3.0))
    assert found[:, 0, 0, 0].tolist() == [10 + 0.5 + 3 * 0.5, 20 + 0.5 + 3 * 1.5] and family.rows == [4]


def test_rows_are_repeated_one_after_the_other():
    found = Conditioning(cond(1.0, 2.0), cond(0.0, 3.0), 3.0).repeat_interleave(2)
    assert found.cond["c"].tolist() == [1, 1, 2, 2] and found.uncond["c"].tolist() == [0, 0, 3, 3]
    assert found.guidance == 3 and Conditioning(cond(1.0)).repeat_interleave(2).uncond is None


def test_every_prediction_runs_under_the_runs_autocast():
    inside = []

    @contextmanager
    def autocast():
        inside.append(True)
        yield
        inside.pop()

    class Looking(Linear):
        def predict(self, *given):
            assert inside
            return super().predict(*given)

    x, t = torch.zeros(2, 1, 2, 2), torch.tensor([1, 2])
    problem = Regression(x, t, x, Conditioning(cond(1.0, 2.0)), Judgement(torch.ones(1)))
    assert Policy(Looking(), None, autocast).predict(problem)[:, 0, 0, 0].tolist() == [2, 4] and not inside
    with pytest.raises(AssertionError):
        Policy(Looking(), None).predict(problem)


def test_switched_off_it_is_the_base_model_without_gradients(tiny_sd):
    family = models.load(Model(path=str(tiny_sd)))
    policy = Policy(family, family.load_network())
    given = Conditioning({"prompt_embeds": torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))})
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 700])
    before = policy.output(x, t, given)
    for parameter in lora.add_lora(policy.network, Lora(rank=2), family.lora_targets):
        torch.nn.init.normal_(parameter, std=0.3)
    with policy.switched(None) as base:
        found = base.output(x, t, given)
    assert torch.equal(found, before) and not found.requires_grad
    after = policy.output(x, t, given)
    assert after.requires_grad and not torch.allclose(after, before, atol=1e-3)
