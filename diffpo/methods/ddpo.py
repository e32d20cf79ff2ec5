"""DDPO with importance sampling: a clipped policy gradient on the steps of the sampler."""

from . import Preset

PRESET = Preset(
    title="Training Diffusion Models with Reinforcement Learning",
    paper="Black et al. 2023, arXiv 2305.13301",
    settings={
        "beta": 2.0,
        "source": "trajectory",
        "link": "clipped_ratio",
        "link_options": {"clip": 1e-4},
        "rollout": {
            "samples": 4,
            "steps": 50,
            "same_noise": False,
            "updates": 2,
            "advantages": {"limit": 10.0},
        },
        "reference": {"policy": "none"},
        "behaviour": {"policy": "sync"},
    },
    equation=(
        "-min(A rho, A clip(rho, 1 - e, 1 + e)) at each step, rho = p(x_next | x_t) / p_old(x_next | x_t), log rho = k "
        "(err_old - err); A the score standardised over the images of its prompt"
    ),
    published={
        "SD1.4": (
            "clip 1e-4, 50 DDIM steps, eta 1, guidance 5, 256 samples a round, 2 updates a round, lr 3e-4, LoRA, "
            "advantages cut at 10, mean and spread per prompt over a buffer of earlier rounds (not verified)"
        ),
    },
    results="raises compressibility, aesthetic score and prompt alignment by a VLM without labels (abstract)",
    notes=(
        "beta 2 makes (beta/2) k (err_old - err) the log-ratio itself, a mean over the dimensions as in the code. The "
        "sum, the true likelihood ratio, is beta = 2 C h w with a larger clip. Set rollout.scorers. Statistics are "
        "those of one round; the paper's buffer over rounds is left out. link importance is the same without clip."
    ),
)
