"""Compiles launches that read packed weights for a Hopper GPU, which takes none: run as a program.

The interpreter accepts what the compiler does not. Prints, for each launch, how many products and
sums keep denormals, how many (those of logarithms and activations) flush them, and how many
conversions of integers there are.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gnomon.kernels import (
    column_gemv,
    column_words,
    int4_down,
    int4_up,
    row_gemv,
    rowscaled_linear,
    sketch_gemv,
    sketched_gemv,
)
from gnomon.kernels.sketch_scores import sketch_scores_triton
from gnomon.kernels.sketched_ffn import sketched_ffn_triton
from sketches import arguments

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}
# Rows of x, inputs, bits, biases: three tiles to a row, two planes of part of a tile.
# Width costs seconds of compiling, and shows in nothing else.
LAUNCHES = [(1, 264, (4, 4), True), (4, 280, (3, 0), False)]


class Launches:
    """Stands for a kernel and compiles what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Launches:
        return self

    def __call__(self, *args: Any, num_warps: int, **constants: Any) -> None:
        given = dict(zip(self.kernel.arg_names, args, strict=False)) | constants | {"PDL": True}
        signature, fixed = {}, {}
        for name in self.kernel.arg_names:
            value = given[name]
            signature[name] = "constexpr"
            if name in constants or name == "PDL" or value is None:
                fixed[name] = value
            elif isinstance(value, Tensor):
                signature[name] = TYPES[value.dtype]
            else:
                signature[name] = "i32" if isinstance(value, int) else "fp32"
        pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
        aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
        source = ASTSource(self.kernel, signature, fixed, aligned)
        options = {"num_warps": num_warps, "launch_pdl": True}
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        sums = r"(?:fma\.rn|mul|add)(?:\.rn)?\.%s\s"
        plain, flushing = (len(re.findall(sums % kind, ptx)) for kind in ("f32", "ftz\\.f32"))
        conversions = len(re.findall(r"cvt\.rn\.f32\.[su]\d", ptx))
        sys.stdout.write(f"{self.kernel.__name__} {plain} {flushing} {conversions}\n")


def packed() -> None:
    """Launches with int8 and int4 weights."""
    for module, name in (
        (row_gemv, "_row_kernel"),
        (column_words, "_column_words_kernel"),
        (rowscaled_linear, "_rowscaled_gemv_kernel"),
        (int4_up, "_up_kernel"),
        (int4_down, "_down_kernel"),
    ):
        setattr(module, name, Launches(getattr(module, name)))
    none: tuple[None, None] = (None, None)
    x, h = torch.empty(2, 96), torch.empty(1, 200)
    weight, scale = torch.empty(200, 96, dtype=torch.int8), torch.empty(200)
    plain = (None, None, "none", 0.0, "silu", torch.float32, False)
    row_gemv.launch_rows(x, weight, weight, None, 1, None, (scale, scale), none, *plain)
    column_gemv.launch_columns(h, weight, None, 1, None, scale, None, None, torch.float32, False)
    rowscaled_linear.WORDS_FROM = 0
    rowscaled_linear.rowscaled_linear_triton(x, weight, scale, scale)
    codes = torch.empty(200, 48, dtype=torch.uint8)
    scales = torch.empty(200, 3, dtype=torch.float16)
    int4_up.launch_up(x, codes, scales, codes, scales, "silu", None, None)
    int4_down.launch_down(h, codes, scales, 96, None, None)


if __name__ == "__main__":
    sketch_gemv._sketch_kernel = Launches(sketch_gemv._sketch_kernel)
    sketched_gemv._sketched_kernel = Launches(sketched_gemv._sketched_kernel)
    for m, d, bits, biases in LAUNCHES:
        x = arguments(m, d, 40, torch.device("cpu"), bits, "silu", biases, torch.bfloat16)
        sketch_scores_triton(**x)
        weight = torch.empty(40, d, dtype=torch.bfloat16)
        gate = weight if bits[1] else None
        sketched_ffn_triton(cut=torch.zeros(1), up=weight, gate=gate, **x)
    packed()
