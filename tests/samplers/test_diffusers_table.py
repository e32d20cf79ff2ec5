"""The agreement table of docs/diffusers.md: every claim, measured again."""

import diffusers
import numpy as np
import pytest
import torch
from check_diffusers import BEGIN, DOC, END, TOLERANCE, cases, difference
from ids import named

import samplers

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("case", cases(), ids=lambda c: named(f"{c.theirs}-{c.ours}-{c.settings}-{c.options}"))
def test_claim(case):
    """Cases with a reason differ, those without agree."""
    assert (difference(case) < TOLERANCE) == (not case.why)


def test_the_document_has_one_row_per_claim():
    rows = DOC.read_text().split(BEGIN)[1].split(END)[0].splitlines()[2:]
    assert len(rows) == len(cases())
    for case, row in zip(cases(), rows, strict=True):
        _, theirs, _, ours, _, result, _ = (cell.strip() for cell in row.split("|"))
        assert (theirs, ours) == (case.theirs, case.ours)
        assert result.partition(": ")[2] == case.why if case.why else result == "the same"


def test_the_third_order_sde_weight():
    """The claim about diffusers' third-order SDE: the weight of h^2 m'' is 1/2 - 1/z + (1 - e^-z)/z^2 with z = 2h."""
    h = 0.7
    z = 2 * h
    u, w = np.polynomial.legendre.leggauss(20)
    u, w = (u + 1) / 2, w / 2
    integral = (w * z * np.exp(-z * (1 - u)) * u**2 / 2).sum()
    bracket = (1 - np.exp(-z) - z) / z**2
    assert integral == pytest.approx(bracket + 0.5, abs=1e-14) and abs(integral - (bracket - 0.5)) > 0.9


def test_flow_match_sigmas_are_the_same():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = samplers.Euler.from_config(theirs.config)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas.float())
    torch.testing.assert_close(ours.timesteps, theirs.timesteps.float())
