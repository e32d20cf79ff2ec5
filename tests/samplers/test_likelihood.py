"""Log densities along the probability-flow ODE against the closed form of a Gaussian mixture."""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from samplers import EDM, RectifiedFlow, VPDiscrete, VPLinear, build_plan
from samplers.likelihood import bits_per_dim, log_prob

VP = VPLinear()
MODELS = {  # schedule, prediction
    "vp": (VP, "epsilon"),
    "sd": (VPDiscrete.scaled_linear(), "v_prediction"),
    "edm": (EDM(0.01, 50.0), "sample"),
    "flow": (RectifiedFlow(t_min=0.01), "flow"),
}


def density(mixture, x, alpha, sigma):
    """log p_t(x) of the mixture, by torch.distributions."""
    spread = (alpha**2 * mixture.stds.flatten(1) ** 2 + sigma**2).sqrt()
    parts = Independent(Normal(alpha * mixture.means.flatten(1), spread), 1)
    return MixtureSameFamily(Categorical(mixture.weights), parts).log_prob(x.flatten(1))


def data(mixture, schedule, n=8):
    """Samples of the mixture at t_min, and the log density there."""
    draw = torch.Generator().manual_seed(1)
    which = torch.multinomial(mixture.weights, n, True, generator=draw)
    x_0, eps = torch.randn(2, n, 1, 1, 2, generator=draw, dtype=torch.float64)
    alpha, sigma = float(schedule.alpha(schedule.t_min)), float(schedule.sigma(schedule.t_min))
    x = alpha * (mixture.means[which] + mixture.stds[which] * x_0) + sigma * eps
    return x, density(mixture, x, alpha, sigma)


def to_noise(schedule, solver, calls, prediction="epsilon", **options):
    ends = {"t_start": schedule.t_min, "t_end": schedule.t_max, "end": "t_end"}
    return build_plan(schedule, solver, calls, prediction=prediction, **ends, **options)


def error(mixture, schedule, prediction, solver, calls, **options):
    """The largest error of 8 log densities, with the mixture's own density at t_max in place of N(0, scale^2)."""
    x, expected = data(mixture, schedule)
    plan, scale = to_noise(schedule, solver, calls, prediction, **options), schedule.init_scale
    found = log_prob(plan, mixture.model(schedule, prediction), x, scale=scale, probes=None)
    end = [float(f(schedule.t_max)) for f in (schedule.alpha, schedule.sigma)]
    assumed = Normal(0.0, scale).log_prob(found.latent).flatten(1).sum(1)
    exact = found.log_prob - assumed + density(mixture, found.latent, *end)
    return (exact - expected).abs().max().item()


@pytest.mark.parametrize("name", MODELS)
def test_log_density_of_a_mixture(mixture, name):
    schedule, prediction = MODELS[name]
    assert error(mixture, schedule, prediction, "abm", 100) < 1e-4


@pytest.mark.parametrize(
    ("solver", "options", "order"),
    [
        ("ddim", {}, 1),
        ("heun", {}, 2),
        ("unipc", {"order": 2, "target": "epsilon", "lower_order_final": False}, 3),
        ("runge_kutta", {"method": "4rk"}, 4),
    ],
)
def test_it_has_the_order_of_the_solver(mixture, solver, options, order):
    coarse, fine = (error(mixture, VP, "epsilon", solver, n, **options) for n in (80, 160))
    assert abs(math.log2(coarse / fine) - order) < 0.3, f"errors {coarse:.2e}, {fine:.2e}"


def test_random_signs_are_unbiased_and_do_not_depend_on_the_batch(mixture):
    """In two dimensions v J v is the trace and twice the product of the signs times J's other entries (J is symmetric),
    so an estimate has one of two values, and the trace's is in the middle."""
    plan, model, n = to_noise(VP, "abm", 10), mixture.model(VP), 40
    x = data(mixture, VP)[0][:1].expand(n, -1, -1, -1)
    exact = log_prob(plan, model, x[:1], probes=None).log_prob.item()
    draws = [torch.Generator().manual_seed(i) for i in range(n)]
    found = log_prob(plan, model, x, generator=draws).log_prob
    low, high = found.min().item(), found.max().item()
    assert high - low > 0.01
    assert (torch.minimum(found - low, high - found) < 1e-10).all()
    assert abs((low + high) / 2 - exact) < 1e-10
    alone = log_prob(plan, model, x[3:4], generator=[torch.Generator().manual_seed(3)]).log_prob
    assert abs(alone.item() - found[3].item()) < 1e-10
    both = log_prob(plan, model, x, probes=200, generator=torch.Generator().manual_seed(0)).log_prob
    assert (both - exact).abs().max() < 4 * (high - low) / 2 / math.sqrt(200)


def test_the_latent_leads_back(mixture):
    x, _ = data(mixture, VP)
    found = log_prob(to_noise(VP, "abm", 200), mixture.model(VP), x.float())
    assert found.latent.dtype == torch.float32 and found.log_prob.dtype == torch.float64
    back = build_plan(VP, "abm", 200, end="t_end").run(mixture.model(VP), found.latent)
    assert (back - x).abs().max() < 1e-4


def test_bits_of_uniform_pixels_are_8():
    """Uniform over 256 levels: density 127.5 / 256 for each number, which is 8 bits."""
    assert abs(bits_per_dim(torch.tensor(12 * math.log(127.5 / 256)), 12).item() - 8) < 1e-6


def test_what_has_no_density_is_refused(mixture):
    x, model = torch.zeros(2, 1, 1, 2), mixture.model(VP)
    for plan, word in [
        (to_noise(VP, "evodiff", 4), "evodiff"),
        (build_plan(VP, "ddim", 4, eta=1.0), "ddim"),
        (build_plan(VP, "ddim", 4), "t_start"),
    ]:
        with pytest.raises(ValueError, match=word):
            log_prob(plan, model, x)
    with pytest.raises(ValueError, match="probes"):
        log_prob(to_noise(VP, "ddim", 4), model, x, probes=0)
