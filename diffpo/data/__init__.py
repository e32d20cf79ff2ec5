"""Rows of preferences -> batches of latents and conditions: images, tables, source, columns, rows, groups; transforms,
cache, batches, curriculum."""
