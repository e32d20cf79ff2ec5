"""SPO: at each step several next states from one state; a step-aware preference model picks best and worst."""

from . import Preset

PRESET = Preset(
    title="Aesthetic Post-Training Diffusion Models from Generic Preferences with Step-by-step Preference Optimization",
    paper="Liang et al. 2024, arXiv 2406.04314 (v1: Step-aware Preference Optimization)",
    settings={"beta": 20, "source": "pool", "clip": 0.1},
    equation=(
        "-log sigma(u) of best and worst of k states x_next drawn from one x_t, r as in D3PO; kept if p(best) - "
        "p(worst) > 0.3 by softmax of the step-aware scores; goes on from a random member"
    ),
    published={
        "SD1.5": (
            "b 10, clip 0.1, 20 DDIM steps, eta 1, guidance 5, pool 4 from step 4, threshold 0.3, lr 6e-5, 10 pairs x "
            "4 GPUs, weight decay 1e-4, LoRA rank 4, 10 epochs of 4,000 prompts"
        ),
        "SDXL": (
            "b 10, pool 2 rolled on by 3 inner steps, threshold 0.4, lr 1e-5, 2 pairs x 2 accumulated x 4 GPUs, LoRA "
            "rank 64, 10 epochs of 4,000 prompts"
        ),
        "step-aware scorer": (
            "PickScore v1 with time-conditioned image tower, Pick-a-Pic v1, lr 3e-6 (SD1.5), 1e-6 (SDXL), weight decay "
            "0.3, 8,000 and 7,000 steps"
        ),
    },
    results=(
        "more than 20 times faster than Diffusion-DPO (model card); SDXL: PickScore 23.06, HPSv2 31.80, ImageReward "
        "1.08, aesthetic 6.36 (not verified)"
    ),
    notes=(
        "Published b = 10 multiplies log-ratios without 1/2: beta = 20, |u| <= 2. Set rollout.step_scorer. SDXL's "
        "inner steps are rollout.inner=3. The released code configures gradient "
        "clipping at 1 but clips nothing (its parameter iterator is exhausted)."
    ),
)
