"""GRPO-Guard: Flow-GRPO whose ratios have mean log 0 and gradients of one size at every step."""

from . import Preset

PRESET = Preset(
    title="GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping",
    paper="Wang et al. 2025, arXiv 2510.22319",
    settings={
        "beta": 2.0,
        "source": "trajectory",
        "link": "normalised_ratio",
        "link_options": {"clip": 2e-6},
        "kl": 0.04,
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
    equation="-min(A rho~, A clip(rho~, 1 - e, 1 + e)) / b, log rho~ = s (log rho + KL(policy || old)); as flow_grpo",
    published={"SD3.5-M": "clip 2e-6 or so, as the ratios are smaller (not verified); else as flow_grpo"},
    results="less over-optimisation of the proxy score than Flow-GRPO and DanceGRPO (abstract)",
    notes=(
        "Set rollout.scorers. s is the standard deviation of the step and b the factor of the network's output in its "
        "mean. The code divides by dt in place of b, which differs by a constant in its SDE. beta must stay 2."
    ),
)
