"""Storage formats of scores: 8-bit square-root codes and top-k bit masks; and rows made of them.

``int8``: within one (row, layer, kind) with maximum m, a score s >= 0 is stored as
q = round(255 sqrt(s / m)) and read as m (q / 255)^2. Its error is at most
sqrt(s m) / 255 + m / 260100: 0.4 % of the maximum at the top, far less for small scores, and the
order of two scores is never reversed (near ones may become equal).

``bits``: the top-k of each (row, layer, kind) at one density, one bit per unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from gnomon.host import KINDS, UnitKind

Format = Literal["int8", "bits"]
Need = Literal["labels", "scores"]
Density = float | Mapping[str, float]
Raw = dict[str, Tensor]


def kept(density: float, units: int) -> int:
    """Units kept of a layer: max(1, round(density N)), as in ``Budget``."""
    return max(1, round(density * units))


def density_of(density: Density, kind: UnitKind) -> float:
    """The density of one kind.

    Raises:
        ValueError: missing, or outside (0, 1].
    """
    value = density if isinstance(density, int | float) else density.get(kind)
    if value is None or not 0 < value <= 1:
        raise ValueError(f"density for {kind} is {value}: it must be in (0, 1]")
    return float(value)


def check_needs(needs: Iterable[Need]) -> frozenset[Need]:
    """``needs`` as a set.

    Raises:
        ValueError: empty, or something else than labels and scores.
    """
    wanted = frozenset(needs)
    if not wanted or not wanted <= set(get_args(Need)):
        raise ValueError(f"needs={sorted(wanted)}: use labels, scores or both")
    return wanted


def encode_scores(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (..., N) >= 0 as codes (..., N) uint8 and maxima (...) fp32."""
    peak = scores.amax(dim=-1)
    scale = torch.where(peak > 0, peak, 1.0)[..., None]
    codes = (scores / scale).sqrt_().mul_(255).round_()
    return codes.to(torch.uint8), peak.float()


def decode_scores(codes: Tensor, peak: Tensor) -> Tensor:
    """Scores (..., N) fp32 from codes (..., N) and maxima (...)."""
    return codes.float().div_(255).square_().mul_(peak[..., None])


def top_k(scores: Tensor, density: float) -> Tensor:
    """Top-k labels (..., N) bool of scores (..., N) at a density."""
    best = scores.topk(kept(density, scores.shape[-1]), dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def pack_bits(mask: Tensor) -> Tensor:
    """Mask (..., N) bool as (..., ceil(N/8)) uint8, lowest bit first."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, units: int) -> Tensor:
    """Mask (..., N) bool from (..., ceil(N/8)) uint8."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[..., None] >> shifts) & 1
    return bits.flatten(-2)[..., :units].bool()


def encode_rows(
    inputs: Tensor,
    scores: Mapping[str, Tensor],
    format: Format,
    density: Density,
    dtype: torch.dtype,
) -> Raw:
    """Rows as they are stored.

    Args:
        inputs: (R, n_taps, W).
        scores: kind -> (R, L, N).
        format: ``int8`` or ``bits``.
        density: of the labels; ``bits`` only.
        dtype: of the stored inputs.

    Raises:
        ValueError: an input does not fit ``dtype``.
    """
    raw: Raw = {"inputs": inputs.to(dtype)}
    if not bool(raw["inputs"].isfinite().all()):
        raise ValueError(
            f"predictor inputs have NaN or inf as {dtype}: set harvest.input_dtype=bfloat16"
        )
    for kind in KINDS:
        if format == "bits":
            raw[f"{kind}_bits"] = pack_bits(top_k(scores[kind], density_of(density, kind)))
        else:
            raw[f"{kind}_codes"], raw[f"{kind}_peak"] = encode_scores(scores[kind])
    return raw


def decode_rows(
    raw: Raw, units: Mapping[UnitKind, int], needs: Iterable[Need], density: Density
) -> dict[str, Tensor]:
    """A batch from stored rows: inputs (R, n_taps, W) fp32, and per kind the scores (R, L, N) fp32
    and/or the labels ``<kind>_labels`` (R, L, N) bool, as ``needs`` says.

    Args:
        raw: as :func:`encode_rows` gives it.
        units: kind -> N.
        needs: labels, scores or both; ``bits`` rows have labels only.
        density: of the labels; for ``bits`` rows it must be the stored one (the caller checks).
    """
    batch = {"inputs": raw["inputs"].float()}
    for kind in KINDS:
        if f"{kind}_bits" in raw:
            batch[f"{kind}_labels"] = unpack_bits(raw[f"{kind}_bits"], units[kind])
            continue
        scores = decode_scores(raw[f"{kind}_codes"], raw[f"{kind}_peak"])
        add_targets(batch, kind, scores, needs, density)
    return batch


def add_targets(
    batch: dict[str, Tensor],
    kind: UnitKind,
    scores: Tensor,
    needs: Iterable[Need],
    density: Density,
) -> None:
    """Adds scores (R, L, N) and/or their labels to a batch."""
    if "scores" in needs:
        batch[kind] = scores
    if "labels" in needs:
        batch[f"{kind}_labels"] = top_k(scores, density_of(density, kind))
