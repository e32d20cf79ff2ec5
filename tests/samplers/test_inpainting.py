"""Inpainting by replacement: its exact moments on a Gaussian, against their recursion and against the posterior."""

import itertools
import math

import numpy as np
import pytest
import torch

from samplers import EDM, VPDiscrete, build_plan, inpaint

SD = VPDiscrete.scaled_linear()
STD, CORRELATION, MEAN, KNOWN = 0.5, 0.8, torch.tensor([0.3, -0.2], dtype=torch.float64), 1.0
COVARIANCE = STD**2 * torch.tensor([[1.0, CORRELATION], [CORRELATION, 1.0]], dtype=torch.float64)
POSTERIOR = -0.2 + CORRELATION * (KNOWN - 0.3), STD**2 * (1 - CORRELATION**2)
SHARES, VARIANCES = [0.57, 0.74, 0.89, 0.94], [1.10, 0.94, 0.83, 0.79]  # for 1, 2, 5 and 10 rounds


def known(x):
    """KNOWN in the first number of each sample, the second unknown."""
    return torch.tensor([KNOWN, math.nan], dtype=torch.float64).expand_as(x)


def network(x, label, schedule=SD, covariance=COVARIANCE):
    """The exact noise prediction for N(MEAN, covariance)."""
    t = schedule.t_of_model_time(float(label))
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    marginal = alpha**2 * covariance + sigma**2 * torch.eye(2, dtype=torch.float64)
    return sigma * torch.linalg.solve(marginal, (x - alpha * MEAN).T).T


def moments(plan, rounds=1, model=network):
    """Exact mean and variance of the unknown number: the result is affine in every number that is drawn, so a batch of
    one draw set to 1 at a time gives all of it."""
    draws = []

    class Units:
        """Stands in for `randn`: draw i, number j is 1 in row 1 + 2 i + j of the batch, and 0 elsewhere."""

        def __call__(self, shape, *rest):
            value = torch.zeros(shape, dtype=torch.float64)
            for j in range(2):
                value[1 + 2 * len(draws) + j, j] = 1.0
            draws.append(value)
            return value

    count = 3 * rounds * len(plan) + 4  # more than are drawn
    x = torch.zeros(2 * count + 3, 2, dtype=torch.float64)
    x[-1, 1] = 1.0  # the initial noise of the unknown number
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("samplers.inpainting.randn", Units())
        out = inpaint(plan, model, x, known(x), rounds=rounds)
    assert (out[:, 0] == KNOWN).all() and len(draws) <= count
    return out[0, 1].item(), (out[1:, 1] - out[0, 1]).square().sum().item()


def recursion(calls, rounds):
    """The same moments for ddim with eta = 1, written out: the unknown number is u' = a u + b w + c + s z in each step
    (DDIM, arXiv 2010.02502, eq. 12 and 16), where w = alpha KNOWN + sigma z is the known one with new noise."""
    plan = build_plan(SD, "ddim", calls)
    levels = list(zip(plan.alpha, plan.sigma, strict=True))
    prior, center = COVARIANCE.numpy(), MEAN.numpy()
    mean, variance = 0.0, 1.0
    for (a_s, s_s), (a_t, s_t) in itertools.pairwise(levels):
        gain = a_s * prior @ np.linalg.inv(a_s**2 * prior + s_s**2 * np.eye(2))  # of E[x_0 | x] = center + gain (...)
        new = s_t / s_s * math.sqrt(1 - a_s**2 / a_t**2)
        old = math.sqrt(s_t**2 - new**2) / s_s
        to_u = (a_t - old * a_s) * gain[1] + np.array([0.0, old])
        shift = (a_t - old * a_s) * (center[1] - gain[1] @ (a_s * center))
        keep = a_s / a_t
        for left in reversed(range(rounds if s_t else 1)):
            mean = to_u @ [a_s * KNOWN, mean] + shift
            variance = to_u**2 @ [s_s**2, variance] + new**2
            if left:
                mean, variance = keep * mean, keep**2 * variance + s_s**2 - (keep * s_t) ** 2
    return mean, variance


@pytest.mark.parametrize("solver", ["ddim", "dpmpp", "abm"])
def test_without_correlation_the_unknown_number_is_that_of_the_plan(solver):
    plan = build_plan(SD, solver, 20)
    model = lambda x, label: network(x, label, covariance=STD**2 * torch.eye(2, dtype=torch.float64))  # noqa: E731
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = inpaint(plan, model, x, known(x))
    assert (found[:, 0] == KNOWN).all()
    assert (found - plan.run(model, x))[:, 1].abs().max() < 1e-12


@pytest.mark.parametrize(("calls", "rounds"), [(20, 1), (20, 2), (7, 5)])
def test_moments_are_those_of_the_recursion(calls, rounds):
    found = moments(build_plan(SD, "ddim", calls, eta=1.0), rounds)
    np.testing.assert_allclose(found, recursion(calls, rounds), rtol=1e-9)


def test_how_far_it_is_from_the_posterior():
    """The numbers of the module's docstring: the share of the way from the prior's mean to the posterior's, and the
    variance over the posterior's. With rounds and steps both go to 1."""
    found = np.array([recursion(20, rounds) for rounds in (1, 2, 5, 10)])
    np.testing.assert_allclose((found[:, 0] - MEAN[1].item()) / (POSTERIOR[0] - MEAN[1].item()), SHARES, atol=5e-3)
    np.testing.assert_allclose(found[:, 1] / POSTERIOR[1], VARIANCES, atol=5e-3)
    mean, variance = recursion(400, 50)
    assert abs(mean - POSTERIOR[0]) < 0.02 * (POSTERIOR[0] - MEAN[1].item())
    assert abs(variance / POSTERIOR[1] - 1) < 0.02


def test_noise_is_that_of_the_generators_whatever_the_batch():
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = build_plan(SD, "ddim", 6, eta=1.0)
    seeds = [torch.Generator().manual_seed(i) for i in range(3)]
    found = inpaint(plan, network, x, known(x), rounds=2, generator=seeds)
    alone = inpaint(plan, network, x[1:2], known(x[1:2]), rounds=2, generator=[torch.Generator().manual_seed(1)])
    assert torch.allclose(found[1:2], alone, atol=1e-12)


def test_the_end_at_t_end_has_noise_in_the_known_part():
    schedule = EDM(0.1, 50.0)
    plan = build_plan(schedule, "ddim", 8, end="t_end")
    x = 50 * torch.randn(4000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = lambda x, label: network(x, label, schedule)  # noqa: E731
    draw = torch.Generator().manual_seed(1)
    out = inpaint(plan, model, x, known(x), generator=draw)
    assert abs(out[:, 0].mean() - KNOWN) < 4 * 0.1 / math.sqrt(4000) and abs(out[:, 0].std() - 0.1) < 0.006


@pytest.mark.parametrize(
    ("plan", "options", "word"),
    [
        (("heun", {}), {}, "heun"),
        (("dpmpp", {}), {"rounds": 2}, "dpmpp"),
        (("ddim", {}), {"rounds": 0}, "rounds"),
        (("ddim", {}), {"known": torch.zeros(2)}, "known"),
        (("ddim", {"t_start": SD.t_min, "t_end": 1.0, "end": "t_end"}), {}, "ddim"),
    ],
)
def test_what_does_not_fit_is_refused(plan, options, word):
    x = torch.zeros(1, 2, dtype=torch.float64)
    given = {"known": known(x), **options}
    with pytest.raises(ValueError, match=word):
        inpaint(build_plan(SD, plan[0], 5, **plan[1]), network, x, **given)
