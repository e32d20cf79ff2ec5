"""Scorers that judge an image while it is being sampled: (x_t, x_0 estimate, t) -> a number.

Imports `weights`, `models`, `common` and `scorers.judge`.
"""
