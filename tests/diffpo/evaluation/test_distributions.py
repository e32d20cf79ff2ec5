"""Distances of distributions against closed forms, direct loops, and numbers computed by torch-fidelity."""

import importlib.util

import numpy as np
import pytest

from diffpo.common.errors import DiffpoError
from diffpo.evaluation.distributions import Gaussian, compare, frechet, manifold, mmd
from diffpo.evaluation.distributions.sample import Labels, share


def features(n, m, d, seed):
    """Two sets of correlated features, of different means and covariances."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) @ (rng.normal(size=(d, d)) * 0.3) + 0.1
    return x, rng.normal(size=(m, d)) @ (rng.normal(size=(d, d)) * 0.3)


# torch_fidelity 0.4.0's fid_statistics_to_metric, kid_features_to_metric (one subset of the first min(n, m) rows) and
# prc_features_to_metric on these features, on the CPU with numpy 2.4; the last covariance is singular
GOLDEN = {
    (120, 100, 8, 0): (3.4106208934495683, 0.5701204221374749, 0.3916666666666667, 0.42),
    (60, 60, 16, 1): (13.848129214781949, 0.8874783972461753, 0.45, 0.3333333333333333),
    (20, 30, 32, 2): (103.680401224, 1.623471336431233, 0.35, 0.43333333333333335),
}


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_numbers_of_torch_fidelity(case):
    x, y = features(*case)
    least = min(len(x), len(y))
    fid, kid, precision, recall = GOLDEN[case]
    assert frechet.fid(x, y).value == pytest.approx(fid, rel=2e-8)
    assert mmd.kid(x[:least], y[:least]).value == pytest.approx(kid, rel=1e-10)
    found = manifold.precision_recall(x, y)
    assert [found["precision"].value, found["recall"].value] == pytest.approx([precision, recall], abs=1e-12)


@pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None, reason="needs torch-fidelity: pip install -e '.[parity]'"
)
@pytest.mark.parametrize("seed", [3, 4])
def test_torch_fidelity_itself_on_other_features(seed):
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = features(90, 90, 12, seed)
    theirs = torch.from_numpy(x), torch.from_numpy(y)
    fid = fid_statistics_to_metric(*map(fid_features_to_statistics, theirs), False)
    kid = kid_features_to_metric(*theirs, kid_subsets=1, kid_subset_size=90, verbose=False)
    prc = prc_features_to_metric(*theirs, verbose=False)
    ours = {name: each.value for name, each in manifold.precision_recall(x, y).items()}
    assert frechet.fid(x, y).value == pytest.approx(fid["frechet_inception_distance"], rel=1e-8)
    assert mmd.kid(x, y).value == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-9)
    assert ours == pytest.approx({name: prc[name] for name in ours}, rel=1e-6)


def test_fid_of_known_gaussians():
    """Commuting covariances: |m1 - m2|^2 + sum of (s1 - s2)^2, also along axes where one of them has no extent."""
    one, other = np.array([1.0, 4.0, 0.0, 9.0]), np.array([4.0, 1.0, 2.25, 0.0])
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    shift = np.array([1.0, -2.0, 0.0, 0.5])
    a = Gaussian(shift, rotation @ np.diag(one) @ rotation.T)
    b = Gaussian(np.zeros(4), rotation @ np.diag(other) @ rotation.T)
    expected = shift @ shift + np.sum((np.sqrt(one) - np.sqrt(other)) ** 2)
    assert frechet.distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert frechet.distance(a, a) == pytest.approx(0, abs=1e-12)


def test_fid_of_covariances_that_do_not_commute():
    """In two dimensions tr (S1^1/2 S2 S1^1/2)^1/2 = sqrt(tr(S1 S2) + 2 sqrt(det S1 det S2))."""
    a, b = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    found = frechet.distance(Gaussian(np.zeros(2), a), Gaussian(np.zeros(2), b))
    assert found == pytest.approx(np.trace(a) + np.trace(b) - 2 * root, rel=1e-12)


def test_influence_is_the_derivative_by_a_pictures_weight():
    x, y = features(30, 40, 5, 0)
    other = Gaussian.of(y)

    def weighted(weights):
        weights = weights / weights.sum()
        mean = weights @ x
        return Gaussian(mean, (x - mean).T @ ((x - mean) * weights[:, None]))

    influence, step = frechet._influence(x, weighted(np.ones(30)), other), 1e-6
    for k in (0, 7, 29):
        weights = np.ones(30)
        ends = []
        for sign in (1, -1):
            weights[k] = 1 + sign * step
            ends.append(frechet.distance(weighted(weights), other))
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(influence[k] / 30, rel=1e-4, abs=1e-7)


def test_extrapolation_takes_the_bias_away():
    """Of two samples of one distribution the true distance is 0."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(6):
        x, y = rng.normal(size=(2, 200, 16))
        found.append((frechet.fid(x, y).value, frechet.extrapolated(x, y)))
    raw, limit = np.mean(found, 0)
    assert raw > 0.3 and abs(limit) < 0.15 * raw


def test_kid_by_a_direct_loop():
    x, y = features(7, 5, 3, 0)

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    def within(z):
        return np.mean([kernel(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j])

    between = np.mean([kernel(a, b) for a in x for b in y])
    assert mmd.kid(x, y).value == pytest.approx(within(x) + within(y) - 2 * between, rel=1e-12)


@pytest.mark.parametrize("as_published", [False, True])
def test_cmmd_by_a_direct_loop(as_published):
    x, y = features(6, 4, 8, 1)
    a, b = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))

    def mean(u, v, same):
        pairs = [(i, j) for i in range(len(u)) for j in range(len(v)) if as_published or not same or i != j]
        return np.mean([np.exp(-np.sum((u[i] - v[j]) ** 2) / 200) for i, j in pairs])

    expected = 1000 * (mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False))
    assert mmd.cmmd(x, y, as_published=as_published).value == pytest.approx(expected, rel=1e-9)
    assert mmd.cmmd(3 * x, y, as_published=as_published).value == pytest.approx(expected, rel=1e-9)  # lengths


def test_kid_and_cmmd_are_zero_on_average_for_equal_distributions():
    rng = np.random.default_rng(0)
    for distance in (mmd.kid, mmd.cmmd):
        found = np.array([distance(*rng.normal(size=(2, 20, 6))).value for _ in range(150)])
        assert abs(found.mean()) < 3 * found.std(ddof=1) / np.sqrt(len(found))


def test_prompts_in_both_sets_do_not_pull_kid_down():
    """Pictures of a prompt are alike, in both sets. With pairs of them KID of equal models is negative."""
    rng, blind, aware = np.random.default_rng(0), [], []
    prompts = np.arange(12)
    for _ in range(80):
        centre = rng.normal(size=(12, 4))
        x, y = (centre + 0.1 * rng.normal(size=(12, 4)) for _ in range(2))
        blind.append(mmd.kid(x, y).value)
        aware.append(mmd.kid(x, y, prompts, prompts).value)
    error = np.std(aware, ddof=1) / np.sqrt(len(aware))
    assert abs(np.mean(aware)) < 3 * error and np.mean(blind) < -20 * error


def test_intervals_cover_the_expected_value():
    """Of 60 experiments at least 52 (the 0.3 % quantile at 95 %); groups of two equal pictures count once."""
    rng, found = np.random.default_rng(1), []
    mix = rng.normal(size=(6, 6)) / 2
    for _ in range(60):
        x, y = np.repeat(rng.normal(size=(60, 6)) @ mix + 0.3, 2, 0), rng.normal(size=(80, 6))
        groups = np.repeat(np.arange(60), 2) + 1000
        found.append([distance(x, y, groups) for distance in (frechet.fid, mmd.kid)])
    for column in zip(*found, strict=True):
        mean = np.mean([each.value for each in column])
        assert sum(each.low <= mean <= each.high for each in column) >= 52
        width = np.mean([each.high - each.low for each in column]) / 3.92
        assert width < 1.6 * np.std([each.value for each in column])


def test_distances_do_not_change_when_features_are_rotated():
    x, y = features(60, 50, 6, 0)
    rotation = np.linalg.qr(np.random.default_rng(5).normal(size=(6, 6)))[0]
    before, after = compare(x, y, "clip"), compare(x @ rotation, y @ rotation, "clip")
    assert before.numbers.keys() == {"fid", "kid", "cmmd", "precision", "recall", "density", "coverage"}
    for name, number in before.numbers.items():
        assert after.numbers[name].value == pytest.approx(number.value, rel=1e-8), name


def test_precision_recall_density_coverage_of_known_sets():
    """On a line: the reference 0, 1, ..., 9 with k = 1 has balls of radius 1, which overlap."""
    y = np.arange(10.0)[:, None]
    x = np.array([[0.5], [3.2], [20.0], [40.0]])
    found = manifold.precision_recall(x, y, k=1)
    # balls of x: 0.5 and 3.2 reach 2.7, 20 reaches 16.8, 40 reaches 20
    assert found["precision"].value == 0.5
    assert found["recall"].value == 1.0
    found = manifold.density_coverage(x, y, k=1)
    assert found["density"].value == pytest.approx((2 + 2 + 0 + 0) / 4)
    assert found["coverage"].value == 0.4  # the balls of 0, 1, 3 and 4
    assert manifold.precision_recall(y, y)["precision"].value == 1
    far = manifold.precision_recall(y + 1000, y)
    assert far["precision"].value == far["recall"].value == 0


def test_share_counts_equal_pictures_of_a_prompt_once():
    hits = np.array([1, 0, 1, 1, 0, 1, 1, 1], bool)
    once = share(hits, Labels.of(8, 0).mine)
    twice = [share(np.repeat(hits, 2), Labels.of(16, 0, groups).mine) for groups in (np.repeat(np.arange(8), 2), None)]
    assert once.value == twice[0].value == twice[1].value == 0.75
    widths = [each.high - each.low for each in (once, *twice)]
    assert widths[1] > 0.99 * widths[0] > 1.2 * widths[2]


@pytest.mark.parametrize("x", [[[1.0, 2.0]], [[1.0, np.nan], [0.0, 1.0]], [1.0, 2.0], np.zeros((3, 0))])
def test_too_few_or_not_finite_features_are_refused(x):
    y = np.zeros((4, 2))
    for distance in (frechet.fid, mmd.kid, mmd.cmmd, manifold.precision_recall, manifold.density_coverage):
        for pair in ((x, y), (y, x)):
            with pytest.raises(DiffpoError):
                distance(*pair)


def test_other_features_are_refused():
    x, y = np.zeros((4, 2)), np.zeros((4, 3))
    for distance in (frechet.fid, mmd.kid, manifold.precision_recall):
        with pytest.raises(DiffpoError, match=r"2 features.*3"):
            distance(x, y)


def test_statistics_of_pytorch_fid(tmp_path):
    x, y = features(60, 50, 6, 0)
    np.savez(tmp_path / "real.npz", mu=y.mean(0), sigma=np.cov(y, rowvar=False))
    found = compare(x, Gaussian.read(tmp_path / "real.npz"))
    assert found.numbers.keys() == {"fid"} and found.reference is None
    assert found.numbers["fid"].value == pytest.approx(frechet.fid(x, y).value, rel=1e-12)
    np.savez(tmp_path / "other.npz", mean=y.mean(0))
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}]), sigma=np.eye(1))
    (tmp_path / "text.npz").write_text("no")
    for name in ("other.npz", "pickled.npz", "text.npz", "missing.npz"):
        with pytest.raises(DiffpoError, match=name):
            Gaussian.read(tmp_path / name)


def test_notes_on_few_pictures():
    x, y = features(20, 300, 32, 0)
    assert any("20 pictures" in note and "32" in note for note in compare(x, y).notes)
    rng = np.random.default_rng(0)
    assert not compare(rng.normal(size=(400, 3)) + 1, rng.normal(size=(400, 3))).notes
