"""Perplexity over packed blocks, teacher-forced, with a paired block-bootstrap interval.

Position t (0-based) of a block predicts token t + 1. Protocol ``all`` scores every prediction of a
block (``block - 1`` of them); ``decode`` with a prompt of P tokens scores those made at positions
>= P - 1, which are the sparse ones (``block - P`` of them). The dense model is scored on the same
targets, so that blocks are paired.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

NAMES = ("decode", "all", "published")
_CHUNK_BYTES = (
    128 * 2**20
)  # of float32 logits at a time: 0.5 M of the embedded host's 49152-wide rows


@dataclass(frozen=True)
class Protocol:
    """Which positions are sparse and scored.

    Attributes:
        name: ``decode``, ``all``, or ``published`` (scored as ``all``).
        prompt: P, prompt tokens of each block under ``decode``; unused under ``all``.

    Raises:
        ValueError: unknown name, or no prompt of at least one token where one is needed.
    """

    name: str = "decode"
    prompt: int | None = 256

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"protocol={self.name!r} is unknown; use one of {', '.join(NAMES)}")
        if self.name == "decode" and (self.prompt is None or self.prompt < 1):
            raise ValueError(f"protocol.prompt={self.prompt} must be at least 1 under decode")

    @property
    def prompt_length(self) -> int | None:
        """The boundary that :func:`gnomon.sparsify` needs: P under ``decode``, else None."""
        return self.prompt if self.name == "decode" else None

    def targets(self, block: int) -> int:
        """Scored targets of a block of ``block`` tokens.

        Raises:
            ValueError: the prompt leaves nothing to score.
        """
        first = self.prompt_length or 1
        if block <= first:
            raise ValueError(
                f"protocol.prompt={self.prompt} leaves no target in text.block={block}: lower "
                "protocol.prompt or raise text.block"
            )
        return block - first


@dataclass(frozen=True)
class Perplexity:
    """Paired perplexities over n blocks of equally many targets.

    Attributes:
        tokens: scored targets in all.
        interval: 95 % block-bootstrap interval of ``ratio``; None for a single block.
    """

    tokens: int
    dense: float
    sparse: float
    interval: tuple[float, float] | None

    @property
    def ratio(self) -> float:
        """Sparse over dense perplexity: 1 is lossless, higher is worse."""
        return self.sparse / self.dense

    def as_result(self) -> dict[str, Any]:
        """The fields of ``quality.texts.<name>`` in results.json."""
        row: dict[str, Any] = {
            "tokens": self.tokens,
            "ppl_dense": self.dense,
            "ppl_sparse": self.sparse,
            "ppl_ratio": self.ratio,
        }
        return row | ({"ppl_ratio_ci": list(self.interval)} if self.interval else {})


@torch.no_grad()
def block_nll(
    model: nn.Module,
    ids: Tensor,
    protocol: Protocol,
    *,
    batch: int = 4,
    advance: Callable[[int], object] = lambda blocks: None,
) -> Tensor:
    """Negative log-likelihood of each block's scored targets under the model as it now is.

    Args:
        model: the host, inside or outside :func:`gnomon.sparsify`.
        ids: (n, block) tokens.
        protocol: which targets are scored.
        batch: blocks per forward.
        advance: called with the blocks done after each forward (for a progress bar).

    Returns:
        (n,) float64 sums, in nats.

    Raises:
        ValueError: the model gives NaN or infinite log-likelihoods.
    """
    scored = protocol.targets(ids.shape[1])
    device = next(model.parameters()).device
    sums = []
    for rows in ids.split(batch):
        rows = rows.to(device)
        logits = tail_logits(model, rows, scored + 1)[:, :-1]
        sums.append(_nll(logits, rows[:, -scored:]).cpu())
        advance(len(rows))
    nll = torch.cat(sums)
    if not nll.isfinite().all():
        bad = (~nll.isfinite()).nonzero().flatten().tolist()
        raise ValueError(
            f"the model's log-likelihood is NaN or infinite in blocks {bad[:8]}: check host.dtype "
            f"(now {next(model.parameters()).dtype}); float32 or bfloat16 is safer than float16"
        )
    return nll


def tail_logits(model: nn.Module, ids: Tensor, keep: int) -> Tensor:
    """Logits (B, keep, V) of the last ``keep`` positions of one cacheless forward."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
    return model(input_ids=ids, use_cache=False).logits[:, -keep:]


def positions_per_chunk(logits: Tensor) -> int:
    """Positions of (B, T, V) logits whose float32 copy stays within the chunk's memory."""
    return max(1, _CHUNK_BYTES // (4 * logits.shape[0] * logits.shape[-1]))


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Float64 sums (B,) over positions, from float32 log-softmax in chunks of positions."""
    step = positions_per_chunk(logits)
    targets = targets.to(logits.device)  # the last of several devices
    total = torch.zeros(len(targets), dtype=torch.float64, device=logits.device)
    for part, goal in zip(logits.split(step, 1), targets.split(step, 1), strict=True):
        losses = F.cross_entropy(part.float().transpose(1, 2), goal, reduction="none")
        total += losses.double().sum(-1)
    return total


def perplexity(
    sparse: Tensor, dense: Tensor, targets: int, *, resamples: int = 2000, seed: int = 0
) -> Perplexity:
    """Perplexities and their ratio from per-block sums.

    Args:
        sparse: (n,) NLL sums of the sparse model.
        dense: (n,) NLL sums of the dense model on the same blocks.
        targets: scored targets per block.
        resamples: bootstrap resamples of whole blocks.
        seed: of the bootstrap.
    """
    tokens = targets * len(sparse)
    return Perplexity(
        tokens=tokens,
        dense=math.exp(dense.sum().item() / tokens),
        sparse=math.exp(sparse.sum().item() / tokens),
        interval=ratio_interval(sparse, dense, targets, resamples=resamples, seed=seed),
    )


def ratio_interval(
    sparse: Tensor, dense: Tensor, targets: int, *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """95 % interval of the perplexity ratio by resampling pairs of blocks; None for one block.

    Blocks hold equally many targets, so the log-ratio of a resample is the mean of its blocks'
    differences per target.
    """
    gaps = ((sparse - dense) / targets).double().cpu().numpy()
    if len(gaps) < 2 or resamples < 1:
        return None
    draws = np.random.default_rng(seed).integers(0, len(gaps), (resamples, len(gaps)))
    low, high = np.exp(np.percentile(gaps[draws].mean(1), [2.5, 97.5]))
    return float(low), float(high)
