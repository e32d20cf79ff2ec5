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
    ({"solver": None, "order": 3}, "order: options belong to a solver; name it with solver="),
    ({"solver": None, "steps": 0}, "whole number of at least 1, got 0"),
    ({"steps": 0}, "whole number of model calls, at least 1; got 0"),
    ({"steps": -3}, "at least 1; got -3"),
    ({"steps": 4.0}, "whole number of model calls, at least 1; got 4.0"),
    ({"order": 4}, "orders 1, 2 and 3, got 4"),
    ({"solver": "ddim", "eta": -0.5}, "eta must not be negative, got -0.5"),
    ({"solver": "dpmpp", "order": 3, "steps": 2}, "dpmpp of order 3 needs at least 3 model calls, got 2: pass order=2"),
    ({"solver": "lms", "steps": 3}, "lms of order 4 needs at least 4 model calls, got 3: pass order=3, or more steps"),
    ({"solver": "unipc", "sigmas": [5.0, 1.0]}, "unipc of order 3 needs at least 3 model calls, got 2"),
    ({"solver": "sa_solver", "steps": 2}, "sa_solver of predictor_order 3 needs at least 3 model calls, got 2"),
    ({"solver": "pndm", "steps": 1}, r"makes 2, 3, 4, ... model calls, not 1"),
    ({"sigmas": [5.0, 7.0, 0.1]}, "sigmas must be strictly monotone, but entry 2 is 0.1 after 7"),
    ({"sigmas": [5.0, 1.0, 1.0]}, "sigmas must be strictly monotone, but entry 2 is 1 after 1"),
    ({"sigmas": [5.0, float("nan")]}, "sigmas must be finite"),
    ({"sigmas": 3.0}, "sigmas must be a sequence of numbers, got 3.0"),
    ({"sigmas": [200.0, 1.0]}, "200 lies outside the schedule"),
    ({"timesteps": [1000, 500]}, "1000 lies outside the schedule: .*labels from 0 to 999"),
    ({"timesteps": [500, -3]}, "-3 lies outside the schedule"),
    ({"timesteps": "all"}, "timesteps must be a sequence of numbers, got 'all'"),
    ({"timesteps": [900, 500], "steps": 3}, "make 2 intervals, this solver needs 3"),
    ({"t_start": 1.5}, "t = 1.5 lies outside the schedule, which runs from 0.001 to 1"),
    ({"grid": Grid(SD), "t_end": 0.1}, "Grid object.* t_end"),
    ({"grid": Grid(EDM())}, r"the grid is of another schedule \(EDM\)"),
    ({"grid": Grid(VPLinear())}, r"the grid is of another schedule \(VPLinear\)"),
]


@pytest.mark.parametrize(("options", "message"), NAMES + NUMBERS, ids=named)
def test_names_and_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        draw(**options)


TENSORS = [
    (TypeError, {"x": torch.zeros(2, 3, dtype=torch.int64)}, "initial state must be .*floating-point.*torch.int64"),
    (TypeError, {"x": X.numpy()}, "initial state must be a floating-point tensor"),
    (TypeError, {"x": X.to(torch.complex64)}, "initial state must be a floating-point tensor, got torch.complex64"),
    (ValueError, {"model": returns(lambda x: x[:1])}, r"call 0: the model returned shape \(1, 3\) for input \(2, 3\)"),
    (ValueError, {"model": returns(lambda x: x[:, :1])}, r"call 0: the model returned shape \(2, 1\)"),
    (ValueError, {"model": returns(on_meta)}, "call 0: the model returned device meta, but the state is on cpu"),
    (TypeError, {"model": returns(lambda x: (x,))}, "call 0: the model returned type tuple, not a tensor"),
    (TypeError, {"model": returns(lambda x: None)}, "call 0: the model returned type NoneType"),
    (TypeError, {"model": returns(lambda x: x.int())}, "call 0: the model returned dtype torch.int32"),
    (ValueError, {"noise": lambda k: X[0]}, r"call 0: the noise has shape \(3,\) for input \(2, 3\)"),
    (ValueError, {"noise": lambda k: X[:1]}, r"call 0: the noise has shape \(1, 3\)"),
    (ValueError, {"noise": lambda k: on_meta(X)}, "call 0: the noise has device meta, but the state is on cpu"),
    (TypeError, {"noise": lambda k: X.long()}, "call 0: the noise has dtype torch.int64"),
    (ValueError, {"noise": lambda k: None}, "call 0 of this plan adds noise: pass noise="),
    (TypeError, {"noise": X}, "noise must be a function, got Tensor"),
    (TypeError, {"generator": 0}, "generator must be a torch.Generator or one per sample, got int"),
    (ValueError, {"generator": [torch.Generator()] * 3}, "3 generators for a batch of 2"),
    (TypeError, {"guidance": 7.5}, "guidance must be a samplers.Guidance, got float"),
    (ValueError, {"guidance": Guidance(2.0, returns(lambda x: x[:1]))}, r"unconditional model returned shape \(1, 3\)"),
    (ValueError, {"guidance": Guidance(2.0, returns(on_meta))}, "unconditional model returned device meta"),
    (ValueError, {"threshold": lambda x0: x0[:1]}, r"call 0: threshold returned shape \(1, 3\)"),
    (TypeError, {"threshold": 0.995}, "threshold must be a function, got float"),
    (TypeError, {"schedule": "sd"}, "schedule must be a samplers.Schedule such as VPDiscrete.*got 'sd'"),
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

    with pytest.raises(ValueError, match="call 2: the model returned shape"):
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
    with pytest.raises(ValueError, match="predicts 'epsilon' does not determine 'sample' at alpha = 0"):
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
