"""PPD: Diffusion-DPO of a policy that also sees whose preference it is."""

from . import Preset

PRESET = Preset(
    title="Personalized Preference Fine-tuning of Diffusion Models",
    paper="Dang et al. 2025, arXiv 2501.06655",
    settings={"beta": 5000, "users": True},
    equation="-log sigma(r(x_chosen | caption, user) - r(x_rejected | caption, user)), the reference without the user",
    published={
        "Stable Cascade": (
            "user embedding from a vision-language model shown 4 of his pairs, injected by additional cross-attention; "
            "beta not verified"
        ),
    },
    results="76 % win rate over Stable Cascade for new users with four pairs each (abstract)",
    notes=(
        "The loss is Diffusion-DPO's and beta is too; the method is in the condition: name the column of users, "
        "data.columns.user, and see users.md. Other than in the paper, a user's taste is the mean difference of pooled "
        "VAE latents over four of his pairs (the paper: a vision-language model's embedding of them), and becomes "
        "tokens added to the text embedding (the paper: cross-attention layers of their own). So it can know tastes "
        "for light and colour at best, not for content; what was measured is in users.md."
    ),
)
