"""DPM-OT (Li et al. 2023, arXiv 2307.11308): optimal transport from noise to latents at an intermediate noise level.

Semi-discrete transport sends the standard normal distribution to n stored latents y_j, each with mass 1/n, at the least
mean squared distance. The optimal map is constant on n convex cells, the Laguerre cells

    cell(z) = argmax_j  <z, y_j> + h_j

and the heights h are where the concave dual `E_z min_j (|z - y_j|^2 / 2 - psi_j) + mean(psi)`, psi_j = h_j + |y_j|^2/2,
is largest: its gradient is 1/n minus the mass of the cell. A short plan goes on from the latent at its level.

The authors run annealed Langevin steps from there; here it is any solver of the package. A start is one of n stored
states, so at most n pictures per prompt can come out.
On assets/tiny-sdxl it does not help (samplers/README.md, "Plans fitted to a model").
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import _arrays
from ..forward import add_noise
from ..grid import Grid
from ..plan import Plan
from ..sample import build_plan
from ..schedule import Schedule

LAYOUT = _arrays.Layout("transport", "samplers_transport", {"points": "F32", "heights": "F64"}, most_bytes=2**32)
_CHUNK = 1024  # noises per matrix product


@dataclass(frozen=True, eq=False)
class Transport:
    """The map from noise to stored latents of one noise level.

    Attributes:
        points: (n, *shape) float32, states at the level. heights: (n,) float64, the h_j above.
        t: the time of the level, to give to `build_plan` as t_start.
    """

    points: torch.Tensor
    heights: torch.Tensor
    t: float

    def __post_init__(self) -> None:
        n = len(self.points) if self.points.ndim > 1 else 0
        if n < 2 or self.heights.shape != (n,) or not (self.points.isfinite().all() and self.heights.isfinite().all()):
            raise ValueError(
                f"a transport needs at least two finite latents (n, *shape) and one height for each; got shapes "
                f"{tuple(self.points.shape)} and {tuple(self.heights.shape)}"
            )

    def cell(self, noise: torch.Tensor) -> torch.Tensor:
        """Which latent each noise goes to: (batch,) indices. noise: (batch, *shape) standard normal."""
        if noise.shape[1:] != self.points.shape[1:]:
            raise ValueError(f"noise of shape {tuple(noise.shape[1:])} for latents of {tuple(self.points.shape[1:])}")
        points = self.points.flatten(1)
        heights = self.heights.to(points.dtype)
        chunks = [torch.addmm(heights, z.to(points), points.T).argmax(1) for z in noise.flatten(1).split(_CHUNK)]
        return torch.cat(chunks)

    def __call__(self, noise: torch.Tensor) -> torch.Tensor:
        """The states to start from: (batch, *shape), in the noise's dtype and on its device."""
        return self.points[self.cell(noise)].to(noise)

    def mass_error(self, noise: torch.Tensor) -> float:
        """Half the sum of |mass of a cell - 1/n|, estimated on fresh noise: 0 is exact, 1 the worst.

        An estimate on N noises is at least about sqrt(n / (2 pi N)) even for exact heights.
        """
        masses = torch.bincount(self.cell(noise), minlength=len(self.points)).double() / len(noise)
        return 0.5 * float((masses - 1 / len(masses)).abs().sum())

    def plan(self, schedule: Schedule, solver: str | None, calls: int, **options) -> Plan:
        """A plan from the level on; the options are `build_plan`'s."""
        return build_plan(schedule, solver, calls, Grid(schedule, t_start=self.t), **options)

    def save(self, path) -> None:
        """Write one safetensors file; a file that is there is replaced once the new one is complete."""
        arrays = {"points": self.points.float().cpu().numpy(), "heights": self.heights.double().cpu().numpy()}
        _arrays.write(path, LAYOUT, arrays, json.dumps({"version": 1, "t": self.t}))

    @classmethod
    def load(cls, path) -> Transport:
        """Read a file written by `save`.

        Raises:
            ValueError: the file is missing, is something else, or its latents and heights do not fit.
        """
        try:
            about, arrays = _arrays.read(path, LAYOUT)
            if set(about) != {"version", "t"} or about["version"] != 1 or not isinstance(about["t"], float):
                raise ValueError("the header of a transport must have version 1 and the time t, nothing else")
            if not math.isfinite(about["t"]):
                raise ValueError(f"its time t is {about['t']}, not a finite number")
            return cls(torch.from_numpy(arrays["points"]), torch.from_numpy(arrays["heights"]), about["t"])
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r}: {str(error)[:500]}") from None


def latents_at(clean: torch.Tensor, schedule: Schedule, t: float, generator: torch.Generator) -> torch.Tensor:
    """Clean latents (n, *shape) with noise added to the level of time t: exact draws of that level's distribution."""
    eps = torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
    return add_noise(clean, eps, float(schedule.alpha(t)), float(schedule.sigma(t)))


def fit_transport(
    points: torch.Tensor,
    t: float,
    generator: torch.Generator,
    iterations: int = 2000,
    batch: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> Transport:
    """Fit the heights of the cells by stochastic ascent on the dual (Genevay et al. 2016, arXiv 1605.08527).

    Adam with a step that falls to zero along a cosine; the heights are the mean over the second half. A step is one
    matrix product of (batch, d) with (d, n).

    Args:
        points: (n, *shape), states at the level; `latents_at` makes them from clean latents.
        t: the time of the level.
        batch: noises per iteration. progress: called as progress(done, iterations).

    Raises:
        ValueError: fewer than two latents, or numbers that are not finite.
    """
    points = points.float()
    flat = points.flatten(1)
    heights = torch.zeros(len(points), dtype=torch.float64)
    Transport(points, heights, t)  # checks them
    spread = float((flat - flat.mean(0)).norm(dim=1).mean())  # <z, y_j> varies by about this much
    mean, tail = torch.zeros_like(heights), 0
    first, second = torch.zeros_like(heights), torch.zeros_like(heights)
    for i in range(iterations):
        z = torch.randn(batch, flat.shape[1], generator=generator)
        hit = torch.addmm(heights.float(), z, flat.T).argmax(1)
        gradient = 1 / len(points) - torch.bincount(hit, minlength=len(points)).double() / batch
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient**2
        step = 0.05 * spread * (1 + torch.cos(torch.tensor(torch.pi * i / iterations)).item()) / 2
        unbiased = (second / (1 - 0.99 ** (i + 1))).sqrt() + 1e-2 / len(points)
        heights = heights + step * (first / (1 - 0.9 ** (i + 1))) / unbiased
        if i >= iterations // 2:
            mean, tail = mean + heights, tail + 1
        if progress is not None:
            progress(i + 1, iterations)
    heights = mean / max(tail, 1)
    return Transport(points, heights - heights.mean(), t)
