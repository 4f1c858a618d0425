"""Backends of ``sparsify``: which one runs a policy, and the gathered linears of each.

``mask`` multiplies skipped units by zero; ``torch`` and ``triton`` read the kept rows and columns
alone: by PyTorch operators (on a CPU by :mod:`gnomon.kernels.cpu_gather`), or by Triton kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gnomon.host import HostSpec, module
from gnomon.kernels import cpu_gather
from gnomon.kernels.column_gather import column_gather_reference, column_gather_triton
from gnomon.kernels.gather_common import rows_of
from gnomon.kernels.launch import interpreted
from gnomon.kernels.row_gather import row_gather_reference, row_gather_triton, triton
from gnomon.policies.base import Policy

Backend = Literal["auto", "mask", "torch", "triton"]
Index = tuple[Tensor, int, Tensor | None]  # (S,) or (M, S) int32 units, rows per unit, count


def check_backend(backend: str) -> None:
    """Raises ValueError for an unknown backend."""
    if backend not in get_args(Backend):
        raise ValueError(
            f"backend={backend!r} is not available: use {', '.join(get_args(Backend))}"
        )


def choose_backend(backend: str, model: nn.Module, policy: Policy) -> str:
    """The backend that runs a bound policy: ``mask``, ``torch`` or ``triton``.

    ``auto`` takes ``mask`` where nothing is skipped, for a policy that looks at the units
    themselves or changes weights, and for hosts whose linears are not plain (quantised, adapted,
    offloaded, GPT-2's turned ones) or fused in an unknown order; else ``triton`` on a CUDA device
    that has Triton; else ``torch`` on a CPU, and on other devices for decisions that are fixed for
    a sequence; else ``mask``.

    Raises:
        ValueError: an unknown backend, or one that cannot run this policy or host here.
    """
    check_backend(backend)
    if backend == "mask":
        return backend
    device = next(model.parameters()).device
    refusal = _refusal(policy, model, backend, device)
    if backend != "auto":
        if refusal is not None:
            raise ValueError(refusal)
        return backend
    if refusal is not None or policy.skips_nothing or policy.transforms:
        return "mask"
    if device.type == "cuda" and triton is not None:
        return "triton"
    return "torch" if device.type == "cpu" or policy.refresh != "token" else "mask"


def _refusal(policy: Policy, model: nn.Module, backend: str, device: torch.device) -> str | None:
    if policy.needs_units:
        return (
            f"backend={backend!r} skips what policy={policy.name} looks at before it decides: use "
            "backend=mask"
        )
    if backend == "triton" and (triton is None or not (device.type == "cuda" or interpreted())):
        return (
            f"backend='triton' needs Triton and a CUDA device, the host is on {device}: use "
            "backend=torch or auto"
        )
    if "unknown" in (policy.spec.qkv, policy.spec.gate_up):
        return (
            f"backend={backend!r} gathers rows by head and neuron, and a fused linear of "
            f"{type(model).__name__} holds them in an order that is not known: use backend=mask"
        )
    for path in gathered_paths(policy.spec):
        linear = module(model, path)
        weight: Any = getattr(linear, "weight", None)
        plain = type(linear) is nn.Linear and weight is not None
        if not plain or weight.is_meta or not weight.is_floating_point():
            return (
                f"backend={backend!r} gathers weights of plain linears that one device holds, and "
                f"{path} is a {type(linear).__name__}: use backend=mask"
            )
    return None


def gathered_paths(spec: HostSpec) -> list[str]:
    """Paths of all linears of the decoder layers."""
    return [path for layer in spec.layers for path in layer.linears]


class Gather:
    """Linears that compute or read chosen units and leave shapes as they were.

    Args:
        backend: ``torch`` or ``triton``.
    """

    def __init__(self, backend: str) -> None:
        kernels = {
            "torch": (row_gather_reference, column_gather_reference),
            "triton": (row_gather_triton, column_gather_triton),
        }
        self._c = backend == "torch"
        self._row: Callable[..., Tensor] = kernels[backend][0]
        self._column: Callable[..., Tensor] = kernels[backend][1]

    def rows(self, x: Tensor, weight: Tensor, bias: Tensor | None, kept: Index) -> Tensor:
        """Chosen outputs of a linear: x (M, W), weight (N, W) -> (M, N), zero elsewhere."""
        lib = cpu_gather.serving(x, weight) if self._c else None
        if lib is not None:
            norms = (None, None, "none", 0.0)
            matrix = (weight, None, bias)
            return cpu_gather.rows(lib, x, matrix, None, kept, norms, "none", True).to(x.dtype)
        index, block, count = kept
        y = self._row(x, weight, index, block, count, bias=bias)
        n = weight.shape[0]
        place = rows_of(index, block, count)
        if count is not None:
            held = torch.arange(place.shape[-1], device=x.device) < count[:, None] * block
            place = torch.where(held, place, n)  # the column past the last takes what does not hold
        whole = y.new_zeros(x.shape[0], n + (count is not None))
        return whole.scatter_(1, place.expand(x.shape[0], -1), y)[:, :n]

    def columns(self, x: Tensor, weight_t: Tensor, bias: Tensor | None, kept: Index) -> Tensor:
        """A linear on chosen inputs: x (M, N), weight_t (N, D) -> (M, D); the rest is not read."""
        lib = cpu_gather.serving(x, weight_t) if self._c else None
        if lib is not None:
            return cpu_gather.columns(lib, x, weight_t, kept, None, bias, None, True).to(x.dtype)
        index, block, count = kept
        place = rows_of(index, block, count).expand(x.shape[0], -1)
        return self._column(x.gather(1, place), weight_t, index, block, count, bias=bias)

    def dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A linear with small contiguous weights: x (..., W) -> (..., N)."""
        rows = x.reshape(-1, x.shape[-1])
        if self._c and cpu_gather.serving(rows, weight) is not None:
            return cpu_gather.linear(x, weight, bias)
        return nn.functional.linear(x, weight, bias)
