"""The loss that criteria differentiate, its scaling on half-precision hosts, its second order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as nnf

# float16 has no numbers below 6e-8, where many gradients lie (ShadowLLM's fisher has a mean of
# 6e-9). Powers of two, so that dividing in fp32 is exact; each is tried where the one before
# overflows. Every batch begins with the first: what came before it changes no trace.
FP16_SCALES = (2.0**10, 2.0**5, 1.0)


def loss_scales(dtype: torch.dtype, gradient: bool) -> tuple[float, ...]:
    """Factors of the loss to try one after the other: bfloat16 has the range of float32."""
    return FP16_SCALES if gradient and dtype == torch.float16 else (1.0,)


def unscaled(gradient: Tensor, scale: float) -> Tensor:
    """The gradient of the loss from that of the loss times ``scale``, in fp32 if that is not 1."""
    return gradient if scale == 1 else gradient.float() / scale


def summed_loss(logits: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
    """Sum of cross-entropy over targets, in fp32 or fp64.

    Args:
        logits: (B, T, V).
        ids: (B, T) tokens.
        valid: (B, T) positions that predict a target.
    """
    targets = ids[:, 1:].masked_fill(~valid[:, :-1], -100).to(logits.device)
    return nnf.cross_entropy(
        _exact(logits)[:, :-1].flatten(0, 1),
        targets.flatten(),
        ignore_index=-100,
        reduction="sum",
    )


def hessian_gradient(loss: Tensor, at: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """H g in several tensors together, as the gradient of ||g||^2 / 2, g that of the loss.

    Of the loss times s it is s^2 times as large.
    """
    gradients = torch.autograd.grad(loss, at, create_graph=True)
    squares = [_exact(g).square().sum().to(loss.device) for g in gradients]
    return torch.autograd.grad(torch.stack(squares).sum() / 2, at)


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
