"""Rows of preferences -> batches of latents and conditions: pairs.py, transforms.py, cache.py, batches.py."""
