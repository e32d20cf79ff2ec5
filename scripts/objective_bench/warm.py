"""Imported once by the server that jobs are forked from: the slow part of starting one."""

import diffusers.loaders.peft  # noqa: F401
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel  # noqa: F401
