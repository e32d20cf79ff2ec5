"""PPD: Diffusion-DPO with a policy that is conditioned on the user."""

from . import Preset

PRESET = Preset(
    title="Personalized Preference Fine-tuning of Diffusion Models",
    paper="Dang et al. 2025, arXiv 2501.06655",
    settings={"beta": 5000, "users": True},
    equation="-log sigma(r(x_chosen | caption, user) - r(x_rejected | caption, user)), the reference without the user",
    published={
        "Stable Cascade": (
            "user embedding from a vision-language model that sees 4 of the user's pairs, injected by additional "
            "cross-attention; beta not verified"
        ),
    },
    results="76 % win rate over Stable Cascade for new users with four pairs each (abstract)",
    notes=(
        "Loss and beta are Diffusion-DPO's. The policy is also conditioned on the user: name the column of users, "
        "data.columns.user, and see users.md. A user's taste is the mean difference of features over four of the "
        "user's pairs: of pooled VAE latents, which hold light and colour, or of objective.taste=clip and the like. "
        "The paper takes a vision-language model's embedding of the pairs. The taste enters by decoupled "
        "cross-attention, as in the paper. `diffpo generate --user-pairs A@0.5+B@0.5` is between two users, and A@0.3 "
        "is a weaker taste."
    ),
)
