"""Flow-DPPO: a policy gradient that leaves out samples beyond a trust region in exact KL divergence."""

from . import Preset

PRESET = Preset(
    title="Flow-DPPO: Divergence Proximal Policy Optimization for Flow Matching Models",
    paper="Ping et al. 2026, arXiv 2606.11025",
    settings={
        "beta": 2.0,
        "source": "trajectory",
        "link": "trust_region",
        "kl": 1e-3,
        "rollout": {
            "samples": 24,
            "steps": 10,
            "step": "flow_sde",
            "step_options": {"amount": 0.7},
            "guidance": 4.5,
            "same_noise": False,
            "updates": 2,
        },
        "behaviour": {"policy": "sync"},
    },
    equation="-A rho + w KL(policy || base), without gradient where KL(policy || old) > limit and A log rho > 0",
    published={"SD3.5-M": "limit 1e-6, KL weight 1e-3, guidance 4.5 (Flow-Factory's examples)"},
    notes=(
        "Set rollout.scorers. The trust region is a KL divergence of the step's Gaussians, a mean over the dimensions. "
        "A penalty instead of a bound is objective.behaviour.kl, with any link."
    ),
)
