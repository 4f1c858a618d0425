"""What ``benchmarks/kernels.py`` times: each operator on one set of fresh weights and inputs.

A case holds three functions of no arguments: the operator, its PyTorch reference on the very same
tensors, and what a dense model does instead (cuBLAS, SDPA, ``topk``) on weights of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gnomon.kernels.column_gather import column_gather, column_gather_reference
from gnomon.kernels.decode_attention import decode_attention, decode_attention_reference
from gnomon.kernels.fewbit import row_bytes
from gnomon.kernels.gathered_ffn import ffn_up, ffn_up_reference, gathered_ffn
from gnomon.kernels.rowscaled_linear import (
    quantize_rows,
    rowscaled_linear,
    rowscaled_linear_reference,
)
from gnomon.kernels.select import select_topk, select_topk_reference
from gnomon.kernels.sketch_scores import sketch_scores, sketch_scores_reference
from gnomon.kernels.sketched_ffn import sketched_ffn, sketched_ffn_reference


@dataclass(frozen=True)
class Sizes:
    """A host's sizes, in the project's letters."""

    D: int
    F: int
    L: int
    H: int
    G: int
    gated: bool

    @property
    def d(self) -> int:
        """Head size."""
        return self.D // self.H

    @classmethod
    def of(cls, family: str, config: dict[str, Any]) -> Sizes:
        """From an entry of ``shapes.SHAPES``."""
        D, H = config["hidden_size"], config["num_attention_heads"]
        ffn = config.get("intermediate_size", config.get("ffn_dim"))
        groups = config.get("num_key_value_heads", H)
        return cls(D, ffn, config["num_hidden_layers"], H, groups, family != "opt")


@dataclass(frozen=True)
class Case:
    """One operator on one set of tensors.

    Attributes:
        run, reference, dense: calls.
        nbytes, nbytes_dense: bytes that the operator and the dense side have to read.
        compared: what of the results is compared.
    """

    run: Callable[[], Tensor]
    reference: Callable[[], Tensor]
    dense: Callable[[], Tensor]
    nbytes: float
    nbytes_dense: float
    compared: Callable[[Tensor], Tensor] = torch.Tensor.detach


@dataclass(frozen=True)
class Make:
    """Makes cases.

    Args:
        sizes: of the host.
        cfg: batch, context, rank, bits, int8, early.
        dtype: of weights and inputs.
        device: where.
    """

    sizes: Sizes
    cfg: Any
    dtype: torch.dtype
    device: torch.device

    def case(self, op: str, kept: float) -> Case:
        """A case with tensors of its own.

        Raises:
            ValueError: unknown operator.
        """
        if op not in OPS:
            raise ValueError(f"ops={op!r} is unknown; use any of {', '.join(OPS)}")
        return OPS[op](self, kept)

    def randn(self, *shape: int) -> Tensor:
        """Values of unit variance over the last dimension's square root, as weights have."""
        return torch.randn(shape, device=self.device, dtype=self.dtype) * shape[-1] ** -0.5

    def inputs(self, width: int) -> Tensor:
        """(B, width) of unit variance."""
        return torch.randn(self.cfg.batch, width, device=self.device, dtype=self.dtype)

    def some(self, n: int, kept: float) -> Tensor | None:
        """An ascending list of round(kept · n) of n units; None for all."""
        if kept == 1:
            return None
        chosen = torch.randperm(n, device=self.device)[: max(1, round(kept * n))]
        return chosen.sort().values.int()

    def matrix(self, rows: int, columns: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Weights as the operator reads them, their scales under int8, and the dense side's."""
        dense = self.randn(rows, columns)
        if not self.cfg.int8:
            return dense, None, dense
        return *quantize_rows(dense), dense


def _row_gather(m: Make, kept: float) -> Case:
    """The q projection: heads of d rows."""
    from gnomon.kernels.row_gather import row_gather, row_gather_reference

    s = m.sizes
    x, (w, scale, dense) = m.inputs(s.D), m.matrix(s.H * s.d, s.D)
    index = m.some(s.H, kept)
    args = (x, w, index, s.d, None, scale)
    share = _share(index, s.H)
    return Case(
        lambda: row_gather(*args, early=m.cfg.early),
        lambda: row_gather_reference(*args),
        lambda: F.linear(x, dense),
        share * _nbytes(w, scale),
        _nbytes(dense),
    )


def _column_gather(m: Make, kept: float) -> Case:
    """The out projection: heads of d columns, from their compact context."""
    s = m.sizes
    w, scale, dense = m.matrix(s.H * s.d, s.D)
    index = m.some(s.H, kept)
    x = m.inputs(s.H * s.d if index is None else len(index) * s.d)
    whole, turned = m.inputs(s.H * s.d), dense.t().contiguous()
    args = (x, w, index, s.d, None, scale)
    return Case(
        lambda: column_gather(*args, early=m.cfg.early),
        lambda: column_gather_reference(*args),
        lambda: F.linear(whole, turned),
        _share(index, s.H) * _nbytes(w, scale),
        _nbytes(dense),
    )


def _ffn_up(m: Make, kept: float) -> Case:
    """Gate and up of a gated FFN, or up of a plain one."""
    s = m.sizes
    x, (up, up_scale, up_dense) = m.inputs(s.D), m.matrix(s.F, s.D)
    gate, gate_scale, gate_dense = m.matrix(s.F, s.D) if s.gated else (None, None, None)
    index = m.some(s.F, kept)
    act = "silu" if s.gated else "relu"
    args = (x, up, gate, index, None, act, None, None, up_scale, gate_scale)
    return Case(
        lambda: ffn_up(*args, early=m.cfg.early),
        lambda: ffn_up_reference(*args),
        lambda: _dense_up(x, up_dense, gate_dense),
        _share(index, s.F) * _nbytes(up, up_scale, gate, gate_scale),
        _nbytes(up_dense, gate_dense),
    )


def _gathered_ffn(m: Make, kept: float) -> Case:
    """The whole FFN."""
    s = m.sizes
    x, (up, up_scale, up_dense) = m.inputs(s.D), m.matrix(s.F, s.D)
    gate, gate_scale, gate_dense = m.matrix(s.F, s.D) if s.gated else (None, None, None)
    down, down_scale, down_dense = m.matrix(s.F, s.D)
    turned, index = down_dense.t().contiguous(), m.some(s.F, kept)
    act = "silu" if s.gated else "relu"
    scales = (up_scale, gate_scale)
    up_args = (x, up, gate, index, None, act, None, None, *scales)
    args = (x, up, down, gate, index, None, act, None, None, None, *scales, down_scale)

    def reference() -> Tensor:
        h = ffn_up_reference(*up_args)
        return column_gather_reference(h, down, index, 1, None, down_scale, None, None, x.dtype)

    return Case(
        lambda: gathered_ffn(*args, early=m.cfg.early),
        reference,
        lambda: F.linear(_dense_up(x, up_dense, gate_dense), turned),
        _share(index, s.F) * _nbytes(up, up_scale, gate, gate_scale, down, down_scale),
        _nbytes(up_dense, gate_dense, down_dense),
    )


def _decode_attention(m: Make, kept: float) -> Case:
    """Attention over the cache; heads are kept at random, so grouped ones keep most groups."""
    s, B, C = m.sizes, m.cfg.batch, m.cfg.context
    k, v = (torch.randn(B, s.G, C, s.d, device=m.device).to(m.dtype) for _ in range(2))
    index = m.some(s.H, kept)
    heads = torch.arange(s.H, device=m.device) if index is None else index.long()
    slot = torch.full((1, s.H), -1, dtype=torch.int32, device=m.device)
    slot[0, heads] = torch.arange(len(heads), dtype=torch.int32, device=m.device)
    position = torch.full((B,), C - 1, dtype=torch.int32, device=m.device)
    q, new = m.inputs(len(heads) * s.d), m.inputs(s.G * s.d)
    args = (q, new, new, k, v, position, slot if index is not None else None)
    whole = m.inputs(s.H * s.d).view(B, s.H, 1, s.d)
    groups = len(torch.unique(heads // (s.H // s.G)))
    return Case(
        lambda: decode_attention(*args, early=m.cfg.early),
        lambda: decode_attention_reference(*args),
        lambda: F.scaled_dot_product_attention(whole, k, v, enable_gqa=s.G < s.H),
        groups / s.G * _nbytes(k, v),
        _nbytes(k, v),
    )


def _select_topk(m: Make, kept: float) -> Case:
    """The neurons of all layers that a shadow predictor decides, in one launch."""
    s = m.sizes
    scores = torch.randn(s.L - 1, s.F, device=m.device)
    keep = max(1, round(kept * s.F))
    return Case(
        lambda: select_topk(scores, keep, keep)[0],
        lambda: select_topk_reference(scores, None, keep, keep)[0],
        lambda: scores.topk(keep, sorted=False).indices,
        _nbytes(scores),
        _nbytes(scores),
    )


def _rowscaled_linear(m: Make, kept: float) -> Case:
    """The outputs of a shadow predictor, all layers at once; nothing is skipped in it."""
    s = m.sizes
    rows = (s.L - 1) * s.F
    x = torch.randn(m.cfg.batch, m.cfg.rank, device=m.device)
    dense = m.randn(rows, m.cfg.rank)
    q, scale = quantize_rows(dense)
    narrow = x.to(m.dtype)
    return Case(
        lambda: rowscaled_linear(x, q, scale),
        lambda: rowscaled_linear_reference(x, q, scale),
        lambda: F.linear(narrow, dense),
        _nbytes(q, scale),
        _nbytes(dense),
    )


def _sketch_scores(m: Make, kept: float) -> Case:
    """Scores of a layer's neurons from few-bit copies, where a dense model has its gate and up."""
    s = m.sizes
    x, offset = m.inputs(s.D), torch.randn(s.F, device=m.device)

    def copy(bits: int) -> tuple[Tensor, Tensor, int]:
        shape = (s.F, row_bytes(s.D, bits))
        packed = torch.randint(0, 256, shape, dtype=torch.uint8, device=m.device)
        return packed, torch.full((s.F,), s.D**-0.5, device=m.device), bits

    inner = copy(m.cfg.bits[0])
    linear = copy(m.cfg.bits[1]) if s.gated else (None, None, 0)
    up, gate = m.randn(s.F, s.D), m.randn(s.F, s.D) if s.gated else None
    args = (x, *inner, "silu" if s.gated else "relu", offset, *linear)
    return Case(
        lambda: sketch_scores(*args),
        lambda: sketch_scores_reference(*args),
        lambda: _dense_up(x, up, gate),
        _nbytes(*inner[:2], *linear[:2], offset),
        _nbytes(up, gate),
        torch.exp,  # the logarithm of a neuron that is nearly zero is all rounding
    )


def _sketched_ffn(m: Make, kept: float) -> Case:
    """Neurons scored, decided and computed in one launch, where a dense model has gate and up."""
    s = m.sizes
    x, offset = m.inputs(s.D), torch.randn(s.F, device=m.device)

    def copy(bits: int) -> dict[str, Any]:
        shape = (s.F, row_bytes(s.D, bits))
        packed = torch.randint(0, 256, shape, dtype=torch.uint8, device=m.device)
        return {"": packed, "_scale": torch.full((s.F,), s.D**-0.5, device=m.device), "_bits": bits}

    names = ("inner", "linear") if s.gated else ("inner",)
    copies = {
        f"{name}{field}": value
        for name, bits in zip(names, m.cfg.bits, strict=False)
        for field, value in copy(bits).items()
    }
    act = {"activation": "silu" if s.gated else "relu", "offset": offset}
    cut = _between(sketch_scores_reference(x, **copies, **act).flatten(), kept)
    (up, up_scale, dense_up), (gate, gate_scale, dense_gate) = (m.matrix(s.F, s.D) for _ in "ug")
    if not s.gated:
        gate = gate_scale = dense_gate = None
    scales = {"up_scale": up_scale, "gate_scale": gate_scale}
    args = (x, cut, up, gate)
    return Case(
        lambda: sketched_ffn(*args, **copies, **act, **scales)[0],
        lambda: sketched_ffn_reference(*args, **copies, **act, **scales)[0],
        lambda: _dense_up(x, dense_up, dense_gate),
        _nbytes(*(t for t in copies.values() if isinstance(t, Tensor)), offset)
        + kept * _nbytes(up, gate, up_scale, gate_scale),
        _nbytes(dense_up, dense_gate),
    )


def _between(scores: Tensor, kept: float) -> Tensor:
    """A cut (1,) that about a share of the scores reaches, in the widest gap of 65 round it."""
    ordered = scores.sort(descending=True).values
    near = ordered[max(0, round(kept * len(ordered)) - 33) :][:66]
    place = int((near[:-1] - near[1:]).argmax())
    return near[place : place + 2].mean()[None]


def _threshold_gemv(m: Make, kept: float) -> Case:
    """Input channels above a threshold (TEAL), of the down projection's shape."""
    from gnomon.kernels.threshold_gemv import threshold_gemv, threshold_gemv_reference

    s = m.sizes
    x, (w, scale, dense) = m.inputs(s.F), m.matrix(s.F, s.D)
    turned = dense.t().contiguous()
    cut = torch.quantile(x.float().abs().flatten(), 1 - kept).reshape(1) if kept < 1 else None
    threshold = torch.full((1,), -1.0, device=m.device) if cut is None else cut
    read = (x.float().abs() > threshold).any(0).float().mean().item()
    args = (x, w, threshold, None, scale)
    return Case(
        lambda: threshold_gemv(*args),
        lambda: threshold_gemv_reference(*args),
        lambda: F.linear(x, turned),
        read * _nbytes(w, scale),
        _nbytes(dense),
    )


def _threshold_ffn(m: Make, kept: float) -> Case:
    """Gate and up by the input channels above a threshold (TEAL)."""
    from gnomon.kernels.threshold_ffn import threshold_ffn, threshold_ffn_reference

    s = m.sizes
    x, (up, gate) = m.inputs(s.D), (m.randn(s.D, s.F) for _ in "ug")
    threshold = torch.quantile(x.float().abs().flatten(), 1 - kept).reshape(1)
    threshold = threshold if kept < 1 else torch.full_like(threshold, -1.0)
    read = (x.float().abs() > threshold).any(0).float().mean().item()
    args = (x, up, gate, threshold, "silu")
    turned_up, turned_gate = (w.t().contiguous() for w in (up, gate))
    return Case(
        lambda: threshold_ffn(*args),
        lambda: threshold_ffn_reference(*args),
        lambda: _dense_up(x, turned_up, turned_gate),
        read * _nbytes(up, gate),
        _nbytes(up, gate),
    )


def _dense_up(x: Tensor, up: Tensor, gate: Tensor | None) -> Tensor:
    if gate is None:
        return F.linear(x, up).relu()
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def _share(index: Tensor | None, n: int) -> float:
    return 1.0 if index is None else len(index) / n


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


UNSKIPPED = ("rowscaled_linear", "sketch_scores")  # operators that read everything
OPS: dict[str, Callable[[Make, float], Case]] = {
    "row_gather": _row_gather,
    "ffn_up": _ffn_up,
    "column_gather": _column_gather,
    "gathered_ffn": _gathered_ffn,
    "decode_attention": _decode_attention,
    "select_topk": _select_topk,
    "rowscaled_linear": _rowscaled_linear,
    "sketch_scores": _sketch_scores,
    "sketched_ffn": _sketched_ffn,
    "threshold_gemv": _threshold_gemv,
    "threshold_ffn": _threshold_ffn,
}
