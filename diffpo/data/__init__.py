"""From rows to batches: sources, columns, groups, image sizes, orders, and caches of latents and text embeddings.

Imports `config`, `shapes` and `common`.
"""
