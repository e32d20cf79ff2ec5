"""Diffusion-DPO: Wallace et al. 2023, "Diffusion Model Alignment Using Direct Preference Optimization", arXiv
2311.12908, eq. 14.

loss = -log sigma((beta/2) [(err_ref - err_policy)_chosen - (err_ref - err_policy)_rejected]), errors at one shared (t,
eps).

Published: full fine-tuning on 851,293 Pick-a-Pic v2 pairs; beta 5000 (released launchers, SD1.5 and SDXL), lr 1e-8 x
2048 pairs an update, 2,000 steps, warm-up 500 / 200, AdamW / Adafactor. SDXL-DPO is preferred over SDXL base and over
base + refiner.
"""

from ..links import sigmoid
from ..reference import adapter_off
from ..states.forward import shared_noise
from . import Objective

OBJECTIVE = Objective(source=shared_noise, reference=adapter_off, link=sigmoid, paper="arXiv 2311.12908")
