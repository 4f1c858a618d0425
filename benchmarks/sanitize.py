"""Every Triton kernel once on small odd shapes, for compute-sanitizer; results are checked too.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitize.py
compute-sanitizer --tool racecheck python benchmarks/sanitize.py
compute-sanitizer --tool racecheck python benchmarks/sanitize.py int4 rest
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from gnomon.kernels.column_gather import column_gather_reference, column_gather_triton
from gnomon.kernels.compact import compact_mask_reference, compact_mask_triton, slots_triton
from gnomon.kernels.decode_attention import decode_attention_reference, decode_attention_triton
from gnomon.kernels.fewbit import pack
from gnomon.kernels.gathered_ffn import ffn_up, ffn_up_triton
from gnomon.kernels.int4_ffn import (
    int4_ffn_down_reference,
    int4_ffn_down_triton,
    int4_ffn_up_reference,
    int4_ffn_up_triton,
)
from gnomon.kernels.norm_add import norm_add_reference, norm_add_triton
from gnomon.kernels.row_gather import row_gather_reference, row_gather_triton
from gnomon.kernels.rowscaled_linear import (
    quantize_rows,
    rowscaled_linear,
    rowscaled_linear_reference,
)
from gnomon.kernels.select import select_topk
from gnomon.kernels.sketch_scores import sketch_scores_reference, sketch_scores_triton
from gnomon.kernels.sketched_ffn import sketched_ffn_reference, sketched_ffn_triton
from gnomon.kernels.threshold_ffn import threshold_ffn_reference, threshold_ffn_triton
from gnomon.kernels.threshold_gemv import threshold_gemv, threshold_gemv_reference
from gnomon.policies.compressed import compress

DEVICE = torch.device("cuda")
TOLERANCE = 2e-2  # bf16 caches and weights; a stray read or write is far off, or NaN


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Standard normal numbers on the GPU."""
    return torch.randn(*shape, device=DEVICE).to(dtype)


def check(name: str, run: Callable[[], Tensor], reference: Callable[[], Tensor]) -> None:
    """Runs both and compares them."""
    y, expected = run().double(), reference().double()
    error = float((y - expected).norm() / expected.norm())
    print(f"{name:28s} {error:.1e}", flush=True)
    if not error < TOLERANCE:
        raise SystemExit(f"{name} differs from its reference by {error:.1e}")


def gathers(batch: int) -> None:
    """Rows, columns and the FFN's first half, with lists shorter than their capacity."""
    w, x = randn(300, 200), randn(batch, 200, dtype=torch.float32)
    index = torch.randperm(300, device=DEVICE)[:77].int()
    count = torch.tensor([70], dtype=torch.int32, device=DEVICE)
    held = 70
    check(
        f"row_gather batch {batch}",
        lambda: row_gather_triton(x, w, index, 1, count)[:, :held],
        lambda: row_gather_reference(x, w, index, 1, count)[:, :held],
    )
    check(
        f"ffn_up batch {batch}",
        lambda: ffn_up_triton(x, w, w, index, count, "silu")[:, :held],
        lambda: ffn_up(x.cpu(), w.cpu(), w.cpu(), index.cpu(), count.cpu(), "silu")[:, :held].to(
            DEVICE
        ),
    )
    h = randn(batch, 77, dtype=torch.float32)
    q, steps = quantize_rows(w.float())
    check(
        f"row_gather batch {batch} int8",
        lambda: row_gather_triton(x, q, index, 1, count, steps)[:, :held],
        lambda: row_gather_reference(x, q, index, 1, count, steps)[:, :held],
    )
    for weights, scale in ((w, None), (q, steps)):
        check(
            f"column_gather batch {batch} {str(weights.dtype)[6:]}",
            lambda w=weights, s=scale: column_gather_triton(h, w, index, 1, count, s),
            lambda w=weights, s=scale: column_gather_reference(h, w, index, 1, count, s),
        )


def wanted(batch: int) -> None:
    """Passes over whole weights that leave units out, the first 20 of which are read anyway."""
    w, x = randn(300, 200), randn(batch, 200, dtype=torch.float32)
    keep = torch.rand(280, device=DEVICE) < 0.5
    check(
        f"rows wanted batch {batch}",
        lambda: row_gather_triton(x, w, wanted=keep),
        lambda: row_gather_reference(x, w, wanted=keep),
    )
    h = randn(batch, 300, dtype=torch.float32)
    check(
        f"columns wanted batch {batch}",
        lambda: column_gather_triton(h, w, wanted=keep),
        lambda: column_gather_reference(h, w, wanted=keep),
    )


def attention(group: int, capacity: int, dtype: torch.dtype) -> None:
    """A tile per program and several, shared groups and single heads."""
    batch, groups, d = 2, 3, 64
    caches = [randn(batch, groups, capacity, d, dtype=dtype) for _ in range(2)]
    slot = torch.full((batch, groups * group), -1, dtype=torch.int32, device=DEVICE)
    slot[:, ::2] = torch.arange(slot[:, ::2].shape[1], dtype=torch.int32, device=DEVICE)
    q = randn(batch, slot[:, ::2].shape[1] * d, dtype=torch.float32)
    new = randn(batch, groups * d, dtype=torch.float32)
    position = torch.tensor([capacity - 1, 17], dtype=torch.int32, device=DEVICE)
    args = (q, new, new)
    check(
        f"attention {group} {capacity} {str(dtype)[6:]}",
        lambda: decode_attention_triton(*args, *(c.clone() for c in caches), position, slot),
        lambda: decode_attention_reference(*args, *(c.clone() for c in caches), position, slot),
    )


def selections() -> None:
    """Top-k, masks and places."""
    scores = randn(3, 700, dtype=torch.float32)
    check(
        "select_topk",
        lambda: select_topk(scores, 33, 33)[0],
        lambda: scores.topk(33).indices.sort(-1).values,
    )
    mask = scores > 0.3
    longest = int(mask.sum(-1).max())
    index, count = compact_mask_triton(mask, longest)
    expected = compact_mask_reference(mask, longest)[0]
    held = torch.arange(longest, device=DEVICE) < count[:, None]
    check("compact_mask", lambda: index * held, lambda: expected * held)
    check("slots", lambda: slots_triton(index, count, 700) >= 0, lambda: mask)


def sketches(rows: int, width: int, bits: tuple[int, int]) -> None:
    """Scores from few-bit copies, gated and, with no bits for the second, not."""
    x, offset = randn(rows, width), randn(301, dtype=torch.float32)

    def copy(b: int) -> tuple[Tensor | None, Tensor | None, int]:
        if b == 0:
            return None, None, 0
        codes = torch.randint(0, 2**b, (301, width), device=DEVICE)
        return pack(codes, b), torch.full((301,), width**-0.5, device=DEVICE), b

    args = (x, *copy(bits[0]), "silu", offset, *copy(bits[1]), offset)
    check(
        f"sketch_scores {rows} {width} {bits}",
        lambda: sketch_scores_triton(*args).exp(),
        lambda: sketch_scores_reference(*args).exp(),
    )
    ordered = sketch_scores_reference(*args).flatten().sort().values
    up, gate = randn(301, width), randn(301, width) if bits[1] else None
    weights = (x, ordered[len(ordered) // 2 :][:2].mean()[None], up, gate)
    check(
        f"sketched_ffn {rows} {width} {bits}",
        lambda: sketched_ffn_triton(*weights, *args[1:])[0],
        lambda: sketched_ffn_reference(*weights, *args[1:])[0],
    )


def int4(rows: int, width: int, neurons: int = 301) -> None:
    """Both halves of an FFN of int4 rows."""

    def stored(n: int) -> tuple[Tensor, Tensor]:
        found = compress(torch.randn(n, width) / width**0.5, "int4").tensors
        return found["codes"].to(DEVICE), found["scale"].to(DEVICE)

    x, h = randn(rows, width, dtype=torch.float32), randn(rows, neurons, dtype=torch.float32)
    pair = (*stored(neurons), *stored(neurons))
    check(
        f"int4_ffn_up {rows} {width}",
        lambda: int4_ffn_up_triton(x, *pair, activation="silu"),
        lambda: int4_ffn_up_reference(x, *pair, activation="silu"),
    )
    down = stored(neurons)
    check(
        f"int4_ffn_down {rows} {width}",
        lambda: int4_ffn_down_triton(h, *down, width),
        lambda: int4_ffn_down_reference(h, *down, width),
    )


def rest() -> None:
    """Norm, row-scaled and threshold products."""
    x, gain = randn(2, 200, dtype=torch.float32), randn(200, dtype=torch.float32)
    check(
        "norm_add",
        lambda: norm_add_triton(x, gain, None, "rms", 1e-6),
        lambda: norm_add_reference(x, gain, None, "rms", 1e-6),
    )
    for outputs in (300, 4100):
        q, scale = quantize_rows(randn(outputs, 200, dtype=torch.float32))
        check(
            f"rowscaled_linear {outputs}",
            lambda q=q, s=scale: rowscaled_linear(x, q, s),
            lambda q=q, s=scale: rowscaled_linear_reference(x, q, s),
        )
    w, cut = randn(200, 300), torch.full((200,), 0.4, device=DEVICE)
    check(
        "threshold_gemv",
        lambda: threshold_gemv(x, w, cut),
        lambda: threshold_gemv_reference(x, w, cut),
    )
    pair = (w, randn(200, 300), cut, "silu")
    check(
        "threshold_ffn",
        lambda: threshold_ffn_triton(x, *pair),
        lambda: threshold_ffn_reference(x, *pair),
    )


def long() -> None:
    """Walks of several steps and sums of several splits, which small shapes have none of."""
    x, w = randn(1, 64, dtype=torch.float32), randn(60000, 64)
    q, scale = quantize_rows(w.float())
    for weights, steps in ((w, None), (q, scale)):
        kind = str(weights.dtype)[6:]
        check(
            f"rows of several steps {kind}",
            lambda w=weights, s=steps: row_gather_triton(x, w, scale=s),
            lambda w=weights, s=steps: row_gather_reference(x, w, scale=s),
        )
        h = randn(1, 60000, dtype=torch.float32)
        check(
            f"columns of several steps {kind}",
            lambda w=weights, s=steps, h=h: column_gather_triton(h, w, scale=s),
            lambda w=weights, s=steps, h=h: column_gather_reference(h, w, scale=s),
        )
    int4(1, 200, 9000)


def main(parts: list[str]) -> None:
    """Runs the parts that are named, or all of them."""
    torch.manual_seed(0)
    every: dict[str, Callable[[], object]] = {
        "gathers": lambda: [part(batch) for batch in (1, 3, 8) for part in (gathers, wanted)],
        "attention": lambda: (
            [attention(g, c, torch.bfloat16) for g in (1, 4) for c in (45, 5000)]
            + [attention(2, 300, torch.float32)]
        ),
        "selections": selections,
        "sketches": lambda: [
            sketches(rows, width, bits)
            for rows in (1, 3, 5)
            for width, bits in ((201, (2, 2)), (576, (3, 1)), (4096, (4, 0)))
        ],
        "int4": lambda: [int4(*shape) for shape in ((1, 200), (3, 1536), (5, 72))],
        "rest": rest,
        "long": long,
    }
    if unknown := set(parts) - set(every):
        raise SystemExit(f"{', '.join(sorted(unknown))}: use {', '.join(every)}")
    for name in parts or every:
        every[name]()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1:])
