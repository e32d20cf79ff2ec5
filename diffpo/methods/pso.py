"""PSO: D3PO for timestep-distilled models, whose steps add new noise to an estimate of the image."""

from . import Preset

PRESET = Preset(
    title="Tuning Timestep-Distilled Diffusion Model Using Pairwise Sample Optimization",
    paper="Miao et al. 2024, arXiv 2410.03190",
    settings={
        "beta": 100,
        "source": "trajectory",
        "clip": 0.1,
        "rollout": {"step": "renoise", "steps": 4, "guidance": 1.0, "same_noise": False, "transitions": 3},
    },
    equation="-log sigma(u) at the first steps x_next ~ N(alpha' x_0(x_t), sigma'^2), r = b log clip(ratio, 0.9, 1.1)",
    published={
        "SDXL-DMD2": (
            "b 50, clip 0.1, 4 steps of which 3 are trained (or 7 of 8), no guidance, pairs from different x_T by "
            "PickScore, lr 1e-5, 2 x 2 pairs per GPU, LoRA rank 16, 8-bit AdamW"
        ),
    },
    notes=(
        "Published b = 50 without 1/2: beta = 100. Set model.path to a distilled model and rollout.scorers "
        "(configs/pso_shapes.yaml with assets/tiny-turbo). Only the online form is here; the offline one is "
        "diffusion_dpo with forward.timesteps at the model's own levels."
    ),
)
