"""RankDPO: all pairs of a ranked list, weighted by their effect on the DCG of the list."""

from . import Preset

PRESET = Preset(
    title="Scalable Ranked Preference Optimization for Text-to-Image Generation",
    paper="Karthik et al. 2024, arXiv 2410.18013, eq. 5 to 7",
    settings={"beta": 5000, "link": "rankdpo"},
    equation=(
        "-sum over psi_i > psi_j of |G_i - G_j| |1/D_i - 1/D_j| log sigma(r_i - r_j), G = 2^psi - 1, D = log(1 + rank "
        "by the policy's rewards)"
    ),
    published={
        "SDXL, SD3-Medium": (
            "Syn-Pic: several models' images of each prompt, ranked by the mean of several reward models; beta and "
            "learning rate not verified"
        ),
    },
    results=(
        "better prompt following (T2I-CompBench, GenEval, DPG-Bench) and visual quality (user study) than the base "
        "models (abstract)"
    ),
    notes=(
        "There is no official code; beta is Diffusion-DPO's. Takes ranked lists (data.columns.images with scores, "
        "data.list_size). Scores are win rates in 0..1, as in the paper: the share of the list's other images that an "
        "image beats, averaged over the reward models. For a scorer in another unit set link_options.temperature to a "
        "typical difference of its scores: 1 for PickScore as it is used here. link_options.spread=1 stretches the "
        "scores of every list to 0..1, which gives near-ties full weight."
    ),
)
