"""From rows to batches: sources, columns, groups, sizes, orders and the caches of latents and text embeddings.

Imports `config`, `shapes` and `common`.
"""
