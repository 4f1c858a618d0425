"""Distances of a sparse host from the dense one, over many positions at once.

Vocabularies are large: logits are walked through in chunks of positions, so that no more than one
chunk is ever held as fp32 probabilities.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

CHUNK = 1024  # positions whose log-probabilities are held at once: 200 MB at a vocabulary of 49 152


class _MeanKl(torch.autograd.Function):
    """Forward and gradient in one pass; only the gradient is kept, in the logits' own dtype."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        total = student.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for start in range(0, len(student), CHUNK):
            rows = slice(start, start + CHUNK)
            own = (student[rows].float() / temperature).log_softmax(-1)
            wanted = (teacher[rows].float() / temperature).log_softmax(-1)
            total += (wanted.exp() * (wanted - own)).sum()
            if gradient is not None:
                gradient[rows] = (own.exp_() - wanted.exp_()) * (temperature / len(student))
        ctx.save_for_backward(gradient)
        return total * (temperature**2 / len(student))

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return None if gradient is None else gradient * above, None, None


def mean_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) in nats, mean over positions, times temperature².

    Args:
        student: (M, V) logits; gradients flow into them.
        teacher: (M, V) logits.
        temperature: divides both.
    """
    loss: Tensor = _MeanKl.apply(student, teacher, temperature)
    return loss


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of hidden states (M, D) over the teacher's variance, fp32."""
    wanted = teacher.float()
    return nnf.mse_loss(student.float(), wanted) / wanted.var(correction=0).clamp_min(1e-12)


class Divergence:
    """Sums over held-out positions: KL to the dense host, and both perplexities."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, sparse: Tensor, dense: Tensor, targets: Tensor) -> None:
        """Adds positions: logits (M, V) of both, targets (M,) with -100 where there is none."""
        for start in range(0, len(sparse), CHUNK):
            rows = slice(start, start + CHUNK)
            own, wanted = sparse[rows].float().log_softmax(-1), dense[rows].float().log_softmax(-1)
            kl = (wanted.exp() * (wanted - own)).sum(-1).double().sum()
            losses = [
                nnf.nll_loss(x, targets[rows], ignore_index=-100, reduction="sum").double()
                for x in (own, wanted)
            ]
            counts = [(targets[rows] >= 0).sum().double(), kl.new_tensor(len(own))]
            self.sums += torch.stack([kl, *losses, *counts])

    def compute(self) -> dict[str, float]:
        """``kl`` per position, perplexities at the same targets and their ratio, and positions."""
        kl, sparse, dense, targets, positions = self.sums.tolist()
        targets = max(1.0, targets)
        return {
            "kl": kl / max(1.0, positions),
            "ppl_dense": math.exp(dense / targets),
            "ppl_sparse": _exp(sparse / targets),
            "ppl_ratio": _exp((sparse - dense) / targets),
            "positions": positions,
        }


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0)) if math.isfinite(x) else math.inf
