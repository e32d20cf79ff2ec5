"""CFG++ against its formula (arXiv 2406.08070), written out for DDIM and DPM-Solver++(2M)."""

import math

import pytest
import torch

from samplers import CFGPlusPlus, Guidance, RectifiedFlow, VPDiscrete, build_plan, dynamic_threshold, sample

SCHEDULES = {"vp": VPDiscrete.scaled_linear(), "flow": RectifiedFlow(3.0)}
CLASSES = torch.arange(8) % 2


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


def models(mixture, schedule, prediction):
    return mixture.model(schedule, prediction, CLASSES), mixture.model(schedule, prediction)


def by_hand(mixture, plan, x, scale, second_order=False):
    """x_t = (sigma_t / sigma_s) x~ - alpha_t (e^-h - 1) D with x~ = alpha_s x_0(guided) + sigma_s eps(uncond)."""
    old = None
    for k in range(len(plan)):
        (a, s), (a_t, s_t) = ((float(plan.alpha[i]), float(plan.sigma[i])) for i in (k, k + 1))
        cond = mixture.posterior(x, a, s, CLASSES)[0]
        uncond, eps = mixture.posterior(x, a, s)
        guided = uncond + scale * (cond - uncond)
        if not second_order or k == 0 or s_t == 0 or plan.alpha[k - 1] == 0:
            x = a_t * guided + s_t * eps
        else:
            lam = [math.log(plan.alpha[i] / plan.sigma[i]) for i in (k - 1, k, k + 1)]
            h, r = lam[2] - lam[1], (lam[1] - lam[0]) / (lam[2] - lam[1])
            d = (1 + 1 / (2 * r)) * guided - old / (2 * r)
            x = s_t / s * (a * guided + s * eps) - a_t * math.expm1(-h) * d
        old = guided
    return x


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "flow"])
def test_first_order(mixture, z, schedule, prediction):
    if prediction == "epsilon" and schedule is SCHEDULES["flow"]:
        pytest.skip("epsilon is no prediction at alpha = 0")
    cond, uncond = models(mixture, schedule, prediction)
    for solver in ("ddim", "euler", "ipndm"):
        options = {"order": 1} if solver == "ipndm" else {}
        plan = build_plan(schedule, solver, 9, prediction=prediction, **options)
        result = plan.run(cond, z, guidance=CFGPlusPlus(0.6, uncond))
        expected = by_hand(mixture, plan, z, 0.6)
        assert (result - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp"])
def test_second_order(mixture, z, schedule, solver):
    cond, uncond = models(mixture, schedule, "v_prediction")
    plan = build_plan(schedule, solver, 9, prediction="v_prediction")
    result = plan.run(cond, z, guidance=CFGPlusPlus(0.8, uncond))
    expected = by_hand(mixture, plan, z, 0.8, second_order=True)
    assert (result - expected).abs().max() < 1e-10 * expected.abs().max()


def test_it_is_guidance_of_another_scale_at_every_call(mixture, z):
    """A DDIM step with lambda is one of classifier-free guidance lambda alpha_t / (alpha_t - alpha_s sigma_t /
    sigma_s)."""
    vp = SCHEDULES["vp"]
    cond, uncond = models(mixture, vp, "epsilon")
    plan = build_plan(vp, "ddim", 7)
    a, s, state = plan.alpha, plan.sigma, plan.begin(z)
    for k in range(len(plan)):
        scale = 0.6 * a[k + 1] / (a[k + 1] - a[k] * s[k + 1] / s[k])
        label = torch.tensor(plan.label[k])
        output = Guidance(scale, uncond)(cond(state.input, label), state.input, label, s[k] / a[k])
        state = plan.step(k, state, output)
    result = plan.run(cond, z, guidance=CFGPlusPlus(0.6, uncond))
    assert (result - state.input).abs().max() < 1e-10


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "res_2m", "er_sde", "gradient_estimation", "euler_ancestral"])
def test_scale_0_is_the_unconditional_model(mixture, z, schedule, solver):
    cond, uncond = models(mixture, schedule, "flow")
    noise = torch.randn(10, *z.shape, generator=torch.Generator().manual_seed(2), dtype=z.dtype)
    plan = build_plan(schedule, solver, 9, prediction="flow")
    with_cond = plan.run(cond, z, guidance=CFGPlusPlus(0.0, uncond), noise=lambda k: noise[k])
    assert (with_cond - plan.run(uncond, z, noise=lambda k: noise[k])).abs().max() < 1e-10


def test_epsilon_and_x_0_forms_agree(mixture, z):
    vp = SCHEDULES["vp"]
    cond, uncond = models(mixture, vp, "epsilon")
    options = {"schedule": vp, "solver": "ddim", "guidance": CFGPlusPlus(0.7, uncond)}
    one, other = (sample(cond, z, target=target, **options) for target in ("sample", "epsilon"))
    assert (one - other).abs().max() < 1e-10


def test_both_models_see_the_same_input_in_the_models_dtype(mixture, z):
    seen = []

    def model(x, label):
        seen.append((x, float(label)))
        return x * 0.5

    sample(*(model, z.bfloat16()), schedule=SCHEDULES["vp"], solver="ddim", steps=3, guidance=CFGPlusPlus(0.5, model))
    assert len(seen) == 6 and all(x.dtype == torch.bfloat16 for x, _ in seen)
    for (x, label), (y, other) in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(x, y) and label == other


@pytest.mark.parametrize("solver", ["heun", "singlestep", "dpmpp_sde", "pndm"])
def test_steps_of_several_calls_are_refused(mixture, z, solver):
    vp = SCHEDULES["vp"]
    cond, uncond = models(mixture, vp, "epsilon")
    with pytest.raises(ValueError, match="one call each"):
        sample(cond, z, schedule=vp, solver=solver, steps=9, guidance=CFGPlusPlus(0.6, uncond))


def test_what_cannot_be_combined(mixture, z):
    vp = SCHEDULES["vp"]
    cond, uncond = models(mixture, vp, "epsilon")
    with pytest.raises(ValueError, match="leave out threshold"):
        guidance = CFGPlusPlus(0.6, uncond)
        sample(cond, z, schedule=vp, solver="ddim", guidance=guidance, threshold=dynamic_threshold)
    with pytest.raises(ValueError, match="solver='dpmpp'"):
        sample(cond, z, schedule=vp, guidance=CFGPlusPlus(0.6, uncond))
    with pytest.raises(ValueError, match="shape"):
        sample(cond, z, schedule=vp, solver="ddim", guidance=CFGPlusPlus(0.6, lambda x, t: x[:1]))
    assert sample(cond, z, schedule=vp, solver="ddim", guidance=CFGPlusPlus(0.6, uncond)).isfinite().all()
