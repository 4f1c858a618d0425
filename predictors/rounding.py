"""Rounds the rows of a linear to a few bits so that its *outputs* change least.

GPTQ (https://arxiv.org/abs/2210.17323), with one scale per row. With H = E[x xᵀ] of the linear's
input, the output error of a row w rounded to ŵ is (w − ŵ) H (w − ŵ)ᵀ. Columns are rounded in
order, and what a column loses is made up by those that follow:

    w_j' −= (w_i − ŵ_i) / U_ii · U_ij',    U the upper Cholesky factor of H⁻¹

Deviations: levels are half-integers (:mod:`gnomon.kernels.fewbit`), a row has one scale, which is
searched for the least error of the plain rounding and then fitted twice to the output error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BLOCK = 128  # columns between two updates of all that follow
DAMP = 0.01  # of the mean diagonal, added to H
SHARES = 15  # scales tried per row
FITS = 2


def output_error(weight: Tensor, rounded: Tensor, moments: Tensor) -> Tensor:
    """Mean square by which each row's output errs: (N, K) twice, mean x xᵀ (K, K) -> (N,)."""
    return _error((weight - rounded).double(), moments.double()).float()


def levels_of(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """What weights (..., N, K) round to at scales (..., N)."""
    return nearest(weight / scale[..., None], bits) * scale[..., None]


def nearest(x: Tensor, bits: int) -> Tensor:
    """The nearest level of x in units of the scale: half-integers up to ±(2^bits − 1) / 2."""
    half = 2 ** (bits - 1)
    return torch.floor(x).clamp(-half, half - 1) + 0.5


@torch.no_grad()
def round_rows(weight: Tensor, moments: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Rounds every row.

    Args:
        weight: (N, K).
        moments: (K, K) mean or sum of x xᵀ over calibration tokens.
        bits: of a code.

    Returns:
        Rows (N, K) fp32 as they were when each column was rounded, and their scales (N,) fp32:
        :func:`levels_of` them is the result, and training may begin from what they were.

    Raises:
        ValueError: moments that are not finite.
    """
    weight, h = weight.detach().float(), _damped(moments)
    factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True).float()
    h = h.float()
    scale = _least_error(weight, bits)
    best = _sweep(weight, factor, scale, bits)
    least = _error(weight - levels_of(best, scale, bits), h)
    for _ in range(FITS):
        turned = levels_of(best, scale, bits) / scale[:, None]
        fitted = ((weight @ h) * turned).sum(-1) / ((turned @ h) * turned).sum(-1)
        fitted = torch.where(fitted > 0, fitted, scale)
        found = _sweep(weight, factor, fitted, bits)
        error = _error(weight - levels_of(found, fitted, bits), h)
        better = error < least
        best = torch.where(better[:, None], found, best)
        scale, least = torch.where(better, fitted, scale), torch.where(better, error, least)
    return best, scale


@contextmanager
def _few_threads(device: torch.device) -> Iterator[None]:
    """One thread on a CPU: a column is too short for several, which only wait for each other."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _damped(moments: Tensor) -> Tensor:
    h = moments.double()
    if not bool(h.isfinite().all()):
        raise ValueError(
            "the inputs of a linear are not finite: load the host in float32 or bfloat16 "
            "(host.dtype)"
        )
    mean = h.diagonal().mean()
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    return eye if mean == 0 else h / mean + DAMP * eye


def _least_error(weight: Tensor, bits: int) -> Tensor:
    """The scale (N,) of every row at which rounding to the nearest level errs least."""
    top = (2**bits - 1) / 2
    peak = weight.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / top
    scale, least = peak, torch.full_like(peak, torch.inf)
    for share in torch.linspace(0.3, 1.0, SHARES).tolist():
        tried = (peak * share)[:, None]
        error = (nearest(weight / tried, bits) * tried - weight).square().sum(-1)
        scale = torch.where(error < least, tried[:, 0], scale)
        least = torch.minimum(least, error)
    return scale


def _sweep(weight: Tensor, factor: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Columns one after another, each with what those before it lost in rounding."""
    # (K, N): a column lies in one piece. A copy: of a linear stored turned this is the host's own.
    left = weight.T.clone(memory_format=torch.contiguous_format)
    with _few_threads(weight.device):
        for first in range(0, len(left), BLOCK):
            stop = min(first + BLOCK, len(left))
            block, lost = left[first:stop], torch.empty_like(left[first:stop])
            own = factor[first:stop, first:stop]
            for j, column in enumerate(block):
                lost[j] = (column - nearest(column / scale, bits) * scale) / own[j, j]
                block[j + 1 :].addr_(own[j, j + 1 :], lost[j], alpha=-1)
            left[stop:].addmm_(factor[first:stop, stop:].T, lost, alpha=-1)
    return left.T.contiguous()


def _error(difference: Tensor, h: Tensor) -> Tensor:
    """Output error (N,) of rows that differ by so much."""
    return ((difference @ h) * difference).sum(-1)
