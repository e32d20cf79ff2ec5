"""D3PO: two sampled trajectories from one prompt and one start noise; every step of the better one is reinforced."""

from . import Preset

PRESET = Preset(
    title="Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model",
    paper="Yang et al. 2023, arXiv 2311.13231",
    settings={"beta": 0.2, "source": "trajectory", "clip": 0.1},
    equation=(
        "-log sigma(u) at each step of both trajectories; r = b log clip(p(x_next | x_t) / p_ref(x_next | x_t), 0.9, "
        "1.1), whose log ratio is k (err_ref - err), y* = (x_next - a x_t)/c, k = c^2/(2 s^2) with x_next = a x_t + c "
        "pred + s z"
    ),
    published={
        "SD1.5": (
            "b 0.1, clip 0.1, 20 DDIM steps, eta 1, guidance 5 within the policy, two trajectories from one x_T, lr "
            "3e-5, LoRA rank 4, fp16, 400 rounds of 20 prompts per GPU, one update per pair (20 steps accumulated)"
        ),
        "SD1.5, human feedback": "7 images per prompt from one x_T, their 21 pairs",
    },
    results=(
        "comparable to methods that use the ground-truth reward; fewer distorted images and safer ones from human "
        "labels (abstract); SD1.5 only"
    ),
    notes=(
        "Published b = 0.1 multiplies log-ratios (means over the dimensions) and has no 1/2: beta = 2 b = 0.2. With "
        "that, |u| <= 0.02, where the link is almost linear: D3PO is a clipped linear policy gradient. The 19 steps "
        "with noise weigh 0.19 to 0.67. The released code also trains the steps to the lowest level, of which one (t = "
        "51 to 1) weighs 14.7 and is clipped first; rollout.end=lowest is that, with 28.7 here. Set rollout.scorers, "
        "or rollout.labels for human preferences. With several scorers an image wins by Pareto dominance, and pairs "
        "without dominance are left out. In the released code a resumed run takes its resumed weights as the "
        "reference; here the reference stays the base model. With rollout.window=1 a label is of one step and not of a "
        "whole trajectory (docs/on_policy.md)."
    ),
)
