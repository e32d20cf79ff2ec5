"""Where the calls of flow models are placed: shift, terminal and the use_*_sigmas flags, against diffusers' own numbers
and the formulas on sigma itself."""

import diffusers
import numpy as np
import pytest
import torch
from scipy.stats import beta as beta_distribution

import samplers
from samplers import Grid, RectifiedFlow, SolverScheduler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
FM = diffusers.FlowMatchEulerDiscreteScheduler
FLAGS = ({}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True})
SETTINGS = [  # settings of the scheduler, and the mu of a pipeline
    ({}, None),
    ({"shift": 3.0}, None),
    ({"shift": 0.5, "num_train_timesteps": 400}, None),
    ({"shift": 3.0, "shift_terminal": 0.1}, None),
    ({"use_dynamic_shifting": True}, 0.8),
    ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 2.5),
    ({"use_dynamic_shifting": True, "shift_terminal": 0.02, "shift": 3.0}, 0.7),
]
IDS = [f"{'-'.join(map(str, settings.values()))}-{mu}" for settings, mu in SETTINGS]


def flagged(flag: dict) -> str:
    return next(iter(flag), "plain").removeprefix("use_").removesuffix("_sigmas")


def placed(scheduler, **given) -> np.ndarray:
    scheduler.set_timesteps(**given)
    np.testing.assert_allclose(
        scheduler.timesteps, scheduler.config.num_train_timesteps * scheduler.sigmas[:-1], rtol=1e-5, atol=1e-4
    )
    return scheduler.sigmas.double().numpy()


@pytest.mark.parametrize("flag", FLAGS, ids=flagged)
@pytest.mark.parametrize(("settings", "mu"), SETTINGS, ids=IDS)
def test_flow_match_places_as_diffusers(settings, mu, flag):
    """By number and by given sigmas (as the Flux pipelines call it), in every way of making the scheduler."""
    theirs = FM(**settings, **flag)
    makes = [samplers.Euler.from_config(theirs.config), SolverScheduler.from_config(theirs.config, solver="euler")]
    makes.append(SolverScheduler.from_config(makes[0].config, solver="abm", solver_options={"order": 2}))
    makes.append(samplers.Euler.from_config(FM.from_config(makes[0].config).config))
    for given in ({"num_inference_steps": 10}, {"num_inference_steps": 2}, {"sigmas": np.linspace(1.0, 1 / 7, 7)}):
        expected = placed(theirs, **given, mu=mu)
        for ours in makes:
            np.testing.assert_allclose(placed(ours, **given, mu=mu), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("solver", ["unipc", "dpmpp", "deis"])
def test_solvers_in_lambda_make_their_last_call_one_step_before_the_end(solver, shift):
    """As diffusers' UniPC, which begins at 0.999 where ours begin at 1; by the config of either of diffusers'."""
    theirs = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift, final_sigmas_type="zero"
    )
    theirs.set_timesteps(8)
    expected = theirs.sigmas.double().numpy()
    for config in (theirs.config, FM(shift=shift).config):
        ours = placed(SolverScheduler.from_config(config, solver=solver), num_inference_steps=8)
        assert ours == pytest.approx(expected, abs=1.5e-3 * shift)


@pytest.mark.parametrize("flag", FLAGS[1:], ids=flagged)
def test_the_rule_and_solvers_of_several_calls_obey_the_flags(flag):
    theirs = FM(shift=3.0, **flag)
    expected = placed(theirs, num_inference_steps=5)
    assert placed(SolverScheduler.from_config(theirs.config), num_inference_steps=5) == pytest.approx(
        expected, rel=2e-5
    )
    heun = samplers.Heun.from_config(theirs.config)
    heun.set_timesteps(9)
    assert heun.sigmas.numpy() == pytest.approx(expected[[0, 1, 1, 2, 2, 3, 3, 4, 4, 5]], rel=2e-5)
    heun.set_timesteps(sigmas=[1.0, 0.7, 0.4])
    theirs.set_timesteps(sigmas=[1.0, 0.7, 0.4])
    assert heun.sigmas.numpy() == pytest.approx(theirs.sigmas.numpy()[[0, 1, 1, 2, 2, 3]], rel=2e-5)


def test_formulas_on_sigma_itself():
    """Karras' eq. 5, equal ratios, and the quantiles of Beta(0.6, 0.6), all from sigma = 1 on."""
    schedule, n = RectifiedFlow(shift=3.0), 8
    low = 3 * schedule.t_min / (1 + 2 * schedule.t_min)
    u = np.linspace(0, 1, n)
    expected = {
        "karras": (1 + u * (low ** (1 / 7) - 1)) ** 7,
        "exponential": low**u,
        "beta": low + (1 - low) * beta_distribution.ppf(1 - u, 0.6, 0.6),
    }
    for kind, sigma in expected.items():
        nodes = Grid(schedule, kind).nodes(n)
        np.testing.assert_allclose(nodes.sigma, [*sigma, 0.0], rtol=1e-9)
        np.testing.assert_allclose(nodes.label[:n], 1000 * sigma, rtol=1e-9)
        assert (np.diff(nodes.sigma) < 0).all()
    # on other schedules "exponential" is "logsnr"
    vp = samplers.VPDiscrete.scaled_linear()
    np.testing.assert_allclose(Grid(vp, "exponential").nodes(9).t, Grid(vp, "logsnr").nodes(9).t, rtol=1e-12)


@pytest.mark.parametrize(
    "own", [{}, {"sigma_min": 0.01, "sigma_max": 200.0}, {"beta_schedule": "scaled_linear"}], ids=str
)
def test_unipc_places_karras_on_sigma_over_alpha(own):
    """The one scheduler of networks trained on betas whose flag works with use_flow_sigmas in diffusers."""
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_karras_sigmas": True}
    theirs = diffusers.UniPCMultistepScheduler(**flow, **own)
    theirs.set_timesteps(10)
    for ours in (samplers.UniPC.from_config(theirs.config), SolverScheduler.from_config(theirs.config, solver="euler")):
        assert placed(ours, num_inference_steps=10) == pytest.approx(theirs.sigmas.double().numpy(), rel=2e-4)
    back = diffusers.UniPCMultistepScheduler.from_config(ours.config)
    back.set_timesteps(10)
    torch.testing.assert_close(back.sigmas, theirs.sigmas, rtol=1e-4, atol=1e-7)


BETAS = (
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
)


@pytest.mark.parametrize("flag", FLAGS[1:], ids=flagged)
@pytest.mark.parametrize("name", BETAS)
def test_where_diffusers_leaves_the_flow(name, flag):
    """These take the levels sigma / alpha of their betas for sigma, up to 157: alpha = 1 - sigma is negative."""
    if name.startswith("UniPC") and "use_karras_sigmas" in flag:
        pytest.skip("works: the test above")
    flow = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    theirs = getattr(diffusers, name)(**flow, **flag)
    theirs.set_timesteps(8)
    assert theirs.sigmas.max() > 100
    ours = placed(samplers.Euler.from_config(theirs.config), num_inference_steps=8)
    assert ours == pytest.approx(placed(FM(shift=3.0, **flag), num_inference_steps=8), rel=2e-5)


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DEISMultistepScheduler"])
def test_dynamic_shift_of_the_others(name):
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": True}
    ours = samplers.Euler.from_config(getattr(diffusers, name)(**flow).config)
    theirs = FM(use_dynamic_shifting=True)
    given = {"num_inference_steps": 6, "mu": 0.9}
    assert placed(ours, **given) == pytest.approx(placed(theirs, **given), rel=2e-5)


@pytest.mark.parametrize("mu", [None, "a", float("nan"), float("inf"), 1000.0, [1.0]], ids=str)
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_mu_that_makes_no_shift(mu, kind):
    flow = SolverScheduler.from_config(FM(use_dynamic_shifting=True, time_shift_type=kind).config)
    if mu == 1000.0 and kind == "linear":
        return  # a shift like any other
    with pytest.raises(ValueError, match="mu"):
        flow.set_timesteps(4, mu=mu)
    if kind == "linear":
        with pytest.raises(ValueError, match="mu"):
            flow.set_timesteps(4, mu=-1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sigmas": [1.5, 0.5]}, "sigmas"),
        ({"sigmas": [0.5, -0.5]}, "sigmas"),
        ({"sigmas": [1e308, 0.5]}, "sigmas"),
        ({"timesteps": [1500, 300]}, "schedule"),
        ({"timesteps": [1e308, 300]}, "schedule"),
        ({"timesteps": [500, 0]}, "sigma = 0"),
        ({"sigmas": [0.0]}, "sigmas"),
    ],
)
def test_levels_that_a_flow_has_not(given, message):
    for shift in (0.5, 1.0, 3.0):
        flow = SolverScheduler.from_config(FM(shift=shift).config, solver="euler")
        with pytest.raises(ValueError, match=message):
            flow.set_timesteps(**given)


def test_given_timesteps_are_what_the_network_is_told():
    """With a shift diffusers' sigmas are not those of its labels; without, both say the same."""
    labels = [1000.0, 640.0, 250.0, 31.25]
    for shift, same in ((1.0, True), (3.0, False)):
        theirs = FM(shift=shift)
        theirs.set_timesteps(timesteps=labels)
        ours = placed(samplers.Euler.from_config(theirs.config), timesteps=labels)
        assert ours == pytest.approx([1.0, 0.64, 0.25, 0.03125, 0.0])
        assert torch.allclose(theirs.sigmas.double(), torch.from_numpy(ours)) == same


def test_ays_is_published_in_sigma_over_alpha():
    nodes = Grid(RectifiedFlow(shift=3.0), "ays").nodes(10)
    published = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152)
    np.testing.assert_allclose((nodes.sigma / nodes.alpha)[:10], published, rtol=1e-9)
