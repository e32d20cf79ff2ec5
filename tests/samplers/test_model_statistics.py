"""The statistics of DPM-Solver-v3: their file, and the estimator against derivatives by autograd."""

import json
import struct
import warnings

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from samplers import EDM, Statistics, VPLinear, build_plan
from samplers.analytic import GaussianMixture
from samplers.calibrate import Batch, Problem, errors, estimate, reference, v3
from samplers.calibrate.derivative import Derivative

VP = VPLinear()


def some(levels=4, shape=(2, 3, 3)):
    draw = np.random.default_rng(0).normal(size=(3, levels + 1, *shape)).astype(np.float32)
    return Statistics(np.linspace(-4, 3, levels + 1), *draw, 64, 3.0, "v_prediction", "sha256:12")


def problem_of(data, schedule=VP, n=32, prediction="epsilon", wrap=lambda model: model, dtype=torch.float64):
    """Samples of the data as targets, and noises."""
    draw = torch.Generator().manual_seed(5)
    which = torch.multinomial(data.weights, n, True, generator=draw)
    x0, e = (torch.randn(n, *data.shape, generator=draw, dtype=torch.float64) for _ in range(2))
    x0 = data.means[which] + data.stds[which] * x0
    model = wrap(data.model(schedule, prediction))
    half = n // 2
    batches = [
        Batch(model, (e * schedule.init_scale)[i].to(dtype), x0[i].to(dtype)) for i in (slice(half), slice(half, n))
    ]
    return Problem(schedule, prediction, tuple(batches), tuple(batches[:1]), 1.5)


def test_file(tmp_path):
    given, path = some(), tmp_path / "s.safetensors"
    given.save(path)
    read = Statistics.load(path)
    for name in ("lam", "l", "s", "b", "samples", "guidance", "prediction", "model"):
        assert np.array_equal(getattr(read, name), getattr(given, name))


def test_a_wrong_file_is_an_error_that_names_it(tmp_path):
    good = tmp_path / "good"
    some().save(good)
    content = good.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    about = json.loads(header["__metadata__"]["samplers_statistics"])
    wrong = {
        "truncated": content[:-5],
        "empty": b"",
        "foreign": b"PK\x03\x04" + bytes(100),
        "no header": None,
        "other arrays": None,
        "version": {**about, "version": 2},
        "more": {**about, "more": 1},
        "samples": {**about, "samples": "many"},
        "prediction": {**about, "prediction": "noise"},
    }
    arrays = {name: np.ascontiguousarray(getattr(some(), name)) for name in ("lam", "l", "s", "b")}
    for name, what in wrong.items():
        path = tmp_path / name
        if isinstance(what, bytes):
            path.write_bytes(what)
        elif name == "no header":
            save_file(arrays, path)
        else:
            kept = {k: v for k, v in arrays.items() if name != "other arrays" or k != "b"}
            save_file(kept, path, metadata={"samplers_statistics": json.dumps(what or about)})
        with pytest.raises(ValueError, match=name):
            Statistics.load(path)
    with pytest.raises(ValueError, match="missing"):
        Statistics.load(tmp_path / "missing")
    with pytest.raises(ValueError, match="not a regular file"):
        Statistics.load(tmp_path)


def test_numbers_that_are_no_statistics():
    lam, flat = np.array([0.0, 1.0]), np.zeros((2, 3))
    for wrong in (
        (lam[::-1], flat, flat, flat),
        (lam, flat, flat, flat[:, :2]),
        (lam, flat, flat, flat / np.ones(3) + np.inf),
    ):
        with pytest.raises(ValueError, match="statistics"):
            Statistics(*wrong)


def test_layout_of_the_authors(tmp_path):
    given = some()
    np.savez(tmp_path / "l.npz", l=given.l)
    np.savez(tmp_path / "sb.npz", s=given.s, b=given.b)
    read = Statistics.read_published(tmp_path, -4.0, 3.0, guidance=7.5)
    assert np.array_equal(read.lam, given.lam) and np.array_equal(read.b, given.b) and read.guidance == 7.5
    np.savez(tmp_path / "l.npz", l=np.array([{"a": 1}], dtype=object))  # a pickle
    with pytest.raises(ValueError, match=r"l\.npz"):
        Statistics.read_published(tmp_path, -4.0, 3.0)
    (tmp_path / "l.npz").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match=r"l\.npz"):
        Statistics.read_published(tmp_path, -4.0, 3.0)


def test_between_and_outside_the_levels():
    given = some()
    l, _, b = given.at(np.array([-9.0, -4.0, (given.lam[1] + 3 * given.lam[2]) / 4, 9.0]))
    assert np.array_equal(l[0], given.l[0]) and np.array_equal(l[1], given.l[0]) and np.array_equal(b[3], given.b[-1])
    assert np.allclose(b[2], given.b[1] / 4 + given.b[2] * 3 / 4)


@pytest.mark.parametrize("schedule", [VP, EDM()])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_against_autograd(mixture, schedule, prediction):
    """All of eq. 58-63 again, from Jacobians by autograd and the ODE by differences of its exact flow."""
    problem = problem_of(mixture, schedule, prediction=prediction)
    found = estimate(problem, 5, probes="exact", repeats=2)
    x0 = torch.cat([b.target for b in problem.fitting] * 2)
    noise = torch.cat([b.noise for b in problem.fitting]) / schedule.init_scale
    e = torch.cat([noise.roll(-1, 0), noise.roll(-2, 0)])
    lam = np.linspace(float(schedule.lam(schedule.t_max)), float(schedule.lam(schedule.t_min)), 6)

    def eps(x, level):
        t = schedule.t_of_lambda(level)
        return mixture.posterior(x, float(schedule.alpha(t)), float(schedule.sigma(t)))[1]

    l = []
    for level in lam:
        t = schedule.t_of_lambda(level)
        x = float(schedule.alpha(t)) * x0 + float(schedule.sigma(t)) * e
        jacobian = torch.autograd.functional.jacobian(lambda x, at=level: eps(x, at).sum(0).flatten(), x)
        l.append(float(schedule.sigma(t)) * torch.einsum("inabi->nabi", jacobian.flatten(4).view(2, 64, 1, 1, 2)))
    l = torch.stack([v.mean(0) for v in l]).numpy()
    assert np.abs(found.l - l).max() < 1e-9
    rise = np.gradient(l, lam, axis=0)
    for j in (1, 3, 4):
        t, h = schedule.t_of_lambda(lam[j]), 1e-3
        alpha, kappa = float(schedule.alpha(t)), float(np.exp(-lam[j]))
        x = alpha * x0 + float(schedule.sigma(t)) * e
        sides = []
        for at in (lam[j] - h, lam[j] + h):  # f itself after exact flow, with l + l' times the distance
            to = schedule.t_of_lambda(at)
            moved = mixture.exact(schedule, x, float(t), float(to))
            y = moved / float(schedule.alpha(to))
            sides.append(np.exp(-at) * eps(moved, at) - torch.from_numpy(l[j] + rise[j] * (at - lam[j])) * y)
        slope = ((sides[1] - sides[0]) / (2 * h)).numpy()
        f = (kappa * eps(x, lam[j]) - torch.from_numpy(l[j]) * x / alpha).numpy()
        s = ((f - f.mean(0)) * (slope - slope.mean(0))).mean(0) / f.var(0)
        assert np.abs(found.s[j] - s).max() < 1e-4
        assert np.abs(found.b[j] - (slope.mean(0) - s * f.mean(0))).max() < 1e-4


def test_one_gaussian_needs_no_slope():
    """eps is linear in x, so f is a constant: s is 0, not 0 / 0, and one call is exact."""
    data = GaussianMixture([1.0], [[[[0.4, -0.3]]]], [[[[0.5, 0.2]]]])
    problem = problem_of(data)
    found = estimate(problem, 100)
    assert np.abs(found.s).max() == 0 and np.isfinite(found.b).all()
    z = problem.fitting[0].noise
    plan = build_plan(VP, "dpm_solver_v3", 1, end="t_end", order=1, statistics=found)
    assert (plan.run(data.model(VP), z, prediction="epsilon") - data.exact(VP, z)).abs().max() < 2e-3


def inference(model):
    @torch.inference_mode()
    def wrapped(x, t):
        return model(x.clone(), t)

    return wrapped


class NoForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0


@pytest.mark.parametrize(
    "wrap", [inference, lambda m: lambda x, t: NoForward.apply(m(x, t)), lambda m: lambda x, t: m(x, t).detach()]
)
def test_without_forward_mode_it_takes_differences(mixture, wrap):
    """A model in inference mode, a layer without a forward-mode rule, and a model that cuts the graph."""
    true = estimate(problem_of(mixture), 6)
    found = estimate(problem_of(mixture, wrap=wrap), 6)
    for name in "lsb":
        assert np.abs(getattr(found, name) - getattr(true, name)).max() < 1e-6
    derivative = Derivative()
    derivative(lambda x: wrap(lambda x, t: x.sin())(x, 0.0), torch.ones(2), torch.ones(2), 1.0)
    assert not derivative.forward


def test_attention_has_forward_mode():
    def network(x):
        return torch.nn.functional.scaled_dot_product_attention(x, x * 0.5, x)

    x, v = (torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    derivative, plain = Derivative(), Derivative()
    plain.forward = False
    _, slope = derivative(network, x, v, 1.0)
    assert derivative.forward
    assert (slope - plain(network, x, v, 1.0)[1]).abs().max() < 1e-3


def test_random_probes_and_numbers_per_channel(mixture):
    problem = problem_of(mixture, n=256)
    exact, random = estimate(problem, 8, probes="exact"), estimate(problem, 8, probes=8)
    assert np.abs(random.l - exact.l).max() < 0.1 and np.abs(random.l - exact.l).max() > 1e-6
    pooled = estimate(problem, 8, probes="exact", pooled=True)
    assert pooled.shape == (1, 1, 1) and np.allclose(pooled.l, exact.l.mean((1, 2, 3), keepdims=True))


def test_float32_is_enough(mixture):
    """Below sigma / alpha = 50; above, x_0 = x - sigma eps has the rounding of x."""
    double, single = (estimate(problem_of(mixture, dtype=dtype), 10) for dtype in (torch.float64, torch.float32))
    inside = double.lam > -np.log(50)
    for name in "lsb":
        gap = np.abs(getattr(single, name) - getattr(double, name))
        assert gap[inside].max() < 5e-3 and gap.max() < 0.5


def test_few_samples_warn(mixture):
    with pytest.warns(UserWarning, match="samples are few"):
        estimate(problem_of(mixture, n=4), 4)
    with pytest.raises(ValueError, match="at least three"):
        estimate(problem_of(mixture, n=2), 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate(problem_of(mixture, n=256), 4)


def test_calibrated_plan(mixture):
    """A plan for 5 calls: on noises that it did not see, better than the default rule."""
    seen = problem_of(mixture, n=64)

    def solved(batch, seed):
        noise = torch.randn(batch.noise.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return Batch(batch.model, noise, reference(batch.model, noise, VP, calls=60))

    fitting, heldout = (tuple(solved(batch, seed) for batch in seen.fitting) for seed in (1, 2))
    problem = Problem(VP, "epsilon", fitting, heldout)
    done = []
    plan = v3(problem, 5, statistics=estimate(seen, 40), progress=lambda i, n: done.append((i, n)))
    assert len(plan) == 5 and plan.prediction == "epsilon" and plan.sigma[-1] == 0
    assert done[-1][0] == done[-1][1] == len(done)
    assert errors(plan, heldout).mean() < errors(build_plan(VP, None, 5), heldout).mean()
