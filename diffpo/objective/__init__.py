"""The loss: implicit rewards from errors, the reference, the weighting of timesteps, user tokens.

Imports `problems` and the rooms below.
"""
