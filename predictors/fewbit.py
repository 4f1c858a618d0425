"""A stack of linears in a few bits: latent fp32 weights to train, packed codes to use.

While training a forward sees the levels that the latent weights round to, and the gradient goes
straight through to them and, as that of a plain factor, to the scales (LSQ,
https://arxiv.org/abs/1902.08153, without its scaling of gradients).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gnomon.kernels.fewbit import check_bits, levels, pack
from gnomon.predictors.linear import Stack
from gnomon.predictors.rounding import nearest


class FewBitStack(Stack):
    """S linears of N outputs and K inputs with weights of ``bits`` bits and a scale per row.

    Args:
        stack, outputs, inputs: S, N, K.
        bits: 1 to 4.
        bias: whether the linears have one.

    Attributes:
        weight: (S, N, K) latent fp32 parameter while training; absent once quantised.
        scale: (S, N) fp32, a parameter while training.
        codes: (S, N, row_bytes) uint8 once quantised; absent before.

    Raises:
        ValueError: a number of bits that is not offered.
    """

    codes: Tensor
    scale: Tensor

    def __init__(
        self, stack: int, outputs: int, inputs: int, bits: int, *, bias: bool = False
    ) -> None:
        """All zeros with scales of 1, until :meth:`adopt` gives weights."""
        super().__init__()
        check_bits(bits)
        self.shape, self.bits = (stack, outputs, inputs), bits
        self.weight = nn.Parameter(torch.zeros(self.shape))
        self.scale = nn.Parameter(torch.ones(stack, outputs))
        self.bias = None
        self.register_buffer("codes", None)
        if bias:
            self.add_bias()

    def add_bias(self, trained: bool = True) -> None:
        """Gives the linears biases of zero."""
        zeros = torch.zeros(self.shape[:2], device=self.scale.device)
        self.bias = nn.Parameter(zeros, requires_grad=trained)

    @torch.no_grad()
    def adopt(self, index: int, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        """Takes one linear over: weight (N, K), scale (N,), bias (N,)."""
        assert self.weight is not None
        self.weight[index].copy_(weight)
        self.scale[index].copy_(scale)
        if self.bias is not None and bias is not None:
            self.bias[index].copy_(bias)

    def quantize(self) -> None:
        """Replaces the latent weights by packed codes, in place; again does nothing."""
        if self.weight is None:
            return
        found = nearest(self.weight.detach() / self.scale.detach()[..., None], self.bits)
        codes = pack((found + (2**self.bits - 1) / 2).int(), self.bits)
        scale = self.scale.detach().clone()
        self.weight = None
        del self.scale, self.codes
        self.register_buffer("scale", scale)
        self.register_buffer("codes", codes)
        self.requires_grad_(False)

    def dequantize(self) -> None:
        """Turns codes back into latent weights at their levels; again does nothing."""
        if self.weight is not None:
            return
        scale = self.scale
        found = levels(self.codes, self.bits, self.shape[-1]) * scale[..., None]
        del self.scale, self.codes
        self.weight, self.scale = nn.Parameter(found), nn.Parameter(scale.clone())
        self.register_buffer("codes", None)
        self.requires_grad_(True)

    def one(self, index: int, x: Tensor) -> Tensor:
        """The linear ``index`` alone: x (..., K) -> (..., N)."""
        bias = None if self.bias is None else self.bias[index]
        return nn.functional.linear(x, self._rounded(index), bias)

    def _rounded(self, at: int) -> Tensor:
        """Levels times scales of one linear, (N, K)."""
        scale = self.scale[at][..., None]
        if self.weight is None:
            return levels(self.codes[at], self.bits, self.shape[-1]) * scale
        weight = self.weight[at]
        found = nearest((weight / scale).detach(), self.bits) * scale
        return found + (weight - weight.detach())
