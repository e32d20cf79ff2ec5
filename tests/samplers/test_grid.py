import numpy as np
import pytest

from samplers import EDM, Grid, RectifiedFlow, VPDiscrete, VPLinear
from samplers.grid import GRIDS

SD = VPDiscrete.scaled_linear()


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("end", ["zero", "t_end"])
@pytest.mark.parametrize("n", [1, 2, 10, 30])
def test_every_grid(kind, end, n):
    schedule = RectifiedFlow() if kind == "optimal_steps" else SD
    nodes = Grid(schedule, kind, end=end).nodes(n)
    assert len(nodes) == n + 1
    assert (np.diff(nodes.lam) >= 0).all() and (np.diff(nodes.lam)[:-1] > 0).all()
    assert nodes.sigma[-1] == 0 if end == "zero" else nodes.t[-1] == pytest.approx(schedule.t_min)
    assert (nodes.label[:n] >= 0).all() and (nodes.label[:n] <= schedule.model_time(schedule.t_max)).all()


def test_closed_forms():
    logsnr = Grid(SD, "logsnr", end="t_end").nodes(7)
    np.testing.assert_allclose(np.diff(logsnr.lam), (SD.lam(SD.t_min) - SD.lam(1.0)) / 7, rtol=1e-9)
    assert (logsnr.t[0], logsnr.t[-1]) == (1.0, SD.t_min)
    quadratic = Grid(VPLinear(), "quadratic", end="t_end").nodes(4)
    np.testing.assert_allclose(np.sqrt(quadratic.t), np.linspace(1.0, 1e-3**0.5, 5), rtol=1e-12)
    karras = Grid(EDM(), "karras").nodes(18)  # EDM eq. 5
    i = np.arange(18)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(karras.sigma, [*expected, 0.0], rtol=1e-9)


def test_labels_as_diffusers_spaces_them():
    assert Grid(SD, "linspace").nodes(5).label[:5] == pytest.approx([999, 799, 599, 400, 200])
    assert Grid(SD, "leading", steps_offset=1).nodes(5).label[:5] == pytest.approx([831, 665, 499, 333, 167])
    assert Grid(SD, "trailing").nodes(5).label[:5] == pytest.approx([999, 799, 599, 399, 199])


@pytest.mark.parametrize(
    ("kind", "labels"),
    [  # published with the noise levels, arXiv 2404.14507
        ("ays", [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]),
        ("ays_sdxl", [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]),
    ],
)
def test_ays_agrees_with_the_published_labels(kind, labels):
    np.testing.assert_allclose(Grid(SD, kind).nodes(10).label[:10], labels, atol=1.0)


@pytest.mark.parametrize(
    "levels",  # sigma / alpha as they are published, all but the last
    [
        [14.61464119, 0.803307],
        [14.61464119, 2.84484982, 1.24153244, 0.59516323, 0.25053367],
        [14.61464119, 5.85520077, 2.84484982, 1.61558151, 0.95350921, 0.59516323, 0.36617002, 0.19894916, 0.09824532],
    ],
)
def test_gits_agrees_with_the_published_levels(levels):
    nodes = Grid(SD, "gits").nodes(len(levels))
    np.testing.assert_allclose(nodes.sigma[:-1] / nodes.alpha[:-1], levels, rtol=2e-5)


def test_optimal_steps_are_sigmas_of_a_flow():
    published = [0.9968, 0.9886, 0.9819, 0.975, 0.966, 0.9471, 0.9158, 0.8287, 0.5512, 0.2808, 0.001]
    for shift in (1.0, 3.0):
        nodes = Grid(RectifiedFlow(shift=shift), "optimal_steps").nodes(10)
        np.testing.assert_allclose(nodes.sigma, [*published[:-1], 0.0], rtol=1e-9)
    twice = Grid(RectifiedFlow(), "optimal_steps").nodes(20).sigma  # geometric means in between
    np.testing.assert_allclose(twice[:-1:2], published[:-1], rtol=1e-9)
    np.testing.assert_allclose(twice[1::2], np.sqrt(np.multiply(published[1:], published[:-1])), rtol=1e-9)
    with pytest.raises(ValueError, match="optimal_steps"):  # Stable Diffusion begins at less noise
        Grid(SD, "optimal_steps").nodes(10)


def test_given_nodes():
    nodes = Grid(SD, sigmas=[14.615, 3.0, 0.5, 0.0]).nodes(3)  # the published maximum is rounded up
    np.testing.assert_allclose(nodes.sigma / nodes.alpha, [14.6146, 3.0, 0.5, 0.0], rtol=1e-5)
    assert Grid(SD, timesteps=[999, 400, 3], end="t_end").nodes(3).label == pytest.approx([999, 400, 3, 0])
    flow = Grid(RectifiedFlow(shift=3.0), sigmas=[1.0, 0.75, 0.2]).nodes(3)
    assert flow.sigma == pytest.approx([1.0, 0.75, 0.2, 0.0])
    assert flow.label[:3] == pytest.approx([1000, 750, 200])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grid(SD, "logsrn"), "did you mean 'logsnr'"),
        (lambda: Grid(SD, end="zeros"), "did you mean 'zero'"),
        (lambda: Grid(SD).nodes(0), "0|2.5"),
        (lambda: Grid(SD).nodes(2.5), "2.5"),
        (lambda: Grid(SD, sigmas=[1.0, 2.0, 0.5]), "sigmas.* 2 .* 0.5 .* 2"),
        (lambda: Grid(SD, sigmas=[3.0, 3.0, 0.5]), "entry [12]"),
        (lambda: Grid(SD, sigmas=[3.0, float("nan")]), "sigmas.*nan"),
        (lambda: Grid(SD, timesteps=[1500, 300]), "1500"),
        (lambda: Grid(SD, sigmas=[30.0, 1.0]), "30"),
        (lambda: Grid(SD, sigmas=[0.0]), "sigmas.* 0"),
        (lambda: Grid(SD, sigmas=[1.0], timesteps=[3]), "sigmas.*timesteps|use_karras_sigmas"),
        (lambda: Grid(SD, timesteps=[900, 10]).nodes(3), " 2 .* 3"),
        (lambda: Grid(SD, t_end=1e-4), "schedule"),
        (lambda: Grid(SD, t_start=0.001, t_end=1.0), "t_end"),
        (lambda: Grid(RectifiedFlow(), "logsnr").nodes(4), "alpha > 0.*t_start"),
        (lambda: Grid(EDM(), "trailing").nodes(4), "trailing.*VPDiscrete"),
    ],
)
def test_misuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()
