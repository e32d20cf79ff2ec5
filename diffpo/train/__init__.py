"""The training loop and all that one run needs: data feeds, checkpoints, metrics, several processes.

Imports `export` and the rooms below.
"""
