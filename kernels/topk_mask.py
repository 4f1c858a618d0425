"""Selection: the K best of N scores as a boolean mask.

mask[..., j] = 1 iff score[..., j] is among the K largest of its row; among equals the lower index
goes first, so that exactly K are kept and the set is always the same one. NaN ranks as −inf.
Shapes: scores (..., N), result (..., N). :mod:`gnomon.kernels.select` lists the very same sets.
"""

from __future__ import annotations

import torch
from torch import Tensor

SORTED = 64  # up to here one stable sort is cheaper than finding the cut and resolving its ties


def topk_mask(scores: Tensor, k: int) -> Tensor:
    """Exact top-k as a mask, by torch operators alone: no host sync, safe in a CUDA graph.

    Args:
        scores: (..., N), higher = keep.
        k: units to keep, 0 <= k <= N.

    Returns:
        bool (..., N) with exactly ``k`` True in every row.

    Raises:
        ValueError: k outside 0..N.
    """
    n = scores.shape[-1]
    if not 0 <= k <= n:
        raise ValueError(f"k={k} is outside 0..{n}, the number of units")
    if k in (0, n):
        return torch.full_like(scores, k == n, dtype=torch.bool)
    scores = ranked(scores)
    if n <= SORTED:
        index = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, True)
    cut = scores.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > cut, scores == cut
    room = k - above.sum(-1, keepdim=True, dtype=torch.int32)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))


def ranked(scores: Tensor) -> Tensor:
    """Scores (..., N) with NaN as −inf, the order that every selection uses."""
    return scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
