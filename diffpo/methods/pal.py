"""PAL: users as mixtures of a few prototypes, so that few users with few pairs are enough."""

from . import Preset

PRESET = Preset(
    title="PAL: Pluralistic Alignment Framework for Learning from Heterogeneous Preferences",
    paper="Chen et al. 2024, arXiv 2406.08469",
    settings={"beta": 5000, "users": True, "prototypes": 4},
    equation="ppd's loss; the user's tokens are sum_k w_k T_k, w = softmax of a small network of the taste",
    published={
        "reward models": (
            "a user's ideal point is a convex combination of a few prototypes; text to image: Pick-a-Filter and "
            "Pick-a-Pic on CLIP-H features (number of prototypes not verified)"
        ),
    },
    notes=(
        "The paper learns a reward model. Here its mixture describes the user of a policy, trained as ppd, in place of "
        "a network with full freedom. The weights of a new user come from a few pairs, as with ppd; the paper fits "
        "them. Set objective.prototypes to the number of tastes that you expect."
    ),
)
