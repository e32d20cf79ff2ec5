"""The surface of ratios: a known one is recovered, and the linear system is well conditioned."""

import numpy as np
import pytest

from samplers.calibrate.ratios import DCRatios, fit_surface, published_ratios

RNG = np.random.default_rng(0)
# in the authors' layout; a change of the ratio by a few tenths, as searches find
KNOWN = RNG.normal(size=(4, 3, 3)) * np.array([0.05, 0.1, 0.1, 0.1])[:, None, None]
KNOWN[0, 2, 2] += 1.0


def known(calls, guidance):
    return published_ratios(KNOWN.ravel(), calls, guidance)


DATA = [DCRatios(g, known(n, g)) for g in (1.0, 3.0, 5.0, 7.5) for n in (5, 8, 10, 15, 20)]


def test_a_known_surface_is_recovered():
    """Inside the fitted ranges, also where nothing was searched. Little ridge, since there is no noise."""
    surface = fit_surface(DATA, ridge=1e-12)
    for calls in range(5, 21):
        for guidance in (1.0, 2.2, 6.0, 7.5):
            assert surface.ratios(calls, guidance) == pytest.approx(known(calls, guidance), abs=1e-4)


def test_is_far_better_conditioned_than_powers():
    rows = []
    for each in DATA:
        x, c, n = np.arange(3, len(each.ratios) + 1) / len(each.ratios), each.guidance / 12, len(each.ratios) / 50
        rows.append(np.einsum("ni,j,k->nijk", np.vander(x, 4), np.vander([c], 3)[0], np.vander([n], 3)[0]))
    powers = np.linalg.cond(np.concatenate(rows).reshape(-1, 36))
    assert powers > 1e5
    assert fit_surface(DATA, ridge=1e-12).condition < powers / 100
    assert fit_surface(DATA).condition < 100


def test_the_ridge_resists_noise():
    """Noise of 0.05 on the searched ratios: between the searched points the error stays below it."""
    noisy = [each._replace(ratios=each.ratios + 0.05 * RNG.normal(size=len(each.ratios))) for each in DATA]
    surface = fit_surface(noisy)
    gaps = [surface.ratios(n, g)[2:] - known(n, g)[2:] for n in (6, 9, 12, 18) for g in (2.0, 4.0, 6.0)]
    assert np.sqrt(np.mean(np.concatenate(gaps) ** 2)) < 0.05


def test_few_searches_make_a_surface_of_lower_degree():
    surface = fit_surface([DCRatios(3.0, np.array([1.0, 1.0, 0.9, 1.1, 1.2]))], ridge=1e-12)
    assert surface.coefficients.shape == (3, 1, 1)
    assert surface.ratios(5, 3.0) == pytest.approx([1.0, 1.0, 0.9, 1.1, 1.2], abs=1e-6)
    assert (surface.ratios(9, 30.0) == surface.ratios(9, 3.0)).all()  # outside the range: its nearest end


def test_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="more calls than dc_order"):
        fit_surface([DCRatios(3.0, np.ones(2))])
    with pytest.raises(ValueError, match="different dc_order"):
        fit_surface([DCRatios(3.0, np.ones(8)), DCRatios(3.0, np.ones(8), dc_order=3)])
