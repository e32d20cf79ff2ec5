"""Gaussian mixtures, whose score has a closed form: the exact solutions that solvers are tested against."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ._needs import needs
from .prediction import PREDICTIONS
from .schedule import Schedule


class GaussianMixture:
    """Data x_0 ~ sum_k w_k N(mu_k, diag(std_k^2)), with a class per component for guidance.

    Under `x = alpha x_0 + sigma eps` the marginal is again a mixture with variances v_k = alpha^2 std_k^2 + sigma^2,
    so posterior means are exact. All numbers are float64.

    Args:
        weights: (K,). means, stds: (K, *shape). classes: (K,) integers, needed for class-conditional predictions.
    """

    def __init__(self, weights, means, stds, classes=None):
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.stds = torch.as_tensor(stds, dtype=torch.float64)
        self.classes = None if classes is None else torch.as_tensor(classes)
        if not len(self.weights) == len(self.means) == len(self.stds) or self.means.shape != self.stds.shape:
            raise ValueError("weights, means and stds must agree on the number of components and the shape")
        self.shape = tuple(self.means.shape[1:])
        self._mu, self._variances = self.means.flatten(1), self.stds.flatten(1) ** 2  # (K, D)
        self._log_weights = self.weights.log()

    def posterior(self, x, alpha: float, sigma: float, classes=None) -> tuple[torch.Tensor, torch.Tensor]:
        """E[x_0 | x] and E[eps | x] for x (batch, *shape); `classes` (batch,) keeps only that class's components."""
        log_r, scaled = self._components(x, alpha, sigma)
        return self._means(x, alpha, sigma, self._of(log_r, classes), scaled)

    def guided(self, x, alpha: float, sigma: float, classes=None, scale: float = 1.0):
        """As `posterior`, with classifier-free guidance of strength `scale`."""
        log_r, scaled = self._components(x, alpha, sigma)
        x0, eps = self._means(x, alpha, sigma, self._of(log_r, classes), scaled)
        if classes is None or scale == 1.0:
            return x0, eps
        x0_u, eps_u = self._means(x, alpha, sigma, log_r, scaled)
        return x0_u + scale * (x0 - x0_u), eps_u + scale * (eps - eps_u)

    def _components(self, x, alpha: float, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
        """log of the joint density of x and each component, up to a constant, (batch, K); (x - alpha mu) / v,
        (batch, K, D)."""
        v = alpha**2 * self._variances + sigma**2
        gap = torch.sub(x.double().reshape(len(x), 1, -1), self._mu, alpha=alpha)
        scaled = gap / v
        return torch.sub(self._log_weights, (gap * scaled + v.log()).sum(-1), alpha=0.5), scaled

    def _of(self, log_r: torch.Tensor, classes) -> torch.Tensor:
        if classes is None:
            return log_r
        if self.classes is None:
            raise ValueError("this mixture has no classes")
        own = torch.as_tensor(classes).reshape(-1, 1) == self.classes
        return log_r.masked_fill(~own, -torch.inf)

    def _means(self, x, alpha: float, sigma: float, log_r: torch.Tensor, scaled: torch.Tensor):
        """Over the components: E[x_0 | x, k] = mu + alpha std^2 (x - alpha mu) / v, E[eps | x, k] = sigma (...) / v."""
        r = log_r.softmax(1)
        parts = r.unsqueeze(-1) * scaled
        x0 = torch.add(r @ self._mu, (parts * self._variances).sum(1), alpha=alpha)
        return x0.view(x.shape), (sigma * parts.sum(1)).view(x.shape)

    def model(
        self, schedule: Schedule, prediction: str = "epsilon", classes=None, scale: float = 1.0
    ) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The ideal network `model(x, label)` for this data, of any prediction type, in x's dtype."""

        def model(x, label):
            t = schedule.t_of_model_time(float(label))
            alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
            x0, eps = self.guided(x, alpha, sigma, classes, scale)
            p, q = PREDICTIONS[prediction](alpha, sigma)
            return (p * x0 + q * eps).to(x.dtype)

        return model

    def exact(
        self,
        schedule: Schedule,
        x: torch.Tensor,
        t_start: float | None = None,
        t_end: float | None = None,
        classes=None,
        scale: float = 1.0,
    ) -> torch.Tensor:
        """The exact solution of the probability-flow ODE from `t_start` to `t_end`; t_end = 0 is sigma = 0, the
        clean image.

        It shares no code with the solvers: DOP853 with rtol 1e-12. With kappa = sigma / alpha, it integrates
        d(x/alpha)/dkappa = eps below kappa = 1 and d(x/sigma)/d(1/kappa) = x_0 above, so either end may be infinite.
        """
        t_start = schedule.t_max if t_start is None else t_start
        t_end = schedule.t_min if t_end is None else t_end
        a, s = float(schedule.alpha(t_start)), float(schedule.sigma(t_start))
        a_end, s_end = (1.0, 0.0) if t_end == 0 else (float(schedule.alpha(t_end)), float(schedule.sigma(t_end)))
        noisy = lambda alpha, sigma: sigma > alpha  # noqa: E731
        stops = [(a, s)] + ([(1.0, 1.0)] if noisy(a, s) != noisy(a_end, s_end) else []) + [(a_end, s_end)]
        z, (a, s) = x.double(), stops[0]
        for a_to, s_to in stops[1:]:
            if noisy(a, s) or (a == s and noisy(a_to, s_to)):  # w = x / sigma against alpha / sigma
                w = self._flow(z / s, a / s, a_to / s_to, lambda w, rho: self.guided(w, rho, 1.0, classes, scale)[0])
                z = w * s_to
            else:  # y = x / alpha against sigma / alpha
                y = self._flow(z / a, s / a, s_to / a_to, lambda y, kap: self.guided(y, 1.0, kap, classes, scale)[1])
                z = y * a_to
            a, s = a_to, s_to
        return z

    @staticmethod
    def _flow(z: torch.Tensor, start: float, end: float, slope) -> torch.Tensor:
        solve_ivp = needs("scipy.integrate", "the exact solution").solve_ivp

        def f(u, flat):
            return slope(torch.from_numpy(flat).view(z.shape), float(u)).numpy().ravel()

        solution = solve_ivp(f, (start, end), z.numpy().ravel(), method="DOP853", rtol=1e-12, atol=1e-13)
        if not solution.success:
            raise RuntimeError(f"exact solution failed: {solution.message}")
        return torch.from_numpy(np.ascontiguousarray(solution.y[:, -1])).view(z.shape)
