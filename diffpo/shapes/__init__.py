"""The embedded world: captioned scenes of coloured shapes, and an oracle that recognises scenes from pixels."""

from .oracle import ATTRIBUTES, score
from .scenes import SIZE, Scene, heldout_captions, parse, render, sample_scene, train_captions

__all__ = [
    "ATTRIBUTES",
    "SIZE",
    "Scene",
    "heldout_captions",
    "parse",
    "render",
    "sample_scene",
    "score",
    "train_captions",
]
