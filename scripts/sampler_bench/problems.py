"""Sampling problems whose exact answer is known: Gaussian mixtures under the Stable Diffusion schedule.

Two mixtures are written out, since published codes were measured on them (published.py); every other one is drawn from
a seed, so that a rule can be checked on problems that nobody tuned it for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from samplers.analytic import GaussianMixture
from samplers.schedule import Schedule, VPDiscrete

STABLE_DIFFUSION = VPDiscrete.scaled_linear()


def random_mixture(d: int, components: int, seed: int, anisotropic: bool = False) -> GaussianMixture:
    """Means uniform in [-1, 1]; standard deviations uniform in [0.12, 0.4], or log-uniform in [0.01, 0.6]; two
    classes."""
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(components, 2.0))
    means = rng.uniform(-1, 1, (components, d))
    if anisotropic:  # closer to images: some directions are nearly fixed by the component
        stds = np.exp(rng.uniform(np.log(0.01), np.log(0.6), (components, d)))
    else:
        stds = rng.uniform(0.12, 0.4, (components, d))
    return GaussianMixture(weights, means, stds, np.arange(components) % 2)


def image_mixture(side: int, components: int, seed: int, inner: float = 0.3) -> GaussianMixture:
    """Pictures of side x side pixels as vectors of their Fourier modes: amplitudes fall as 1 / frequency, as in photos.

    The pixels' mean square is 1. A component is a mean picture, with the share inner^2 of the power around it; two
    classes.
    """
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.arange(side), np.arange(side)))
    amplitude = 1.0 / np.maximum(frequency, 0.5).ravel()
    amplitude /= np.sqrt((amplitude**2).mean())
    means = rng.standard_normal((components, side * side)) * amplitude * np.sqrt(1.0 - inner**2)
    stds = amplitude * inner * np.exp(rng.uniform(-0.3, 0.3, (components, side * side)))
    return GaussianMixture(rng.dirichlet(np.full(components, 4.0)), means, stds, np.arange(components) % 2)


GMM2A = {
    "weights": [0.268523, 0.513624, 0.217853],
    "means": [[-0.859159, -0.740452], [0.896657, 0.243767], [-0.262014, 0.02278]],
    "stds": [[0.305596, 0.197086], [0.158631, 0.340651], [0.307701, 0.263467]],
    "classes": [0, 1, 0],
}


def _table(text: str) -> np.ndarray:
    """16 numbers per component, on two lines."""
    return np.array(text.split(), np.float64).reshape(-1, 16)


GMM16A = {
    "weights": [0.315541, 0.065471, 0.247929, 0.149191, 0.221868],
    "means": _table("""
    -0.605615  0.344119  0.985483  -0.581029  0.70772  0.397822  -0.55665  -0.630457
    0.908314  -0.319125  -0.117211  0.312175  -0.119396  -0.999471  -0.479488  -0.055529
    0.522537  0.212773  -0.13961  -0.617943  0.569311  -0.625753  0.447558  -0.005184
    0.104415  -0.232021  -0.594018  -0.660496  0.282976  -0.447728  -0.971564  -0.614732
    0.842401  0.423414  0.160519  -0.196743  0.635847  -0.47363  0.266143  -0.975992
    0.291368  0.945118  0.416761  -0.846524  0.183023  -0.366411  0.839392  -0.96378
    -0.976246  -0.807594  -0.3214  0.764814  0.129291  0.324729  -0.911315  -0.650372
    -0.238514  0.255587  0.503003  0.14941  -0.440994  -0.641031  -0.156795  -0.488257
    0.519841  0.786128  0.608295  -0.757995  0.574422  -0.969793  -0.72961  0.401588
    -0.355422  0.654213  0.376846  0.280553  0.201214  0.826118  0.66434  -0.941186
    """),
    "stds": _table("""
    0.395725  0.240757  0.20274  0.363438  0.37732  0.336384  0.321555  0.122896
    0.197441  0.347387  0.399554  0.198599  0.333056  0.151644  0.329361  0.219837
    0.141671  0.169238  0.278956  0.252288  0.312455  0.21755  0.286977  0.225164
    0.335093  0.12183  0.284899  0.284519  0.136288  0.334104  0.297668  0.386049
    0.172401  0.238987  0.362191  0.384393  0.311873  0.218779  0.328288  0.247203
    0.269685  0.30964  0.380409  0.122478  0.315957  0.376079  0.224813  0.186314
    0.279533  0.128409  0.345385  0.25667  0.305806  0.338297  0.12549  0.173114
    0.236946  0.290762  0.222638  0.197896  0.12706  0.23967  0.383089  0.128396
    0.288007  0.177135  0.392074  0.345878  0.180455  0.391937  0.207126  0.313352
    0.193285  0.201796  0.13787  0.202304  0.234865  0.127595  0.123286  0.122914
    """),
    "classes": [0, 1, 0, 1, 0],
}

MIXTURES = {  # name -> (mixture, what a table calls it)
    "gmm2a": lambda: GaussianMixture(**GMM2A),
    "gmm16a": lambda: GaussianMixture(**GMM16A),
    "gmm16s": lambda: random_mixture(16, 5, seed=7, anisotropic=True),
}


@dataclass
class Problem:
    """A mixture, a guidance scale and a batch of initial noises.

    Has what `compare.py` asks of a problem: name, schedule, z, model, exact.

    Guidance 1 is the unconditional model, as in published comparisons; otherwise sample b has class b mod 2.
    """

    name: str
    mixture: GaussianMixture
    guidance: float = 1.0
    seed: int = 0
    batch: int = 64
    schedule: Schedule = STABLE_DIFFUSION
    prediction: str = "epsilon"

    @cached_property
    def z(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(self.batch, *self.mixture.shape, generator=generator, dtype=torch.float64)
        return noise * self.schedule.init_scale

    @property
    def classes(self) -> torch.Tensor | None:
        return None if self.guidance == 1.0 else torch.arange(self.batch) % 2

    def model(self, x: torch.Tensor, label) -> torch.Tensor:
        """The exact noise prediction at the label that the network gets."""
        t = self.schedule.t_of_model_time(float(label))
        alpha, sigma = float(self.schedule.alpha(t)), float(self.schedule.sigma(t))
        return self.mixture.guided(x, alpha, sigma, self.classes, self.guidance)[1].to(x.dtype)

    @cached_property
    def exact(self) -> dict[str, torch.Tensor]:
        """The probability-flow solution at both places where solvers end: label 0 ('t_end') and sigma = 0 ('zero')."""
        options = {"classes": self.classes, "scale": self.guidance}
        low = self.mixture.exact(self.schedule, self.z, **options)
        zero = self.mixture.exact(self.schedule, low, t_start=self.schedule.t_min, t_end=0.0, **options)
        return {"t_end": low, "zero": zero}


def six_problems(seed: int = 0, batch: int = 64, others: bool = False) -> list[Problem]:
    """Three mixtures, without guidance and with guidance 7.5. `others`: three of the same kinds drawn from the seed."""
    mixtures = {name: make() for name, make in MIXTURES.items()}
    if others:
        shapes = {"d=2": (2, 3), "d=16": (16, 5), "d=16 anisotropic": (16, 5)}
        mixtures = {n: random_mixture(*s, 1000 * seed + i, i == 2) for i, (n, s) in enumerate(shapes.items())}
    return [
        Problem(f"{name} g={guidance:g}", mixture, guidance, seed, batch)
        for guidance in (1.0, 7.5)
        for name, mixture in mixtures.items()
    ]
