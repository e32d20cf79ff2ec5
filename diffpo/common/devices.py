"""Where networks run if no device is named.

Apple's GPUs (mps) have no float64: what is counted in float64 is moved to the CPU first.
"""

from __future__ import annotations


def best() -> str:
    """cuda where there is one, else mps, else cpu."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
