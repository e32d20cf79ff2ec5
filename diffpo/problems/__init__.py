"""Where regression problems come from: noise, inversion by the reference, transitions of a sampler.

Imports `weights` and the rooms below, and `samplers`.
"""
