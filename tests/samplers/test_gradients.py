"""Gradients through a plan against autograd through `Plan.run`, and what they cost in memory and in calls."""

import weakref

import numpy as np
import pytest
import torch
from ids import named
from torch.utils._python_dispatch import TorchDispatchMode

from samplers import EDM, Plan, RectifiedFlow, VPDiscrete, VPLinear, build_plan, gradients

VP = VPLinear()
PLANS = [  # solver, options, calls, snapshots
    ("dpmpp", {}, 12, 8),
    ("dpmpp", {"eta": 1.0}, 9, 3),
    ("unipc", {"order": 3}, 20, 3),
    ("abm", {}, 30, 4),
    ("singlestep", {}, 13, 2),
    ("runge_kutta", {"method": "4rk"}, 13, 5),
    ("sa_solver", {"tau": 1.0}, 16, 5),
    ("sa_solver", {"tau": 1.0, "pece": True}, 9, 2),
    ("dpmpp_sde", {}, 10, 1),
    ("euler_ancestral", {}, 7, 1),
    ("heun", {"s_churn": 10.0}, 9, 3),
]


class Scaled:
    """The mixture's network times a weight, plus a condition per sample; counts its calls."""

    def __init__(self, mixture, schedule=VP):
        self.inner, self.calls = mixture.model(schedule), 0
        self.weight = torch.tensor(1.05, dtype=torch.float64, requires_grad=True)
        self.condition = torch.full((8, 1, 1, 2), 0.01, dtype=torch.float64, requires_grad=True)

    def __call__(self, x, label):
        self.calls += 1
        return self.weight * self.inner(x, label) + self.condition * x


def of(run, model, z):
    """The result, and the gradients of a loss on it: of the noise, the weight and the condition."""
    x = z.clone().requires_grad_()
    model.calls = 0
    out = run(x)
    return [out.detach(), *torch.autograd.grad(out.pow(3).sum(), (x, model.weight, model.condition))]


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-12 * other.abs().max()


@pytest.mark.parametrize(("solver", "options", "calls", "snapshots"), PLANS, ids=named)
def test_equal_to_autograd(mixture, z, solver, options, calls, snapshots):
    plan, model = build_plan(VP, solver, calls, **options), Scaled(mixture)
    seed = torch.Generator().manual_seed
    expected = of(lambda x: plan.run(model, x, generator=seed(1)), model, z)
    found = of(lambda x: gradients.sample(plan, model, x, noise=seed(1), snapshots=snapshots), model, z)
    same(found, expected)
    assert model.calls == gradients.evaluations(calls, snapshots)


@pytest.mark.parametrize(
    "schedule", [VPDiscrete.scaled_linear(), EDM(), RectifiedFlow()], ids=lambda s: type(s).__name__
)
def test_other_schedules(mixture, z, schedule):
    plan, model = build_plan(schedule, None, 6, prediction="sample"), Scaled(mixture, schedule)
    model.inner = mixture.model(schedule, "sample")
    x = z * schedule.init_scale
    same(of(lambda x: gradients.sample(plan, model, x), model, x), of(lambda x: plan.run(model, x), model, x))


def test_coefficients_that_vary_over_the_sample(mixture, z):
    plain, model = build_plan(VP, "dpmpp", 6), Scaled(mixture)
    varied = np.random.default_rng(0).uniform(0.9, 1.1, (1, 1, 1, 1, 1, 2))
    plan = Plan(
        **{n: getattr(plain, n) for n in ("name", "prediction", "t", "alpha", "sigma", "label", "start")},
        rows=plain.rows[..., None, None, None] * varied,
        reads=plain.reads[..., None, None, None] * varied[0],
    )
    same(
        of(lambda x: gradients.sample(plan, model, x, snapshots=2), model, z),
        of(lambda x: plan.run(model, x), model, z),
    )


def test_finite_differences(mixture, z):
    plan, model = build_plan(VP, "unipc", 10), Scaled(mixture)
    sample = lambda x: gradients.sample(plan, model, x, snapshots=3)  # noqa: E731
    _, gradient, *_ = of(sample, model, z)
    direction, h = torch.randn(z.shape, generator=torch.Generator().manual_seed(3), dtype=z.dtype), 1e-5
    with torch.no_grad():
        up, down = (plan.run(model, z + s * h * direction).pow(3).sum() for s in (1, -1))
    assert float((gradient * direction).sum()) == pytest.approx(float(up - down) / (2 * h), rel=1e-7)


def test_the_last_calls_only(mixture, z):
    """As autograd through a run that goes on from the state before them."""
    plan, model = build_plan(VP, "dpmpp", 8, order=3), Scaled(mixture)
    wanted = (model.weight, model.condition)
    for last in (1, 3, 8):
        out = gradients.sample(plan, model, z, last=last)
        found = torch.autograd.grad(out.pow(3).sum(), wanted)
        state = plan.begin(z)
        for k in range(8):
            with torch.set_grad_enabled(k >= 8 - last):
                state = plan.step(k, state, model(state.input, torch.tensor(plan.label[k])))
        same(found, torch.autograd.grad(state.input.pow(3).sum(), wanted))
    assert not gradients.sample(plan, model, z, last=0).requires_grad


@pytest.mark.parametrize("kind", ["one", "each", "torch", "function"])
def test_noise_is_repeated(mixture, z, kind):
    plan, model = build_plan(VP, "ddim", 9, eta=1.0), Scaled(mixture)
    stored = torch.randn(9, *z.shape, generator=torch.Generator().manual_seed(5), dtype=z.dtype)

    def noise():
        torch.manual_seed(2)
        if kind == "each":
            return [torch.Generator().manual_seed(i) for i in range(len(z))]
        return {"one": torch.Generator().manual_seed(7), "torch": None, "function": lambda k: stored[k]}[kind]

    name = "noise" if kind == "function" else "generator"
    expected = of(lambda x: plan.run(model, x, **{name: noise()}), model, z)
    same(of(lambda x: gradients.sample(plan, model, x, noise=noise(), snapshots=2), model, z), expected)


def test_a_generator_is_left_as_after_a_run(mixture, z):
    plan, model = build_plan(VP, "ddim", 9, eta=1.0), Scaled(mixture)
    one, other = (torch.Generator().manual_seed(7) for _ in range(2))
    plan.run(model, z, generator=one)
    of(lambda x: gradients.sample(plan, model, x, noise=other, snapshots=2), model, z)
    assert torch.equal(one.get_state(), other.get_state())


def test_noise_that_is_not_repeated_is_an_error(mixture, z):
    plan, model = build_plan(VP, "ddim", 5, eta=1.0), Scaled(mixture)
    draws = torch.Generator().manual_seed(1)
    noise = lambda k: torch.randn(z.shape, generator=draws, dtype=z.dtype)  # noqa: E731
    with pytest.raises(ValueError, match=r"noise\(\d\) gave another draw"):
        of(lambda x: gradients.sample(plan, model, x, noise=noise, snapshots=1), model, z)


def test_bad_arguments(mixture, z):
    plan, model = build_plan(VP, "ddim", 5), Scaled(mixture)
    with pytest.raises(ValueError, match="last 0 to 5, not 6"):
        gradients.sample(plan, model, z, last=6)
    with pytest.raises(ValueError, match="snapshots"):
        gradients.sample(plan, model, z, snapshots=0)


class Peak(TorchDispatchMode):
    """The most bytes in tensors that were made and not yet freed."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()

    def _free(self, key, size):
        self.live -= size
        self.known.discard(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if (
                isinstance(tensor, torch.Tensor)
                and id(storage := tensor.untyped_storage())
                and storage._cdata not in self.known
            ):
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out


def peak(run, calls, width=32):
    """Bytes at the peak of a gradient, with a network whose activations are many times a state."""
    plan = build_plan(VP, "dpmpp", calls)
    weight = torch.full((width, 1), 3e-2, requires_grad=True)

    def model(x, label):
        hidden = x.reshape(-1, 1) @ weight.T
        for _ in range(3):
            hidden = torch.tanh(hidden)
        return (hidden @ weight).view(x.shape)

    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with Peak() as seen:
        run(plan, model, x).square().sum().backward()
    return seen.peak


def test_memory_does_not_grow_with_the_calls():
    few, many = (peak(gradients.sample, calls) for calls in (5, 100))
    plain_few, plain_many = (peak(Plan.run, calls) for calls in (5, 100))
    state = 4 * 8 * 8 * 4
    assert plain_many > 15 * plain_few  # what this test is able to see
    assert many - few <= 2 * gradients.SNAPSHOTS * 2 * state  # at most the states that are kept
    assert many < 1.2 * few
