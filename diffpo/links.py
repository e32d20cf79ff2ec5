"""Links: implicit rewards -> one loss per pair. Pure functions of tensors (n,); u = r_chosen - r_rejected is the
logit."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def sigmoid(chosen: Tensor, rejected: Tensor, preference: Tensor) -> Tensor:
    """-p log sigma(u) - (1-p) log sigma(-u), the Bradley-Terry likelihood of a label that is right with probability p.

    p = 1 is DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7; Wallace et al. 2023, arXiv 2311.12908, eq. 14), p < 1
    its soft-label form; a tie, p = 1/2, pulls u to 0.
    """
    u = chosen - rejected
    return -preference * logsigmoid(u) - (1 - preference) * logsigmoid(-u)
