from types import SimpleNamespace

import pytest
import torch
from tiny_transformers import make_sd3

from diffpo import models
from diffpo.common.errors import DiffpoError
from diffpo.common.rng import generator
from diffpo.common.worker import ALONE, Worker
from diffpo.config import Lora, Model
from diffpo.data.judgement import Judgement
from diffpo.objective import weighting
from diffpo.problems.policy import Policy
from diffpo.problems.regression import Conditioning, Regression
from diffpo.weights import lora

T = torch.arange(1000)


def alpha_bar(family) -> torch.Tensor:
    """By the betas' own formula: scaled linear from 0.00085 to 0.012."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def test_uniform_is_one(tiny_sd):
    omega = weighting.make("uniform", models.load(Model(path=str(tiny_sd))))
    assert torch.equal(omega(T), torch.ones(1000)) and omega(T).dtype == torch.float32


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sd_v"])
def test_min_snr_weighs_the_error_of_x_0_by_the_clipped_snr(request, name):
    """err_eps = snr err_x0 and err_v = (snr + 1) err_x0, so omega times these is min(snr, 5)."""
    family = models.load(Model(path=str(request.getfixturevalue(name))))
    snr = alpha_bar(family) / (1 - alpha_bar(family))
    assert snr.min() < 0.01 and snr.max() > 1000
    omega = weighting.make("min_snr", family)(T).double()
    of_x_0 = omega * (snr if family.prediction == "epsilon" else snr + 1)
    torch.testing.assert_close(of_x_0, snr.clamp(max=5), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("prediction", "last"), [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_min_snr_is_finite_where_there_is_no_signal_and_where_there_is_no_noise(prediction, last):
    ends = torch.tensor([1.0, 0.0]).view(-1, 1, 1, 1)
    family = SimpleNamespace(
        train_timesteps=2, prediction=prediction, alpha_sigma=lambda t: (ends[t], (1 - ends**2).sqrt()[t])
    )
    assert weighting.make("min_snr", family)(torch.tensor([0, 1])).tolist() == [0.0, last]


def test_min_snr_of_a_flow_weighs_the_error_of_x_0_too(tmp_path):
    """x_0 = x_t - sigma v, so err_x0 = sigma^2 err_v."""
    family = models.load(Model(path=str(make_sd3(tmp_path))))
    alpha, sigma = (level.flatten().double() for level in family.alpha_sigma(T))
    omega = weighting.make("min_snr", family)(T).double()
    torch.testing.assert_close(omega / sigma**2, ((alpha / sigma) ** 2).clamp(max=5), rtol=1e-4, atol=0)


class FakeBatches:
    """Groups whose x_0 is their index; the draws of a position are the position's alone."""

    groups = range(10)

    def batch(self, indices, positions, purpose):
        assert purpose == "weighting"
        return SimpleNamespace(indices=indices, positions=positions)


def source(batch):
    t = torch.stack([torch.randint(0, 1000, (), generator=generator(0, "t", p)) for p in batch.positions]).repeat(2)
    x_t = torch.tensor(batch.indices, dtype=torch.float32).repeat(2).view(-1, 1, 1, 1)
    return Regression(x_t, t, x_t, Conditioning({}), Judgement(torch.ones(len(batch.indices))))


def adapted(path):
    family = models.load(Model(path=str(path)))
    unet = family.load_network()
    lora.add_lora(unet, Lora(rank=2), family.lora_targets)
    return family, unet


def measured(error, path, rows=7, processes=1, monkeypatch=None):
    policy = Policy(*adapted(path))
    if processes == 1:
        return weighting.measure(policy, error, source, FakeBatches(), rows, ALONE)
    parts: list = []
    monkeypatch.setattr("accelerate.utils.gather_object", lambda found: parts.extend(found) or list(parts))
    for index in range(processes):
        result = weighting.measure(policy, error, source, FakeBatches(), rows, Worker("cpu", index, processes))
    return result


def test_measured_equalises_an_analytic_error(tiny_sd):
    """Of a Gaussian x_0 ~ N(0, s^2), E|eps - eps^|^2 = alpha^2 s^2 / (alpha^2 s^2 + sigma^2) (posterior variance)."""
    family, unet = adapted(tiny_sd)

    def error(_, regression):
        alpha, sigma = (each.flatten() for each in family.alpha_sigma(regression.t))
        return 0.25 * alpha**2 / (0.25 * alpha**2 + sigma**2)

    errors = weighting.measure(Policy(family, unet), error, source, FakeBatches(), 16, ALONE)
    omega = weighting.make("measured", family, errors)(T).double()
    assert omega.mean() == pytest.approx(1, abs=1e-6)
    a = alpha_bar(family)
    truth = 0.25 * a / (0.25 * a + 1 - a)
    raw, weighted = ((x.unflatten(0, (8, 125)).mean(1)) for x in (truth, omega * truth))
    assert raw.max() / raw.min() > 30 and weighted.max() / weighted.min() < 1.6
    # constant within a bin, and rising as the error falls
    assert len(omega.unique()) == weighting.BINS and (omega.diff() >= 0).all()


def test_measured_does_not_depend_on_processes_or_batches(tiny_sd, monkeypatch):
    def error(_, regression):
        return (regression.x_t.flatten() + 1) * (1 + regression.t / 500).sqrt()

    alone = measured(error, tiny_sd)
    assert torch.equal(measured(error, tiny_sd, rows=64), alone)
    assert torch.equal(measured(error, tiny_sd, processes=3, monkeypatch=monkeypatch), alone)


def test_measured_asks_the_base_and_not_the_trained_policy(tiny_sd):
    family, unet = adapted(tiny_sd)
    seen = []

    def error(base, regression):
        assert not torch.is_grad_enabled()
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        cond = {"prompt_embeds": torch.ones(2, 7, 16)}
        seen.append(family.predict(base.network, x, torch.tensor([5, 500]), cond))
        return torch.ones(len(regression.t))

    def one():
        weighting.measure(Policy(family, unet), error, source, FakeBatches(), weighting.DRAWS, ALONE)
        return seen.pop()

    before = one()
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert torch.equal(one(), before)


def test_an_empty_bin_takes_the_nearest_mean():
    table = weighting.by_bin([0, 10, 990], [1.0, 3.0, 8.0], 1000)
    assert table[:500].tolist() == [2.0] * 500 and table[500:].tolist() == [8.0] * 500


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_errors_that_have_no_inverse_are_refused(bad):
    with pytest.raises(DiffpoError, match=r"objective\.weighting=measured"):
        weighting.by_bin([0, 999], [1.0, bad], 1000)
