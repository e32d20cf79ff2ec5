import dataclasses

import numpy as np
import pytest
import torch

from samplers import Plan, VPDiscrete, build_plan
from samplers.grid import Grid
from samplers.plan import randn, row

SD = VPDiscrete.scaled_linear()


@pytest.fixture(scope="module")
def plan():
    return build_plan(SD, "dpmpp", 6, order=3)


def test_save_and_load_are_exact(plan, mixture, z, tmp_path):
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    again = Plan.load(path)
    for field in dataclasses.fields(plan):
        a, b = getattr(plan, field.name), getattr(again, field.name)
        assert np.array_equal(a, b, equal_nan=True) if isinstance(a, np.ndarray) else a == b
    model = mixture.model(SD)
    assert torch.equal(plan.run(model, z), again.run(model, z))
    assert path.stat().st_size < 10_000


def test_load_refuses_other_files(tmp_path):
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(2)}, str(tmp_path / "x.safetensors"))
    with pytest.raises(ValueError, match=r"x.safetensors"):
        Plan.load(tmp_path / "x.safetensors")


def test_a_plan_is_immutable(plan):
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.name = "other"
    with pytest.raises(ValueError, match="read-only"):
        plan.rows[0, 0, 0] = 1.0


def test_two_requests_interleaved_on_one_plan(plan, mixture, z):
    model = mixture.model(SD)
    label = torch.tensor(plan.label)
    one, two = plan.begin(z), plan.begin(-z + 0.3)
    for k in range(len(plan)):
        one = plan.step(k, one, model(one.input, label[k]))
        if k > 1:  # the second request starts later
            two = plan.step(k - 2, two, model(two.input, label[k - 2]))
    for k in (len(plan) - 2, len(plan) - 1):
        two = plan.step(k, two, model(two.input, label[k]))
    assert torch.equal(one.input, plan.run(model, z))
    assert torch.equal(two.input, plan.run(model, -z + 0.3))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 0.01), (torch.bfloat16, 0.06)])
def test_the_state_stays_wide(plan, mixture, z, dtype, bound):
    """Half-precision models: the state is float32, so only what the model sees is rounded."""
    exact = plan.run(mixture.model(SD), z)
    seen = []
    states = []

    def model(x, label):
        seen.append((x.dtype, label.dtype))
        return mixture.model(SD)(x, label)

    out = plan.run(model, z.to(dtype), callback=lambda k, state: states.append(state.input.dtype))
    assert out.dtype == dtype and set(seen) == {(dtype, torch.float32)} and set(states) == {torch.float32}
    assert (out.double() - exact).abs().max() < bound


def test_half_precision_state_would_be_worse(mixture, z):
    plan = build_plan(SD, "dpmpp", 40)
    model, label = mixture.model(SD), torch.tensor(plan.label)
    z16 = z.bfloat16()
    exact = plan.run(model, z16.double())
    wide = plan.run(lambda x, t: model(x, t).bfloat16(), z16.float())
    state = plan.begin(z16)
    for k in range(len(plan)):
        state = plan.step(k, state, model(state.input, label[k]).bfloat16())
        rounded = state.input.bfloat16().float()
        state = state._replace(input=rounded, anchor=rounded)
    assert (wide.double() - exact).abs().mean() < 0.5 * (state.input.double() - exact).abs().mean()


def test_anchor_noise_constant_and_tensor_coefficients():
    """A hand-written table: anchor kept for one call, a constant, noise, and coefficients that vary over the sample."""
    nodes = Grid(SD).nodes(2)
    c = np.array([1.0, -2.0, 0.5])
    plan = Plan.build(
        "by hand", "epsilon", nodes, [(row(2.0, 3.0, noise=0.1, one=5.0), row(1.0)), row(1.0, 10.0, -1.0)]
    )
    rows = np.broadcast_to(plan.rows[..., None], (*plan.rows.shape, 3)) * np.ones(3)
    rows[1, 0, 3] = c  # m_1 enters the result with a weight per element
    varied = dataclasses.replace(plan, rows=rows).to("cpu", torch.float64)
    x, m0, m1, noise = torch.randn(4, 2, 3, dtype=torch.float64)
    state = varied.step(0, varied.begin(x), m0, noise)
    torch.testing.assert_close(state.input, 2 * x + 3 * m0 + 0.1 * noise + 5)
    assert torch.equal(state.anchor, x)
    state = varied.step(1, state, m1)
    torch.testing.assert_close(state.input, x + torch.tensor(c) * m1 - m0)
    torch.testing.assert_close(state.anchor, x + 10 * m1 - m0)
    with pytest.raises(ValueError, match=r"call 0.*noise="):
        varied.step(0, varied.begin(x), m0)


def test_free_history_and_noisy_start():
    """`start`: an input with noise, and a first value of history that costs no call."""
    plan = Plan.build(
        "start", "epsilon", Grid(SD).nodes(1), [row(1.0, 1.0, 4.0)], start=[[2.0, 0.5], [1.0, 0.0], [3.0, 0.0]]
    )
    x, noise = torch.randn(2, 2, 3, dtype=torch.float64)
    seen = []
    out = plan.run(lambda v, t: seen.append(v) or torch.ones_like(v), x, noise=lambda k: noise)
    torch.testing.assert_close(seen[0], 2 * x + 0.5 * noise)
    torch.testing.assert_close(out, x + 1 + 4 * 3 * x)
    assert plan.stochastic


def test_generators(mixture):
    """One generator per sample: the result of a sample does not depend on the batch it is in."""
    plan = build_plan(SD, "ddim", 5, eta=1.0)
    x = torch.randn(3, 1, 1, 2)
    gens = lambda seeds: [torch.Generator().manual_seed(s) for s in seeds]  # noqa: E731
    model = mixture.model(SD)
    together = plan.run(model, x, generator=gens([5, 6, 7]))
    alone = plan.run(model, x[1:2], generator=gens([6]))
    torch.testing.assert_close(together[1:2], alone)
    assert not torch.equal(together, plan.run(model, x, generator=gens([5, 8, 7])))
    with pytest.raises(ValueError, match=r"2 generators.* 3"):
        randn((3, 1), gens([1, 2]), "cpu", torch.float32)


def test_guidance_and_threshold_in_the_loop(mixture, z):
    from samplers import Guidance

    classes = torch.arange(8) % 2
    plan = build_plan(SD, "dpmpp", 8, prediction="v_prediction")
    guided = Guidance(3.0, mixture.model(SD, "v_prediction"))
    out = plan.run(mixture.model(SD, "v_prediction", classes), z, guidance=guided)
    torch.testing.assert_close(out, plan.run(mixture.model(SD, "v_prediction", classes, scale=3.0), z))
    # Thresholding sees x_0: with the identity nothing changes, and a constant x_0 is the result.
    same = plan.run(mixture.model(SD, "v_prediction"), z, threshold=lambda x0: x0)
    torch.testing.assert_close(same, plan.run(mixture.model(SD, "v_prediction"), z), rtol=0, atol=1e-11)
    fixed = plan.run(mixture.model(SD, "v_prediction"), z, threshold=lambda x0: torch.full_like(x0, 0.25))
    torch.testing.assert_close(fixed, torch.full_like(fixed, 0.25))


def test_bad_model_outputs(plan, z):
    def broken(x, label):
        return x * float("nan") if label < 500 else x

    k = int((plan.label >= 500).sum())
    with pytest.raises(FloatingPointError, match=rf"call {k} of 6 \(label {plan.label[k]:g}"):
        plan.run(broken, z)
    with pytest.raises(ValueError, match=r"call 0.*\(8, 2\)"):
        plan.run(lambda x, t: x[:, 0, 0], z)
    with pytest.raises(TypeError, match="int64"):
        plan.run(lambda x, t: x, torch.zeros(1, 2, dtype=torch.int64))


@pytest.mark.parametrize(("solver", "options"), [(None, {}), ("dpmpp", {"order": 3}), ("unipc", {}), ("heun", {})])
def test_ten_calls_compile_as_one_graph(solver, options):
    """No data-dependent Python in the loop."""
    plan = build_plan(SD, solver, 10, **options)
    net = torch.nn.Conv2d(4, 4, 3, padding=1)
    run = lambda x: plan.run(lambda v, t: net(v) + 1e-3 * t, x)  # noqa: E731
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        compiled = torch.compile(run, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), run(x))


def test_import_stays_light():
    import subprocess
    import sys

    code = "import sys, samplers; assert 'diffusers' not in sys.modules and 'scipy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
