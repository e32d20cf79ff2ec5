import numpy as np
import pytest

from samplers import EDM, RectifiedFlow, VPDiscrete, VPLinear
from samplers.schedule import training_betas

SCHEDULES = [VPLinear(), VPDiscrete.scaled_linear(), EDM(), RectifiedFlow(), RectifiedFlow(shift=3.0)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_inverses(schedule):
    t = np.linspace(schedule.t_min, 0.999 * schedule.t_max, 57)
    np.testing.assert_allclose(schedule.t_of_lambda(schedule.lam(t)), t, rtol=1e-9)
    np.testing.assert_allclose(schedule.t_of_model_time(schedule.model_time(t)), t, rtol=1e-12)
    np.testing.assert_allclose(schedule.lam(t), np.log(schedule.alpha(t) / schedule.sigma(t)), atol=1e-9)
    assert (np.diff(schedule.lam(t)) < 0).all()


def test_vp_discrete_meets_the_training_values():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    schedule = VPDiscrete.scaled_linear()
    labels = np.array([0, 1, 500, 999])
    t = schedule.t_of_model_time(labels)
    np.testing.assert_allclose(schedule.alpha(t) ** 2, np.cumprod(1 - betas)[labels], rtol=1e-12)
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1.0, rtol=1e-14)
    halfway = 0.5 * (schedule.log_alpha(t[0]) + schedule.log_alpha(t[1]))
    assert schedule.log_alpha(0.5 * (t[0] + t[1])) == pytest.approx(halfway, rel=1e-12)
    assert schedule.model_time(1.0) == pytest.approx(999)


def test_vp_linear_is_the_integral_of_beta():
    t = 0.37
    u = np.linspace(0, t, 20001)
    beta = 0.1 + 19.9 * u
    integral = (0.5 * (beta[1:] + beta[:-1]) * np.diff(u)).sum()
    assert VPLinear().alpha(t) == pytest.approx(np.exp(-0.5 * integral), rel=1e-9)


def test_flow_shift():
    schedule = RectifiedFlow(shift=3.0)
    assert schedule.sigma(0.5) == pytest.approx(0.75)  # 3 * 0.5 / (1 + 2 * 0.5)
    assert schedule.alpha(0.5) == pytest.approx(0.25)
    assert schedule.model_time(0.5) == pytest.approx(750)
    assert schedule.lam(1.0) == -np.inf


def test_zero_terminal_snr_betas():
    plain, rescaled = (
        training_betas("scaled_linear", 0.00085, 0.012),
        training_betas("scaled_linear", 0.00085, 0.012, zero_snr=True),
    )
    assert np.cumprod(1 - rescaled)[-1] == pytest.approx(2.0**-24, rel=1e-6)
    assert rescaled[0] == pytest.approx(plain[0], rel=1e-9)


def test_bad_schedules():
    with pytest.raises(ValueError, match="did you mean 'scaled_linear'"):
        training_betas("scaled_linar")
    with pytest.raises(ValueError, match=r"betas.*VPDiscrete|VPDiscrete.*betas"):
        VPDiscrete([0.1, 1.0])
    with pytest.raises(ValueError, match="shift"):
        RectifiedFlow(shift=0)
