"""Exponential-integrator weights, for the solvers that work in lambda.

For a step s -> t with h = lambda_t - lambda_s the probability-flow ODE has the exact solution (variation of constants)

    data:   x_t = (sigma_t / sigma_s) x_s + alpha_t  int_0^1 h e^{(u-1) h} x_0(lambda_s + u h) du      DPM-Solver++
    (2211.01095), eq. 8
    noise:  x_t = (alpha_t / alpha_s) x_s - sigma_t  int_0^1 h e^{(1-u) h} eps(lambda_s + u h) du      DPM-Solver
    (2206.00927), eq. 3.4

so a Taylor expansion of the network's quantity gives the functions phi_j below.
"""

from __future__ import annotations

import math

import numpy as np

from ..grid import Nodes


def phi(j: int, z: float) -> float:
    """phi_0 = e^z, phi_{j+1} = (phi_j - 1/j!) / z. Near 0, where that loses digits, a series."""
    if abs(z) < 1.0:
        return sum(z**i / math.factorial(i + j) for i in range(20))
    value = math.exp(z)
    for i in range(j):
        value = (value - 1.0 / math.factorial(i)) / z
    return value


class ExpStep:
    """One step s -> t between two nodes: `carry` x_s + sum_j `weight(j)` h^(j-1) m^(j-1)(lambda_s) + `noise` z.

    With `eta` = tau^2 it is the step of the SDE that has the same marginals and tau^2 times the reverse SDE's noise
    (SA-Solver, arXiv 2309.05019, eq. 9-10; eta = 1 is SDE-DPM-Solver++): every exponent of m grows by 1 + eta.

    Attributes:
        carry: coefficient of x_s. noise: standard deviation of what is added (0 for eta = 0).
        first: weight(1), finite also where h is infinite (from alpha = 0, or to sigma = 0 with data prediction).
        h: lambda_t - lambda_s.
    """

    def __init__(self, nodes: Nodes, s: int, t: int, target: str, eta: float = 0.0):
        a_s, a_t, s_s, s_t = nodes.alpha[s], nodes.alpha[t], nodes.sigma[s], nodes.sigma[t]
        self.lam, self.lam_s = nodes.lam, float(nodes.lam[s])
        h = self.h = float(nodes.lam[t] - nodes.lam[s]) if nodes.t[t] != nodes.t[s] else 0.0
        if eta and h < 0:
            raise ValueError("a stochastic solver needs a grid that runs from noise to data")
        stretch = 1.0 + eta
        if target == "sample":
            self._z, self.scale = -stretch, a_t * stretch
            self.carry = s_t / s_s * (math.exp(-eta * h) if eta else 1.0)
            self.first = a_t * -math.expm1(-stretch * h)
            self.noise = s_t * math.sqrt(-math.expm1(-2.0 * eta * h)) if eta else 0.0
        else:
            if a_s == 0.0:
                raise ValueError("noise prediction is undefined at alpha = 0: use target='sample' or a smaller t_start")
            self._z, self.scale = 1.0, -stretch * s_t
            self.carry = a_t / a_s
            # sigma_t (e^h - 1) in the form that stays finite at sigma_t = 0
            self.first = stretch * (-s_t * math.expm1(h) if np.isfinite(h) else s_t - a_t * s_s / a_s)
            self.noise = math.sqrt(eta * max(0.0, (a_t * s_s / a_s) ** 2 - s_t**2)) if eta else 0.0

    @property
    def finite(self) -> bool:
        """Whether h is finite and not 0. If not, derivatives in lambda have no meaning and the order is 1."""
        return bool(np.isfinite(self.h)) and self.h != 0.0

    def weight(self, j: int) -> float:
        """The weight of h^(j-1) times the (j-1)-th derivative of the network's quantity at s."""
        return self.first if j == 1 else self.scale * self.h * phi(j, self._z * self.h)

    def weights(self, *at: int) -> np.ndarray:
        """One weight per node index in `at`: the step integrates the polynomial in lambda through their values."""
        return through((self.lam[list(at)] - self.lam_s) / self.h, [self.weight(j + 1) for j in range(len(at))])


def through(offsets, moments) -> np.ndarray:
    """The weights of values at `offsets` (in units of the step) that are exact for every polynomial of degree < n.

    offsets: (n,) distinct. moments: (n,), entry k is the weight of the k-th derivative: the result of u^k is k! times
    it.
    """
    powers = np.vander(np.asarray(offsets, np.float64), increasing=True).T
    return np.linalg.solve(powers, [math.factorial(k) * moment for k, moment in enumerate(moments)])


def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b, the shorter one filled up with zeros."""
    total = np.zeros(max(len(a), len(b)))
    total[: len(a)] += a
    total[: len(b)] += b
    return total
