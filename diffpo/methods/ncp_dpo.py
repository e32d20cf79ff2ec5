"""NCP-DPO: errors of features of the base UNet's encoder, not of latents."""

from . import Preset

PRESET = Preset(
    title="Aligning Text-to-Image Diffusion Models with Noise-Conditioned Perception",
    paper="Gambashidze et al. 2024, arXiv 2406.17636",
    settings={"beta": 5000, "error": "perceptual"},
    equation=(
        "-log sigma(u), err = mean ||phi(x_t' from pred, t') - phi(x_t' from y, t')||^2, phi = last down block of the "
        "frozen UNet"
    ),
    published={
        "SDXL": (
            "beta 5000 (2500 without the 1/2 in the code), lr 1e-8 x 512 pairs, LoRA rank 64, 2,000 steps, warm-up "
            "200, 8-bit Adam; 12 GPU-hours on a Pick-a-Pic cleaned to a tenth"
        ),
        "SD1.5": (
            "with the middle block, beta 5000, lr 1e-8 x 512 pairs, LoRA rank 64, 1,500 steps, warm-up 250; 3.5 "
            "GPU-hours on the same"
        ),
    },
    results=(
        "SDXL: preferred over the DPO baseline in 64.6 % of PartiPrompts (abstract of v2; v1: 60.8 % over the released "
        "SDXL-DPO)"
    ),
    notes=(
        "Settings of the authors' public code. For SD1.5 set objective.features=middle, as its launchers do. The error "
        "is that of features, on another scale, so look at rewards/margins before you set another beta. DPO, CPO and "
        "fine-tuning all work with error=perceptual. It costs a float32 copy of the encoder, and a pass of it with "
        "gradient for each branch."
    ),
)
