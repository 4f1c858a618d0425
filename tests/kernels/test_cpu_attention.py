"""The CPU's C attention against double precision and the reference, with every extra."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from attention import EXTRAS, SHAPES, SLOTS, arguments, in_double, one_rounding, run
from gnomon.kernels import cpu_library
from gnomon.kernels.cpu_attention import decode_attention
from gnomon.kernels.decode_attention import decode_attention_reference
from tolerances import TOLERANCE, relative_rms

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    if cpu_library.library() is None:
        pytest.skip("no C compiler on this machine: the CPU path is the reference")
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", SLOTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_is_the_reference(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    extra = {"shuffled": "norms", "some": "everything", "shared": "softcap"}.get(kind, "plain")
    given = arguments(shape, kind, dtype, extra, CPU)
    y, keys, values = run(decode_attention, given)
    expected, right_keys, right_values = run(decode_attention_reference, given)
    assert relative_rms(y, expected) < TOLERANCE[torch.float32 if dtype.itemsize == 4 else dtype]
    assert one_rounding(keys, right_keys) and torch.equal(values, right_values)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[6]])
def test_extras(shape: tuple[int, ...], extra: str) -> None:
    given = arguments(shape, "some", torch.float32, extra, CPU)
    assert relative_rms(run(decode_attention, given)[0], in_double(given)) < 1e-5


def test_steep_scores_and_long_caches() -> None:
    """The polynomial exponential over its whole range."""
    given = arguments((1, 2, 2, 64, 3000, 64), "all", torch.float32, "plain", CPU)
    for scale in (1e-3, 1.0, 30.0):
        steep = given | {"q": given["q"] * scale}
        assert relative_rms(run(decode_attention, steep)[0], in_double(steep)) < 1e-5


def test_dropped_groups_are_neither_written_nor_read() -> None:
    given = arguments((2, 3, 2, 16, 40, 16), "all", torch.float32, "plain", CPU)
    slot = torch.tensor([[-1, -1, 0, 1, 2, 3]], dtype=torch.int32)
    kept = torch.tensor([[-1, 1, 0]], dtype=torch.int32)  # in the order of no group in particular
    given |= {"slot": slot, "q": given["q"][:, : 4 * 16], "write": "active", "kv_slot": kept}
    given |= {f: given[f][:, : 2 * 16] for f in ("k_new", "v_new")}
    given["k_cache"][:, 0] = torch.nan
    found, expected = run(decode_attention, given), run(decode_attention_reference, given)
    assert relative_rms(found[0], expected[0]) < 1e-5
    assert bool(found[1][:, 0].isnan().all())
    assert torch.allclose(found[1][:, 1:], expected[1][:, 1:], atol=1e-6)
    assert torch.equal(found[2], expected[2])


def test_what_lies_beyond_the_length_is_not_read() -> None:
    given = arguments((2, 2, 2, 16, 40, 16), "all", torch.float32, "window", CPU, ends=(20, 11))
    clean = run(decode_attention, given)[0]
    for b, n in enumerate((20, 11)):
        for cache in ("k_cache", "v_cache"):
            given[cache][b, :, n:] = torch.nan
            given[cache][b, :, : n - 8] = torch.nan
    assert torch.equal(run(decode_attention, given)[0], clean)


def test_a_position_outside_the_cache_is_an_error() -> None:
    given = arguments((1, 1, 1, 4, 8, 0), "all", torch.float32, "plain", CPU)
    given["position"] = torch.tensor([8], dtype=torch.int32)
    with pytest.raises(IndexError, match="outside a cache of 8"):
        decode_attention(**given)
