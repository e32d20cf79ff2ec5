"""What cannot work says so, once and clearly: the functional face (`sample`, `build_plan`, `Plan.run`) and all dtypes.

Grids have their own list in test_grid.py, single solvers' options in their own tests.
"""

import pytest
import torch
from ids import named

from samplers import EDM, Grid, Guidance, RectifiedFlow, VPDiscrete, VPLinear, build_plan, sample
from samplers.solvers import SOLVERS

SD = VPDiscrete.scaled_linear()
X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


def draw(model=lambda x, t: 0.1 * x, x=X, schedule=SD, **options):
    """`sample` by dpmpp with a model that works; 'ddim' with eta = 1 if noise or a generator is given."""
    if {"noise", "generator"} & set(options):
        options = {"solver": "ddim", "eta": 1.0} | options
    if not {"sigmas", "timesteps"} & set(options):
        options = {"steps": 4} | options
    options = {"solver": "dpmpp"} | options
    return sample(model, x, schedule=schedule, **options)


def returns(value):
    """A model that returns `value(x)`."""
    return lambda x, t: value(x)


def on_meta(x):
    return torch.empty_like(x, device="meta")


NAMES = [
    ({"solver": "dpmp"}, "unknown solver 'dpmp': did you mean 'dpmpp'"),
    ({"solver": "heun2"}, "unknown solver 'heun2': did you mean 'heun'"),
    ({"solver": "unipc", "ordr": 2}, "unknown option of solver 'unipc' 'ordr': did you mean 'order'"),
    ({"solver": "ddim", "etta": 1.0}, "unknown option of solver 'ddim' 'etta': did you mean 'eta'"),
    ({"lower_order_finl": True}, "did you mean 'lower_order_final'"),
    ({"solver_type": "midpiont"}, "unknown solver_type 'midpiont': did you mean 'midpoint'"),
    ({"prediction": "epsilonn"}, "unknown prediction 'epsilonn': did you mean 'epsilon'"),
    ({"prediction": "velocity"}, "unknown prediction 'velocity': .*choose from epsilon, flow, sample"),
    ({"grid": "karas"}, "unknown grid 'karas': did you mean 'karras'"),
    ({"end": "tend"}, "unknown grid end 'tend': did you mean 't_end'"),
]
NUMBERS = [
    ({"solver": None, "order": 3}, "order.*solver="),
    ({"solver": None, "steps": 0}, "calls.* 0"),
    ({"steps": 0}, "steps.* 0"),
    ({"steps": -3}, "steps.* -3"),
    ({"steps": 4.0}, "steps.* 4.0"),
    ({"order": 4}, " 4"),
    ({"solver": "ddim", "eta": -0.5}, "eta.* -0.5"),
    ({"solver": "dpmpp", "order": 3, "steps": 2}, "dpmpp.* 3 .* 2.*order=2"),
    ({"solver": "lms", "steps": 3}, "lms.* 4 .* 3.*order=3"),
    ({"solver": "unipc", "sigmas": [5.0, 1.0]}, "unipc.* 3 .* 2"),
    ({"solver": "sa_solver", "steps": 2}, "sa_solver.*predictor_order 3.* 2"),
    ({"solver": "pndm", "steps": 1}, "pndm.* 2.* 1"),
    ({"sigmas": [5.0, 7.0, 0.1]}, "sigmas.* 2 .* 0.1 .* 7"),
    ({"sigmas": [5.0, 1.0, 1.0]}, "sigmas.* 2 .* 1 .* 1"),
    ({"sigmas": [5.0, float("nan")]}, "sigmas.*nan"),
    ({"sigmas": 3.0}, "sigmas.* 3.0"),
    ({"sigmas": [200.0, 1.0]}, "200"),
    ({"timesteps": [1000, 500]}, "1000.* 0 to 999"),
    ({"timesteps": [500, -3]}, "-3"),
    ({"timesteps": "all"}, "timesteps.*'all'"),
    ({"timesteps": [900, 500], "steps": 3}, " 2 .* 3"),
    ({"t_start": 1.5}, "1.5.* 0.001 to 1"),
    ({"grid": Grid(SD), "t_end": 0.1}, "Grid object.* t_end"),
    ({"grid": Grid(EDM())}, "grid.*EDM"),
    ({"grid": Grid(VPLinear())}, "grid.*VPLinear"),
]


@pytest.mark.parametrize(("options", "message"), NAMES + NUMBERS, ids=named)
def test_names_and_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        draw(**options)


TENSORS = [
    (TypeError, {"x": torch.zeros(2, 3, dtype=torch.int64)}, "initial state.*torch.int64"),
    (TypeError, {"x": X.numpy()}, "initial state.*ndarray"),
    (TypeError, {"x": X.to(torch.complex64)}, "initial state.*torch.complex64"),
    (ValueError, {"model": returns(lambda x: x[:1])}, r"call 0.*\(1, 3\).*\(2, 3\)"),
    (ValueError, {"model": returns(lambda x: x[:, :1])}, r"call 0.*\(2, 1\)"),
    (ValueError, {"model": returns(on_meta)}, "call 0.*meta.*cpu"),
    (TypeError, {"model": returns(lambda x: (x,))}, "call 0.*tuple"),
    (TypeError, {"model": returns(lambda x: None)}, "call 0.*NoneType"),
    (TypeError, {"model": returns(lambda x: x.int())}, "call 0.*torch.int32"),
    (ValueError, {"noise": lambda k: X[0]}, r"call 0.*noise.*\(3,\).*\(2, 3\)"),
    (ValueError, {"noise": lambda k: X[:1]}, r"call 0.*noise.*\(1, 3\)"),
    (ValueError, {"noise": lambda k: on_meta(X)}, "call 0.*noise.*meta.*cpu"),
    (TypeError, {"noise": lambda k: X.long()}, "call 0.*noise.*torch.int64"),
    (ValueError, {"noise": lambda k: None}, "call 0.*noise="),
    (TypeError, {"noise": X}, "noise.*Tensor"),
    (TypeError, {"generator": 0}, "generator.*int"),
    (ValueError, {"generator": [torch.Generator()] * 3}, "3 generators.* 2"),
    (TypeError, {"guidance": 7.5}, "guidance.*Guidance.*float"),
    (ValueError, {"guidance": Guidance(2.0, returns(lambda x: x[:1]))}, r"unconditional.*\(1, 3\)"),
    (ValueError, {"guidance": Guidance(2.0, returns(on_meta))}, "unconditional.*meta"),
    (ValueError, {"threshold": lambda x0: x0[:1]}, r"call 0.*threshold.*\(1, 3\)"),
    (TypeError, {"threshold": 0.995}, "threshold.*float"),
    (TypeError, {"schedule": "sd"}, "schedule.*'sd'"),
]


@pytest.mark.parametrize(("error", "options", "message"), TENSORS, ids=named)
def test_tensors_and_functions(error, options, message):
    with pytest.raises(error, match=message):
        draw(**options)


def test_the_wrong_call_is_named():
    """A model that goes wrong later: the message counts from 0 and says where."""

    def later(value):
        calls = []
        return lambda x, t: calls.append(t) or (value(x) if len(calls) > 2 else x)

    with pytest.raises(ValueError, match="call 2"):
        draw(later(lambda x: x[:1]))
    plan = build_plan(SD, "dpmpp", steps=4)
    where = rf"call 2 of 4 \(label {plan.label[2]:g}, sigma {plan.sigma[2]:.4g}\) is not finite"
    for bad in (float("nan"), float("inf")):
        with pytest.raises(FloatingPointError, match=where):
            draw(later(lambda x, bad=bad: torch.full_like(x, bad)))
        one = torch.zeros_like(X)
        one[1, 2] = bad  # a single element of one sample
        with pytest.raises(FloatingPointError, match=where):
            draw(later(lambda x, one=one: one))
    out = draw(later(lambda x: x * float("nan")), check_finite=False)
    assert out.isnan().all()


def test_predictions_that_cannot_work():
    with pytest.raises(ValueError, match="unknown prediction 'v_pred': did you mean 'v_prediction'"):
        build_plan(SD, steps=3).run(lambda x, t: x, X, prediction="v_pred")
    with pytest.raises(ValueError, match=r"epsilon.*sample.*alpha = 0"):
        draw(schedule=RectifiedFlow(), prediction="epsilon")


def test_mixtures_that_are_fine():
    """Other floating-point dtypes of model and noise: the state keeps its own, and so does the result."""
    reference = draw()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        out = draw(lambda x, t, dtype=dtype: (0.1 * x).to(dtype))
        assert out.dtype == torch.float32 and (out - reference).abs().max() < 0.02
    noisy = draw(noise=lambda k: X)
    wider = draw(noise=lambda k: X.double())
    assert wider.dtype == torch.float32 and torch.equal(wider, noisy)
    assert torch.equal(draw(guidance=Guidance(2.0, lambda x, t: (0.1 * x).double())), reference)


def plan_of(solver):
    """The solver's plan with 12 calls, or the next number that it can make."""
    for steps in range(12, 20):
        try:
            return build_plan(SD, solver, steps)
        except ValueError as error:
            assert "call" in str(error)
    raise AssertionError(f"{solver} makes no plan of 12 to 19 calls")


@pytest.fixture(scope="module")
def draws(z):
    return torch.randn(24, *z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


SENSITIVE = {"dpm2_ancestral": 16.0}  # a midpoint of noise levels far apart amplifies whatever the model is told


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=named)
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_in_every_dtype(mixture, z, draws, solver, dtype):
    """The result has x's dtype and is the float64 result up to a few roundings: what the model sees and returns is
    rounded, the state is float32 or wider. One draw is shared; x is the same number in all dtypes."""
    plan, x = plan_of(solver), z.bfloat16().double()
    exact = plan.run(mixture.model(SD), x, noise=lambda k: draws[k])
    wide, seen, states = torch.promote_types(dtype, torch.float32), set(), set()

    def model(x, label):
        seen.add((x.dtype, label.dtype))
        return mixture.model(SD)(x, label)

    def watch(k, state):
        states.update(tensor.dtype for tensor in (state.input, state.anchor, *state.history))

    out = plan.run(model, x.to(dtype), noise=lambda k: draws[k].to(wide), callback=watch)
    assert out.dtype == dtype and seen == {(dtype, wide)} and states == {wide}
    error = (out.double() - exact).square().mean().sqrt()
    assert error <= SENSITIVE.get(solver, 3.0) * torch.finfo(dtype).eps
