"""NVlabs/edm generate.py: edm_sampler and ablation_sampler."""

import numpy as np

from samplers import Grid, Schedule, build_plan

CHURN = {"S_churn": "s_churn", "S_min": "s_tmin", "S_max": "s_tmax", "S_noise": "s_noise"}


def run(setting, options):
    ablation = options.pop("fn", "edm_sampler") == "ablation_sampler"
    space = "time" if ablation else "kappa"
    schedule, levels = _ablation(setting, options) if ablation else (setting.schedule, None)
    if levels is None:
        low, high = options.pop("sigma_min", setting.t_end), options.pop("sigma_max", setting.t_start)
        levels = _karras(low, high, options.pop("rho", 7), setting.steps)
    setting.schedule = schedule
    solver, alpha = options.pop("solver", "heun"), options.pop("alpha", 1)
    settings = {ours: options.pop(name) for name, ours in CHURN.items() if name in options}
    if solver == "heun":
        settings["alpha"] = alpha
    grid = Grid(schedule, sigmas=[*levels, 0.0])
    plan = build_plan(schedule, solver, grid=grid, space=space, **settings)
    stages = {"euler": 1, "heun": 2}[solver]
    # the noise of step i follows the last call of step i - 1; the official code draws in every step
    return setting.run(plan, setting.z * grid.nodes(setting.steps).sigma[0], draw=lambda k: (k + 1) // stages)


def _karras(low, high, rho, n):
    return np.linspace(high ** (1 / rho), low ** (1 / rho), n) ** rho


class _Paper(Schedule):
    """EDM's form of any schedule: noise level kappa(t) = sigma / alpha, and a scaling s(t) = alpha."""

    def __init__(self, kappa, rate, inverse, scaled):
        self.kappa, self.rate, self.t_of_noise_level, self.scaled = kappa, rate, inverse, scaled
        self.t_min, self.t_max, self.t_limits = inverse(0.002), inverse(80.0), (0.0, inverse(1e4))

    def log_alpha(self, t):
        return -0.5 * self.scaled * np.log1p(self.kappa(t) ** 2)

    def sigma(self, t):
        return self.kappa(t) * self.alpha(t)

    def lam(self, t):
        return -np.log(self.kappa(t))

    def t_of_lambda(self, lam):
        return self.t_of_noise_level(np.exp(-lam))

    def rates(self, t):
        kappa, rate, alpha = self.kappa(t), self.rate(t), self.alpha(t)
        d_alpha = -self.scaled * kappa * rate * alpha**3
        return d_alpha, rate * alpha + kappa * d_alpha


def _vp(beta_d, beta_min):
    def kappa(t):
        return np.sqrt(np.expm1(0.5 * beta_d * t**2 + beta_min * t))

    def rate(t):
        return 0.5 * (beta_min + beta_d * t) * (kappa(t) + 1 / kappa(t))

    def inverse(level):
        return (np.sqrt(beta_min**2 + 2 * beta_d * np.log1p(level**2)) - beta_min) / beta_d

    return kappa, rate, inverse


def _iddpm(low, high, n, steps, c_1, c_2):
    alpha_bar = np.sin(0.5 * np.pi * np.arange(n + 1) / n / (c_2 + 1)) ** 2
    u = np.zeros(n + 1)
    for j in range(n, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / max(alpha_bar[j - 1] / alpha_bar[j], c_1) - 1)
    u = u[(u >= low) & (u <= high)]
    return u[((len(u) - 1) / (steps - 1) * np.arange(steps)).round().astype(int)]


def _ablation(setting, options):
    """The schedule and the noise levels of ablation_sampler; EDM, arXiv 2206.00364, table 1."""
    n, kind, eps = setting.steps, options.pop("discretization", "edm"), options.pop("epsilon_s", 1e-3)
    c_1, c_2, m = options.pop("C_1", 0.001), options.pop("C_2", 0.008), options.pop("M", 1000)
    rho, default = options.pop("rho", 7), _vp(19.9, 0.1)[0]
    ranges = {"vp": (default(1e-3), default(1.0)), "ve": (0.02, 100.0), "iddpm": (0.002, 81.0), "edm": (0.002, 80.0)}
    low, high = (options.pop(k, d) for k, d in zip(("sigma_min", "sigma_max"), ranges[kind], strict=True))
    beta_d = 2 * (np.log1p(low**2) / eps - np.log1p(high**2)) / (eps - 1)
    vp = _vp(beta_d, np.log1p(high**2) - 0.5 * beta_d)
    levels = {
        "vp": lambda: vp[0](np.linspace(1, eps, n)),
        "ve": lambda: np.geomspace(high, low, n),
        "iddpm": lambda: _iddpm(low, high, m, n, c_1, c_2),
        "edm": lambda: _karras(low, high, rho, n),
    }[kind]()
    schedule = {
        "vp": vp,
        "ve": (np.sqrt, lambda t: 0.5 / np.sqrt(t), np.square),
        "linear": (np.asarray, np.ones_like, np.asarray),
    }[options.pop("schedule", "linear")]
    return _Paper(*schedule, scaled={"none": 0.0, "vp": 1.0}[options.pop("scaling", "none")]), levels
