"""Trained weights for other programs: kohya, merged folder, one file, the hub, the model card.

Imports `evaluate` and the rooms below.
"""
