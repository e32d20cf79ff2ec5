"""Exponential-integrator weights, the arithmetic shared by the solvers that work in lambda.

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
    """phi_0 = e^z, phi_{j+1} = (phi_j - 1/j!) / z. A series near 0, where the recursion cancels."""
    if abs(z) < 1.0:
        return sum(z**i / math.factorial(i + j) for i in range(20))
    value = math.exp(z)
    for i in range(j):
        value = (value - 1.0 / math.factorial(i)) / z
    return value


class ExpStep:
    """One step s -> t between two nodes: `carry` x_s + `scale` * (phi_1 m + phi_2 h m' + phi_3 h^2 m'' + ...).

    Attributes:
        carry: coefficient of x_s.
        first: scale * phi_1, finite also where h is infinite (from alpha = 0, or to sigma = 0 with data prediction).
        h: lambda_t - lambda_s.
    """

    def __init__(self, nodes: Nodes, s: int, t: int, target: str):
        a_s, a_t, s_s, s_t = nodes.alpha[s], nodes.alpha[t], nodes.sigma[s], nodes.sigma[t]
        self.h = float(nodes.lam[t] - nodes.lam[s]) if nodes.t[t] != nodes.t[s] else 0.0
        if target == "sample":
            self.sign, self.size, self.carry = 1.0, a_t, s_t / s_s
            self.first = a_t * -math.expm1(-self.h)
        else:
            if a_s == 0.0:
                raise ValueError("noise prediction is undefined at alpha = 0: use target='sample' or a smaller t_start")
            self.sign, self.size, self.carry = -1.0, s_t, a_t / a_s
            # sigma_t (e^h - 1) in the form that stays finite at sigma_t = 0
            self.first = -s_t * math.expm1(self.h) if np.isfinite(self.h) else s_t - a_t * s_s / a_s

    def weight(self, j: int) -> float:
        """scale * phi_j, the weight of h^(j-1) times the (j-1)-th derivative of the network's quantity."""
        return self.first if j == 1 else self.sign * self.size * self.h * phi(j, -self.sign * self.h)
