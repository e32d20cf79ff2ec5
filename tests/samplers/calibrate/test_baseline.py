"""The choice among classical plans, on a mixture whose score has a closed form."""

from __future__ import annotations

import numpy as np
import torch

from samplers import VPDiscrete
from samplers.analytic import GaussianMixture
from samplers.calibrate import Batch, Problem, baseline, classical, errors, reference
from samplers.calibrate.problem import rms

VP = VPDiscrete.scaled_linear()


def problem(batches: int, size: int = 8) -> Problem:
    rng = np.random.default_rng(5)
    mixture = GaussianMixture([0.4, 0.6], rng.uniform(-1, 1, (2, 8)), rng.uniform(0.1, 0.4, (2, 8)), [0, 1])
    found = []
    for seed in range(batches):
        noise = torch.randn(size, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        model = mixture.model(VP, "epsilon", torch.arange(size) % 2, 1.0)
        found.append(Batch(model, noise, reference(model, noise, VP, "epsilon", 40)))
    return Problem(VP, "epsilon", tuple(found), tuple(found[:1]))


def test_the_plan_is_the_best_of_all_candidates_up_to_the_noise_of_the_rounds():
    cases, seen = problem(6), []
    plan = baseline(cases, 6, lambda done, total: seen.append((done, total)))
    every = [rms(errors(each, cases.fitting)) for each in classical(cases, 6)]
    assert rms(errors(plan, cases.fitting)) < 1.1 * min(every) < 0.5 * max(every)
    assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1))
    ran = seen[-1][1]
    assert len(every) < ran < 1.5 * len(every)


def test_with_one_batch_the_best_on_it_is_taken():
    cases = problem(1)
    every = [(rms(errors(each, cases.fitting)), each.name) for each in classical(cases, 5)]
    assert baseline(cases, 5).name == min(every)[1]
