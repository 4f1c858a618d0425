"""Selection: the K best of N scores as a boolean mask.

mask[..., j] = 1 iff score[..., j] is among the K largest of its row; ties are broken so that
exactly K are kept. Shapes: scores (..., N), result (..., N).
"""

from __future__ import annotations

import torch
from torch import Tensor


def topk_mask(scores: Tensor, k: int) -> Tensor:
    """Exact top-k as a mask: the reference and the CPU path.

    Args:
        scores: (..., N), higher = keep.
        k: units to keep, 0 <= k <= N.

    Returns:
        bool (..., N) with exactly ``k`` True in every row.
    """
    n = scores.shape[-1]
    if not 0 <= k <= n:
        raise ValueError(f"k={k} is outside 0..{n}, the number of units")
    if k == n:
        return torch.ones_like(scores, dtype=torch.bool)
    index = scores.topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, True)
