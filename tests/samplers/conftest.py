import warnings

import pytest
import torch

from samplers.analytic import GaussianMixture


@pytest.fixture(autouse=True)
def _nothing_is_computed_with_a_warning():
    """No infinities or NaNs on the way, in numpy's and scipy's own code either, and nothing about to be removed."""
    warnings.filterwarnings("error", category=RuntimeWarning)
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="diffusers")
    warnings.filterwarnings("error", category=DeprecationWarning, module="samplers")


@pytest.fixture(scope="session")
def mixture():
    """Two dimensions, three components, two classes, shaped like images of (1, 1, 2)."""
    means = torch.tensor([[-0.86, -0.74], [0.90, 0.24], [-0.26, 0.02]]).view(3, 1, 1, 2)
    stds = torch.tensor([[0.31, 0.20], [0.16, 0.34], [0.31, 0.26]]).view(3, 1, 1, 2)
    return GaussianMixture([0.27, 0.51, 0.22], means, stds, [0, 1, 0])


@pytest.fixture(scope="session")
def z():
    return torch.randn(8, 1, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
