"""DDO: images of the data against the reference's own samples, with the reward as a GAN's discriminator."""

from . import Preset

PRESET = Preset(
    title=(
        "Direct Discriminative Optimization: Your Likelihood-Based Visual Generative Model is Secretly a GAN "
        "Discriminator"
    ),
    paper="Zheng et al. 2025, arXiv 2503.01103",
    settings={
        "beta": 5000,
        "source": "self_play",
        "link": "ddo",
        "forward": {"shared_noise": False},
        "rollout": {"guidance": 1.0},
    },
    equation="-log sigma(r) of data, -alpha log(1 - sigma(r)) of samples of the reference",
    published={
        "EDM, EDM2": (
            "several rounds, each under 1 % of the pre-training epochs, the reference replaced by the policy after "
            "each (alpha and beta not verified)"
        ),
    },
    results=(
        "FID without guidance 1.79 -> 1.30 (CIFAR-10), 1.58 -> 0.97 (ImageNet-64), 1.96 -> 1.26 (ImageNet 512) "
        "(abstract)"
    ),
    notes=(
        "The paper has class-conditional image models; here conditions are captions. Negatives are sampled without "
        "guidance, because the loss is that of a ratio to the reference's own distribution. beta is Diffusion-DPO's. "
        "For the rounds set reference.policy=sync and reference.every to the updates of a round. Only the chosen image "
        "of a pair is used."
    ),
)
