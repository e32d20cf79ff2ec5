"""SmPO: InPO with preferences smoothed by a score and an averaged (ReNoise) inversion."""

from . import Preset

PRESET = Preset(
    title=(
        "Smoothed Preference Optimization via ReNoise Inversion for Aligning Diffusion Models with Varied Human "
        "Preferences"
    ),
    paper="Lu et al. 2025, arXiv 2506.02698, eq. 9",
    settings={
        "beta": 5000,
        "source": "inversion",
        "link": "smpo",
        "link_options": {"temperature": 16.658},
        "inversion": {"average": True},
    },
    equation="-log sigma(10 (2 q - 1) u), q = sigma(gap/temperature)",
    published={
        "SD1.5": (
            "beta 2000, scale 10, 5 inversion steps, lr 1e-8 x 1024 pairs, 200 steps, warm-up 100, full fine-tuning"
        ),
        "SDXL": (
            "beta 5000, scale 10, 10 inversion steps, lr 1e-8 x 1024 pairs, 200 steps, warm-up 100, full fine-tuning"
        ),
    },
    results="6.5 times cheaper than Diffusion-DPO and 26 times cheaper than Diffusion-KTO (a review of the paper)",
    notes=(
        "beta is defined as here. Needs a score of each image (data.columns.score_0, score_1). Published scores are "
        "cosines of PickScore scaled to 0..1 between 0.11544 and 0.28202. PickScore here is 100 times the cosine, "
        "hence the temperature 100 x 0.16658, the range of the scores. For another scorer set its range. The released "
        "code takes the first pair's scores for the whole batch. Its labels, like the link's, come from scores and not "
        "from people. As in InPO's code, its inversion does not end at the level of t."
    ),
)
