"""Weights of 16, 8 and 4 bits as words of 32: how a thread loads and unpacks them.

A thread loads four words at once and has them as fp32 without moving them to another thread, which
Triton would do for a tile of bf16, of which it loads eight at once, beside fp32, of which it loads
four. Halves of a word are bf16 or fp16. Bytes and half bytes become floats without a shift and
without a conversion, which has an eighth of an FMA's rate: masked where it lies, a field of a
word's lower 24 bits is c · 2^place · 2^-149, a denormal or a number of the lowest exponent. It
multiplies x · 2^64, and the sum is scaled back by 2^(85 - place). The upper byte is moved down by
8 first. Codes are unsigned: int8 has its sign bit turned, which adds 128, and what an offset adds
to a product is taken off once, as offset · Σ x.

Nothing may flush denormals. |x| is below 2^63, and an infinite x gives NaN. A sum errs by some
2^-64 where its products are smaller than 2^-41, and by fp32's precision of offset · Σ x otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton ships for Linux only; the references need nothing
    triton = None

KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}


def packing(*weights: Tensor) -> str:
    """How rows are loaded: words of ``bf16``, ``fp16`` or ``int8``, or ``none``, one by one.

    Words begin at addresses of four bytes and hold whole rows; all matrices have one type.
    """
    kind = KINDS.get(weights[0].dtype, "none")
    if kind == "none" or len({w.dtype for w in weights}) > 1:
        return "none"
    per = per_word(weights[0], kind)
    places = (w.storage_offset() % per + w.data_ptr() % 4 + w.shape[-1] % per for w in weights)
    return "none" if any(places) else kind


def per_word(weight: Tensor, kind: str) -> int:
    """Weights of what is loaded at once."""
    return 1 if kind == "none" else 4 // weight.element_size()


def words(weight: Tensor, kind: str) -> Tensor:
    """The rows as they are loaded: (N, W), or words (N, W · size / 4) int32."""
    return weight if kind == "none" else weight.view(torch.int32)


if triton is not None:

    @triton.jit
    def _field(words, I: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: E741
        """Field I of words: fp32, c · 2^place · 2^-149."""
        HIGH: tl.constexpr = (I + 1) * BITS > 24
        FIELD: tl.constexpr = ((1 << BITS) - 1) << (I * BITS - 8 * HIGH)
        if HIGH:
            words = words >> 8
        return (words & FIELD).to(tl.float32, bitcast=True)

    @triton.jit
    def _power(I: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: E741
        """2^-place of field I."""
        return 2.0 ** (8 * ((I + 1) * BITS > 24) - I * BITS)

    @triton.jit
    def _numbers(w, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
        """fp32 of loaded weights; of words one tensor for every place in them, bytes as fields."""
        if KIND == "bf16":
            even = (w << 16).to(tl.float32, bitcast=True)
            return even, (w & -65536).to(tl.float32, bitcast=True)
        elif KIND == "fp16":
            even = w.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            return even, (w >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        elif KIND == "int8":
            w = w ^ -0x7F7F7F80  # the sign bits
            return _field(w, 0, 8), _field(w, 1, 8), _field(w, 2, 8), _field(w, 3, 8)
        else:
            return (w.to(tl.float32),)

    @triton.jit
    def _halves(x):  # type: ignore[no-untyped-def]
        return tl.split(tl.reshape(x, (x.shape[0] // 2, 2)))

    @triton.jit
    def _places(x, LEVELS: tl.constexpr):  # type: ignore[no-untyped-def]
        """x (K,) -> what each of the 2^LEVELS places in a word multiplies, (K / 2^LEVELS,)."""
        parts = (x,)
        for _ in tl.static_range(LEVELS):
            low, high = (), ()
            for p in tl.static_range(len(parts)):
                even, odd = _halves(parts[p])
                low += (even,)  # type: ignore[assignment]
                high += (odd,)  # type: ignore[assignment]
            parts = low + high  # type: ignore[assignment]
        return parts

    @triton.jit
    def _woven(parts):  # type: ignore[no-untyped-def]
        """Of each place in a word (N, K) -> (N, K · places), in the order of the weights."""
        shape: tl.constexpr = parts[0].shape
        WIDE: tl.constexpr = shape[1] * len(parts)
        for _ in tl.static_range(len(parts).bit_length() - 1):
            found = ()
            for i in tl.static_range(len(parts) // 2):
                found += (tl.join(parts[i], parts[i + len(parts) // 2]),)  # type: ignore[assignment]
            parts = found
        return tl.reshape(parts[0], (shape[0], WIDE))

    @triton.jit
    def _factors(x, KIND: tl.constexpr, EACH: tl.constexpr):  # type: ignore[no-untyped-def]
        """What each place in a word multiplies, of x (K,): EACH of (K / EACH,)."""
        if KIND == "int8":
            x *= 2.0**64
        parts = _places(x, EACH.bit_length() - 1)
        found = ()
        for i in tl.static_range(EACH):
            if KIND == "int8":
                found += (parts[i] * _power(i, 8),)  # type: ignore[assignment]
            else:
                found += (parts[i],)  # type: ignore[assignment]
        return found

    @triton.jit
    def _products(numbers, xs, m: tl.constexpr, EACH: tl.constexpr):  # type: ignore[no-untyped-def]
        """What rows of weights times sequence m of x sum: (ROWS, WORDS)."""
        y = numbers[0] * xs[m * EACH][None, :]
        for i in tl.static_range(1, EACH):
            y += numbers[i] * xs[m * EACH + i][None, :]
        return y
