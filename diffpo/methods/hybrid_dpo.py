"""Hybrid-DPO (HyPO): Diffusion-DPO in which a reference that prefers the rejected image counts as neutral."""

from . import Preset

PRESET = Preset(
    title="Mitigating Mismatch within Reference-based Preference Optimization",
    paper="Yuan et al. 2026, arXiv 2602.11902",
    settings={"beta": 5000, "link": "conditional"},
    equation="-log sigma(u + min(0, m)), m = (beta/2) (err_ref_rejected - err_ref_chosen)",
    published={"language models": "as DPO, without further settings (abstract)"},
    results="higher win rates than DPO for language models (abstract); not measured on images",
    notes=(
        "beta is Diffusion-DPO's. The reference's margin at one noise and timestep is mostly noise of the draw, which "
        "a likelihood of text has not."
    ),
)
