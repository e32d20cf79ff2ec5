"""DPM-Solver-v3: against solvers that it becomes, an exactly solvable model, its statistics' files and pipelines."""

import numpy as np
import pytest
import tiny_pipes
import torch
from scipy.integrate import solve_ivp

import samplers
from samplers import EDM, Grid, RectifiedFlow, Statistics, VPDiscrete, VPLinear, build_plan
from samplers.calibrate import Batch, Problem, estimate

VP = VPLinear()
SD = VPDiscrete.scaled_linear()
FULL = {"lower_order_final": False}


def smooth(schedule, levels=40, shape=(2, 1, 1), seed=0):
    """Statistics like a model's (l from 1 to 0), different in every element."""
    start = float(schedule.lam(schedule.t_max)) if schedule.alpha(schedule.t_max) > 0 else -5.0
    lam = np.linspace(start, float(schedule.lam(schedule.t_min)), levels + 1)
    where = np.random.default_rng(seed).normal(size=(3, 1, *shape)) * 0.3
    z = lam.reshape(-1, *[1] * len(shape))
    return Statistics(lam, 1 / (1 + np.exp(2 * (z - where[0]))), np.cos(z + where[1]), 0.3 * np.sin(z + where[2]))


class Exact:
    """The network for which f' = s f + b holds exactly, with f(lam_0) = 0.4: then y' = -f - l y is linear."""

    def __init__(self, schedule, statistics):
        self.schedule, self.statistics = schedule, statistics
        shape = statistics.shape
        size, lam = int(np.prod(shape)), statistics.lam
        start = np.full(size, 0.4)

        def slope(at, f):
            _, s, b = (v[0].ravel() for v in statistics.at(np.array([at])))
            return s * f + b

        options = {"method": "DOP853", "rtol": 1e-9, "atol": 1e-10, "dense_output": True}
        solved = solve_ivp(slope, (lam[0], lam[-1]), start, **options)
        self.f = lambda at: torch.from_numpy(solved.sol(at).reshape(shape))
        self.options = options

    def __call__(self, x, label):
        t = self.schedule.t_of_model_time(float(label))
        lam, alpha = float(self.schedule.lam(t)), float(self.schedule.alpha(t))
        l = torch.from_numpy(self.statistics.at(np.array([lam]))[0][0])
        return (self.f(lam) + l * x / alpha) * np.exp(lam)

    def solution(self, x):
        """x at the clean end of the statistics, and at sigma = 0 by DDIM from there."""
        lam, alpha = self.statistics.lam, self.schedule.alpha(self.schedule.t_of_lambda(self.statistics.lam[[0, -1]]))

        def slope(at, y):
            l = self.statistics.at(np.array([at]))[0][0]
            return (-self.f(at).numpy() - l * y.reshape(x.shape)).ravel()

        y = solve_ivp(slope, (lam[0], lam[-1]), (x / alpha[0]).numpy().ravel(), **self.options).y[:, -1]
        y = torch.from_numpy(y).view(x.shape)
        eps = self(y * alpha[1], self.schedule.model_time(self.schedule.t_of_lambda(lam[-1])))
        return y * alpha[1], y - eps * np.exp(-lam[-1])


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("end", ["zero", "t_end"])
def test_without_statistics_it_is_dpm_solver_pp_and_unipc(order, end, mixture, z):
    def result(solver, **options):
        return samplers.sample(mixture.model(SD), z, schedule=SD, solver=solver, steps=7, end=end, **options)

    for lower in (True, False) if end == "t_end" or order == 1 else (True,):  # without, v3 extrapolates to sigma = 0
        common = {"order": order, "lower_order_final": lower}
        predictor = result("dpm_solver_v3", corrector="none", **common)
        assert (predictor - result("dpmpp", solver_type="heun", **common)).abs().max() < 1e-12
        corrected = result("dpm_solver_v3", corrector="full", **common)
        assert (corrected - result("unipc", variant="vary_coeff", **common)).abs().max() < 1e-12
        assert (corrected - predictor).abs().max() > 1e-5


@pytest.mark.parametrize("options", [{"order": 1, "corrector": "none"}, {"order": 3}, {"order": 3, "pseudo": True}])
def test_exact_where_the_statistics_are(options):
    """Where f' = s f + b holds, g is constant: every order is exact with any number of calls, to both ends."""
    statistics = smooth(VP, levels=8)
    network = Exact(VP, statistics)
    x = torch.randn(3, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    low, zero = network.solution(x)
    for steps in (1, 4):
        for end, truth in {"t_end": low, "zero": zero}.items():
            if steps >= (options["order"] if steps > 1 else 1):
                plan = samplers.solvers.v3.dpm_solver_v3(Grid(VP, end=end), steps, statistics=statistics, **options)
                assert (plan.run(network, x, prediction="epsilon") - truth).abs().max() < 1e-6


def test_the_published_sums_tend_to_the_integrals():
    """Trapezoidal sums: a quarter of the error with twice the levels. The nodes are levels of all three."""
    x = torch.randn(3, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gaps = []
    coarse = smooth(VP, levels=10)
    network = Exact(VP, coarse)
    for levels in (40, 80, 160):
        lam = np.linspace(coarse.lam[0], coarse.lam[-1], levels + 1)
        statistics = Statistics(lam, *coarse.at(lam))  # the same lines
        grid = Grid(VP, times=VP.t_of_lambda(coarse.lam[::2]), end="t_end")
        ours, theirs = (
            samplers.solvers.v3.dpm_solver_v3(grid, 5, statistics=statistics, as_published=flag).run(
                network, x, prediction="epsilon"
            )
            for flag in (False, True)
        )
        gaps.append(float((ours - theirs).abs().max()))
    assert 3.5 < gaps[0] / gaps[1] < 4.5 and 3.5 < gaps[1] / gaps[2] < 4.5


def test_the_published_code_moves_nodes_to_levels():
    with pytest.raises(ValueError, match="fall on one"):
        build_plan(VP, "dpm_solver_v3", 30, end="t_end", statistics=smooth(VP, levels=10), as_published=True)
    with pytest.raises(ValueError, match="ends at t_end"):
        build_plan(VP, "dpm_solver_v3", 5, statistics=smooth(VP), as_published=True)


def test_from_pure_noise_with_statistics(mixture, z):
    """A flow schedule begins at alpha = 0, below the statistics: second order there, too."""
    schedule, gaps = RectifiedFlow(), []
    draw = torch.Generator().manual_seed(1)
    x0, e = (torch.randn(64, 1, 1, 2, dtype=torch.float64, generator=draw) for _ in range(2))
    network = mixture.model(schedule, "flow")
    batch = Batch(network, e, mixture.means[torch.arange(64) % 3] + 0.25 * x0)
    statistics = estimate(Problem(schedule, "flow", (batch,), (batch,)), 60)
    exact = mixture.exact(schedule, z, t_end=0.02)
    for steps in (20, 40):
        grid = Grid(schedule, times=np.linspace(1, 0.02, steps + 1), end="t_end")
        options = {"statistics": statistics, "order": 2, "corrector": "none", **FULL}
        plan = build_plan(schedule, "dpm_solver_v3", steps, grid, "flow", **options)
        gaps.append(float((plan.run(network, z) - exact).square().mean().sqrt()))
    assert gaps[1] < 2e-3 and gaps[0] / gaps[1] > 3


def test_another_schedule_or_sample_is_an_error(mixture, z):
    statistics = smooth(VP, shape=(1, 1, 3))
    plan = build_plan(VP, "dpm_solver_v3", 5, statistics=statistics)
    with pytest.raises(ValueError, match=r"samples of shape \(1, 1, 3\), not \(1, 1, 2\)"):
        plan.run(mixture.model(VP), z)
    with pytest.raises(ValueError, match="another schedule"):
        build_plan(EDM(0.002, 8000), "dpm_solver_v3", 5, statistics=statistics)
    for wrong in ({"order": 4}, {"corrector": "best"}, {"statistics": 3}):
        with pytest.raises(ValueError):
            build_plan(VP, "dpm_solver_v3", 5, **wrong)


def test_compiles_as_one_graph(mixture, z):
    plan = build_plan(VP, "dpm_solver_v3", 4, statistics=smooth(VP, shape=(1, 1, 2)))
    x = z.float()

    def network(x, t):
        return torch.tanh(x) * (1 + t)

    fast = torch.compile(lambda x: plan.run(network, x), fullgraph=True, backend="eager")
    assert torch.equal(fast(x), plan.run(network, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_in_a_pipeline(tmp_path, dtype):
    """Statistics of a file, per element, in an unmodified pipeline: the coefficients follow the latents' dtype."""
    smooth(SD, shape=(4, 8, 8)).save(tmp_path / "s.safetensors")
    options = {"statistics": str(tmp_path / "s.safetensors"), "order": 2}
    scheduler = samplers.SolverScheduler(**tiny_pipes.SD, solver="dpm_solver_v3", solver_options=options)
    pipe = tiny_pipes.sd(scheduler)
    latents = torch.randn(tiny_pipes.LATENT, generator=tiny_pipes.gen(1))
    embeds = torch.randn(1, 3, 8, generator=tiny_pipes.gen(2))
    if dtype == torch.float32:
        given = {"latents": latents, "prompt_embeds": embeds, "guidance_scale": 1.0, "output_type": "latent"}
        out = pipe(num_inference_steps=5, **given).images
    else:  # half-precision networks are slow on a CPU, so the scheduler alone
        scheduler.set_timesteps(5)
        out = latents.half()
        for t in scheduler.timesteps:
            noise = pipe.unet(out.float(), t, embeds).sample.half()
            out = scheduler.step(noise, t, out).prev_sample
    assert out.dtype == dtype

    def network(x, t):
        return pipe.unet(x, t, embeds).sample

    with torch.no_grad():
        expected = build_plan(SD, "dpm_solver_v3", 5, **options).run(network, latents)
    assert (out - expected).abs().max() < (2e-5 if dtype == torch.float32 else 3e-2) * expected.abs().max()


def test_a_step_alone_keeps_the_state_in_float32(mixture, z):
    plan = build_plan(VP, "dpm_solver_v3", 3, statistics=smooth(VP, shape=(1, 1, 2)), prediction="epsilon")
    state = plan.begin(z.half())
    for k in range(3):
        state = plan.step(k, state, mixture.model(VP)(state.input, plan.label[k]))
    assert state.input.dtype == torch.float32
    assert (state.input - plan.run(mixture.model(VP), z.half().double())).abs().max() < 1e-5
