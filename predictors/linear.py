"""What predictors are made of: a stack of linears, fp32 to train, row-scaled int8 to use."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gnomon.kernels.rowscaled_linear import quantize_rows, rowscaled_linear


class Stack(nn.Module):
    """S linears of N outputs and K inputs, in full precision to train and rounded to use.

    Attributes:
        shape: (S, N, K).
        weight: (S, N, K) fp32 parameter while training; absent once quantised.
        bias: (S, N) fp32, or None.
    """

    shape: tuple[int, int, int]
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    @property
    def quantized(self) -> bool:
        """Whether the weights are rounded, and training has ended."""
        return self.weight is None

    @property
    def nbytes(self) -> int:
        """Bytes of weights, scales and biases as stored now."""
        tensors = (*self.parameters(), *self.buffers())
        return sum(t.numel() * t.element_size() for t in tensors)

    def quantize(self) -> None:
        """Rounds the weights, in place; again does nothing."""
        raise NotImplementedError

    def dequantize(self) -> None:
        """Turns rounded weights back into fp32 parameters, in place; again does nothing."""
        raise NotImplementedError

    def one(self, index: int, x: Tensor) -> Tensor:
        """The linear ``index`` alone: x (..., K) -> (..., N)."""
        raise NotImplementedError


class LinearStack(Stack):
    """A stack of row-scaled int8, kept in one tensor so that training runs one GEMM.

    Attributes:
        q, scale: (S, N, K) int8 and (S, N) fp32 once quantised; absent before.
    """

    def __init__(
        self, stack: int, outputs: int, inputs: int, *, bias: bool = True, gain: float = 1.0
    ) -> None:
        """Draws weights with standard deviation ``gain / sqrt(inputs)`` and zero biases."""
        super().__init__()
        self.shape = (stack, outputs, inputs)
        self.weight = nn.Parameter(torch.randn(self.shape) * (gain / math.sqrt(inputs)))
        self.bias = nn.Parameter(torch.zeros(stack, outputs)) if bias else None
        self.register_buffer("q", None)
        self.register_buffer("scale", None)

    def quantize(self) -> None:
        """Replaces the fp32 weights by row-scaled int8, in place; again does nothing."""
        if self.weight is not None:
            self.q, self.scale = quantize_rows(self.weight)
            self.weight = None
            self.requires_grad_(False)

    def dequantize(self) -> None:
        """Turns row-scaled int8 back into fp32 parameters, in place; again does nothing."""
        if self.weight is None:
            self.weight = nn.Parameter(self.q.float() * self.scale[..., None])
            self.register_buffer("q", None)
            self.register_buffer("scale", None)
            self.requires_grad_(True)

    def shared(self, x: Tensor) -> Tensor:
        """Every linear on the same rows: x (..., K) -> (..., S, N)."""
        stack, outputs, inputs = self.shape
        bias = None if self.bias is None else self.bias.flatten()
        if self.weight is None:
            y = rowscaled_linear(x, self.q.flatten(0, 1), self.scale.flatten(), bias)
        else:
            y = nn.functional.linear(x, self.weight.view(stack * outputs, inputs), bias)
        return y.unflatten(-1, (stack, outputs))

    def grouped(self, x: Tensor) -> Tensor:
        """Each linear on its own rows: x (S, R, K) -> (S, R, N)."""
        if self.weight is None:
            y = torch.bmm(x, self.q.to(x.dtype).mT) * self.scale[:, None]
        else:
            y = torch.bmm(x, self.weight.mT)
        return y if self.bias is None else y + self.bias[:, None]

    def one(self, index: int, x: Tensor) -> Tensor:
        """The linear ``index`` alone: x (..., K) -> (..., N)."""
        bias = None if self.bias is None else self.bias[index]
        if self.weight is None:
            return rowscaled_linear(x, self.q[index], self.scale[index], bias)
        return nn.functional.linear(x, self.weight[index], bias)


class StackByKind(nn.ModuleDict):
    """One :class:`LinearStack` per unit kind."""

    def __getitem__(self, key: str) -> LinearStack:  # type: ignore[override]
        stack = super().__getitem__(key)
        assert isinstance(stack, LinearStack)
        return stack


def rms_normalise(x: Tensor) -> Tensor:
    """x (..., W) -> fp32 (..., W) of unit root mean square; no parameters, zero stays zero."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
