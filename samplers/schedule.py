"""Noise schedules: `x_t = alpha_t x_0 + sigma_t eps`, in float64 numpy.

A schedule has alpha, sigma, `lambda = log(alpha / sigma)` and its inverse, and the network's time input at time t
(`model_time`, also called label). Where a solver places its calls is in grid.py, what the network returns in
prediction.py.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ._names import unknown

Array = np.ndarray


class Schedule:
    """Base class: subclasses define `log_alpha`, `sigma`, `t_of_lambda` and, if the network's time input is not t
    itself, `model_time` and `t_of_model_time`.

    All methods take and return float64 arrays (scalars are accepted); `t` runs from `t_min` (clean) to `t_max` (noise).
    The noise level and the label both grow with t. For a level outside the schedule, the inverse functions return a
    time outside it, inf or NaN, never a time inside.
    """

    t_min: float  # where sampling ends and starts by default
    t_max: float
    t_limits: tuple[float, float] = (0.0, 1.0)  # where the network is defined
    init_scale: float = 1.0  # standard deviation of x at t_max when x_0 is negligible
    default_grid = "logsnr"  # used if the caller names none
    corners: Array = np.empty(0)  # times where the derivatives jump; integrals over time stop there

    def log_alpha(self, t: ArrayLike) -> Array:
        raise NotImplementedError

    def sigma(self, t: ArrayLike) -> Array:
        raise NotImplementedError

    def t_of_lambda(self, lam: ArrayLike) -> Array:
        """The time at half log-SNR `lam` (inverse of `lam`)."""
        raise NotImplementedError

    def alpha(self, t: ArrayLike) -> Array:
        return np.exp(self.log_alpha(t))

    def lam(self, t: ArrayLike) -> Array:
        """Half log-SNR log(alpha_t / sigma_t); -inf where alpha is 0."""
        with np.errstate(divide="ignore"):
            return self.log_alpha(t) - np.log(self.sigma(t))

    def rates(self, t: ArrayLike) -> tuple[Array, Array]:
        """d alpha / dt and d sigma / dt, for solvers that work in t itself."""
        raise NotImplementedError(f"{type(self).__name__} has no `rates`, which this solver needs: define it")

    def model_time(self, t: ArrayLike) -> Array:
        """The network's time input at time t; here t itself."""
        return np.asarray(t, np.float64)

    def t_of_model_time(self, label: ArrayLike) -> Array:
        return np.asarray(label, np.float64)

    def noise_level(self, t: ArrayLike) -> Array:
        """`sigma / alpha`, the number that k-diffusion and diffusers call sigma; inf where alpha is 0."""
        with np.errstate(over="ignore"):
            return np.exp(-self.lam(t))

    def t_of_noise_level(self, level: ArrayLike) -> Array:
        """The time at a noise level (inverse of `noise_level`)."""
        return self.t_of_lambda(-np.log(np.asarray(level, np.float64)))


class _VariancePreserving(Schedule):
    def sigma(self, t: ArrayLike) -> Array:
        return np.sqrt(-np.expm1(2.0 * self.log_alpha(t)))

    def rates(self, t: ArrayLike) -> tuple[Array, Array]:
        alpha, rate = self.alpha(t), self._log_alpha_rate(t)
        return alpha * rate, -(alpha**2) * rate / self.sigma(t)

    def _log_alpha_rate(self, t: ArrayLike) -> Array:
        raise NotImplementedError


class VPLinear(_VariancePreserving):
    """Continuous VP schedule with beta(t) linear in t (Song et al. 2021, arXiv 2011.13456, eq. 33)."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3):
        if not 0 < beta_min < beta_max < np.inf:
            raise ValueError(f"VPLinear needs 0 < beta_min < beta_max, got {beta_min} and {beta_max}")
        self.beta_min, self.beta_max, self.t_min, self.t_max = beta_min, beta_max, t_min, 1.0

    def log_alpha(self, t: ArrayLike) -> Array:
        t = np.asarray(t, np.float64)
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def _log_alpha_rate(self, t: ArrayLike) -> Array:
        return -0.5 * (self.beta_min + np.asarray(t, np.float64) * (self.beta_max - self.beta_min))

    def t_of_lambda(self, lam: ArrayLike) -> Array:
        slope = self.beta_max - self.beta_min
        q = 2.0 * slope * np.logaddexp(0.0, -2.0 * np.asarray(lam, np.float64))  # -4 slope log alpha
        return q / ((np.sqrt(self.beta_min**2 + q) + self.beta_min) * slope)  # the root without cancellation


class VPDiscrete(_VariancePreserving):
    """VP schedule of a network trained on N betas, such as Stable Diffusion, SDXL or DDPM.

    Label n of the network (0..N-1) is time t_n = (n + 1) / N, where log alpha = 0.5 sum_{m<=n} log(1 - beta_m);
    between the t_n log alpha is piecewise linear (DPM-Solver, arXiv 2206.00927, app. D.1), so that solvers can work
    in continuous time.

    Args:
        betas: (N,) numbers in (0, 1), N >= 2.
        interpolation: what is linear between the labels: 'log_alpha', or 'alpha_bar' = alpha^2 (DEIS's code).
    """

    def __init__(self, betas, interpolation: str = "log_alpha"):
        self.betas = _checked_betas(betas)
        if interpolation not in ("log_alpha", "alpha_bar"):
            raise unknown("interpolation", interpolation, ("log_alpha", "alpha_bar"))
        n = len(self.betas)
        self.interpolation = interpolation
        self._t = np.arange(1, n + 1) / n
        self.corners = self._t[1:-1]
        log_alpha = 0.5 * np.cumsum(np.log1p(-self.betas))
        self._levels = log_alpha if interpolation == "log_alpha" else np.exp(2.0 * log_alpha)
        if not (np.diff(self._levels) < 0).all():
            raise ValueError("VPDiscrete needs betas large enough to change alpha from label to label in float64")
        self.t_min, self.t_max = self.t_limits = 1.0 / n, 1.0

    @classmethod
    def scaled_linear(
        cls, beta_start: float = 0.00085, beta_end: float = 0.012, num_train_timesteps: int = 1000
    ) -> VPDiscrete:
        """The schedule of Stable Diffusion 1.x, 2.x and SDXL."""
        return cls(training_betas("scaled_linear", beta_start, beta_end, num_train_timesteps))

    def log_alpha(self, t: ArrayLike) -> Array:
        level = _piecewise_linear(t, self._t, self._levels)
        return level if self.interpolation == "log_alpha" else 0.5 * np.log(level)

    def _log_alpha_rate(self, t: ArrayLike) -> Array:
        i = np.clip(np.searchsorted(self._t, t) - 1, 0, len(self._t) - 2)
        rate = (self._levels[i + 1] - self._levels[i]) / (self._t[i + 1] - self._t[i])
        return rate if self.interpolation == "log_alpha" else 0.5 * rate / self.alpha(t) ** 2

    def t_of_lambda(self, lam: ArrayLike) -> Array:
        log_alpha = -0.5 * np.logaddexp(0.0, -2.0 * np.asarray(lam, np.float64))
        level = log_alpha if self.interpolation == "log_alpha" else np.exp(2.0 * log_alpha)
        return _piecewise_linear(-level, -self._levels, self._t)

    def model_time(self, t: ArrayLike) -> Array:
        n = len(self.betas)
        return (np.asarray(t, np.float64) - 1.0 / n) * n

    def t_of_model_time(self, label: ArrayLike) -> Array:
        return (np.asarray(label, np.float64) + 1.0) / len(self.betas)


class EDM(Schedule):
    """alpha = 1, sigma = t, and the network's time input is sigma (Karras et al. 2022, arXiv 2206.00364)."""

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0):
        if not 0 < sigma_min < sigma_max < np.inf:
            raise ValueError(f"EDM needs 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        self.t_min, self.t_max, self.init_scale = sigma_min, sigma_max, sigma_max
        self.t_limits = (0.0, float("inf"))

    def log_alpha(self, t: ArrayLike) -> Array:
        return np.zeros_like(np.asarray(t, np.float64))

    def sigma(self, t: ArrayLike) -> Array:
        return np.asarray(t, np.float64)

    def rates(self, t: ArrayLike) -> tuple[Array, Array]:
        return np.zeros_like(self.sigma(t)), np.ones_like(self.sigma(t))

    def t_of_lambda(self, lam: ArrayLike) -> Array:
        return np.exp(-np.asarray(lam, np.float64))


class RectifiedFlow(Schedule):
    """alpha = 1 - s, sigma = s with s = shift t / (1 + (shift - 1) t). The network's time input is 1000 s (SD3, arXiv
    2403.03206, eq. 23).

    t is the time before the shift: a grid that is uniform in t is the shifted grid of SD3 and Flux.
    """

    # Uniform in t, and not 'logsnr', because lambda is -inf at t = 1. Not 'time' either, whose last call is at t_min:
    # there the network's x_0 is the state itself, so this call cannot correct the long step in lambda before it.
    default_grid = "sgm_uniform"

    def __init__(self, shift: float = 1.0, num_train_timesteps: int = 1000, t_min: float | None = None):
        if not 1e-6 <= shift <= 1e6:
            raise ValueError(f"RectifiedFlow needs shift > 0 (from 1e-6 to 1e6), got {shift}")
        if not (isinstance(num_train_timesteps, (int, np.integer)) and num_train_timesteps >= 1):
            raise ValueError(f"RectifiedFlow needs at least one training timestep, got {num_train_timesteps!r}")
        self.shift, self.num_train_timesteps = float(shift), num_train_timesteps
        self.t_max = 1.0
        # The default is that of diffusers' FlowMatch schedulers, which shift an already shifted 1/N again.
        self.t_min = float(self.sigma(1.0 / num_train_timesteps)) if t_min is None else t_min

    def sigma(self, t: ArrayLike) -> Array:
        t = np.asarray(t, np.float64)
        return self.shift * t / (self.shift * t + (1.0 - t))

    def alpha(self, t: ArrayLike) -> Array:
        t = np.asarray(t, np.float64)
        return (1.0 - t) / (self.shift * t + (1.0 - t))

    def rates(self, t: ArrayLike) -> tuple[Array, Array]:
        t = np.asarray(t, np.float64)
        d_sigma = self.shift / (self.shift * t + (1.0 - t)) ** 2
        return -d_sigma, d_sigma

    def log_alpha(self, t: ArrayLike) -> Array:
        with np.errstate(divide="ignore"):
            return np.log(self.alpha(t))

    def t_of_lambda(self, lam: ArrayLike) -> Array:
        with np.errstate(over="ignore"):
            return self.t_of_noise_level(1.0 / (1.0 + np.exp(np.asarray(lam, np.float64))))

    def noise_level(self, t: ArrayLike) -> Array:
        """Sigma itself, because sigma / alpha, the noise level of other models, is infinite at the start."""
        return self.sigma(t)

    def t_of_noise_level(self, level: ArrayLike) -> Array:
        level = np.asarray(level, np.float64)
        inside = np.clip(level, 0.0, 1.0)
        t = inside / (self.shift * (1.0 - inside) + inside)
        return np.where(np.abs(level - inside) < 1e-6, t, np.copysign(np.inf, level))  # float32's 1 may be above 1

    def model_time(self, t: ArrayLike) -> Array:
        return self.num_train_timesteps * self.sigma(t)

    def t_of_model_time(self, label: ArrayLike) -> Array:
        return self.t_of_noise_level(np.asarray(label, np.float64) / self.num_train_timesteps)


def training_betas(kind, start: float = 1e-4, end: float = 0.02, n: int = 1000, zero_snr: bool = False) -> Array:
    """The betas that a diffusers config describes.

    Args:
        kind: 'linear', 'scaled_linear', 'squaredcos_cap_v2', or the betas themselves.
        zero_snr: rescale to zero terminal SNR (Lin et al. 2023, arXiv 2305.08891, algorithm 1); as in diffusers the
            last alpha^2 is then 2^-24 instead of 0, or less where the one before is as small (linear betas).
    """
    if isinstance(kind, str) and not (0.0 < start < 1.0 and 0.0 < end < 1.0 and n >= 2):
        raise ValueError(f"betas lie between 0 and 1, and there are at least two: {start=}, {end=}, {n=}")
    if not isinstance(kind, str):
        betas = _checked_betas(kind, last_may_be_one=zero_snr)  # which rescaling then lowers
    elif kind == "linear":
        betas = np.linspace(start, end, n)
    elif kind == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, n) ** 2
    elif kind == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17
        alpha_bar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    else:
        raise unknown("beta_schedule", kind, ("linear", "scaled_linear", "squaredcos_cap_v2"))
    if zero_snr:
        root = np.sqrt(np.cumprod(1.0 - betas))
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        alpha_bar[-1] = min(2.0**-24, alpha_bar[-2] / 2)
        betas = 1.0 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])
    return betas


def _checked_betas(betas, last_may_be_one: bool = False) -> Array:
    try:
        betas = np.asarray(betas, np.float64)
    except (TypeError, ValueError):
        raise ValueError("VPDiscrete needs betas that are numbers") from None
    if betas.ndim != 1 or len(betas) < 2:
        raise ValueError(f"VPDiscrete needs at least two betas in one dimension, got shape {betas.shape}")
    inner = betas[:-1] if last_may_be_one and betas[-1] == 1.0 else betas
    if not ((inner > 0) & (inner < 1)).all():
        raise ValueError(
            "VPDiscrete needs betas strictly between 0 and 1: for zero terminal SNR cap the last one below 1"
        )
    return betas


def _piecewise_linear(x: ArrayLike, xs: Array, ys: Array) -> Array:
    """Interpolation over increasing xs; beyond them the outermost segments continue as straight lines."""
    x = np.asarray(x, np.float64)
    i = np.clip(np.searchsorted(xs, x) - 1, 0, len(xs) - 2)
    return ys[i] + (x - xs[i]) * (ys[i + 1] - ys[i]) / (xs[i + 1] - xs[i])
