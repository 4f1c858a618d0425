"""The CPU's C kernel of ``sketch_scores`` against double precision, and without a compiler."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gathered import poison
from gnomon.kernels import cpu_library, cpu_sketch
from gnomon.kernels.cpu_gather import MOST_ROWS
from gnomon.kernels.fewbit import PLANES, levels, pack, padded
from gnomon.kernels.sketch_scores import sketch_scores, sketch_scores_reference
from sketches import ACTIVATIONS, LIMIT, arguments, error
from tolerances import relative_rms

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    if cpu_library.library() is None:
        pytest.skip("no C compiler on this machine: the CPU path is the reference")
    yield


@pytest.mark.parametrize("linear", [0, *PLANES])
@pytest.mark.parametrize("inner", PLANES)
def test_every_pair_of_bits(inner: int, linear: int) -> None:
    for m, d, n in ((1, 1, 1), (1, 576, 20), (2, 33, 7), (3, 201, 17), (7, 64, 5), (8, 40, 3)):
        given = arguments(m, d, n, CPU, (inner, linear))
        poison(m, n, device=CPU)
        assert error(sketch_scores(**given), given) < LIMIT, (m, d, n)


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "plain"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, gated: bool, biases: bool) -> None:
    given = arguments(3, 90, 33, CPU, (2, 2 * gated), activation, biases)
    score = sketch_scores(**given)
    assert error(score, given) < LIMIT
    torch.testing.assert_close(score, sketch_scores_reference(**given), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_of_x(dtype: torch.dtype) -> None:
    given = arguments(2, 100, 18, CPU, (3, 2), dtype=dtype)
    assert error(sketch_scores(**given), given) < LIMIT


@pytest.mark.parametrize("bits", PLANES)
def test_padding_multiplies_nothing(bits: int) -> None:
    given = arguments(2, 13, 10, CPU, (bits, bits))
    expected = sketch_scores(**given)
    codes = (levels(given["inner"], bits, padded(13)) + (2**bits - 1) / 2).long()
    codes[:, 13:] = 2**bits - 1
    given["inner"] = pack(codes, bits)
    assert torch.equal(sketch_scores(**given), expected)


def test_strides_and_threads_change_nothing() -> None:
    given = arguments(2, 40, 97, CPU)
    expected = sketch_scores(**given)
    for name in ("x", "inner", "linear"):
        given[name] = given[name].T.contiguous().T
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(sketch_scores(**given), expected)
    finally:
        torch.set_num_threads(threads)


def test_a_wrong_result_is_caught() -> None:
    given = arguments(1, 40, 20, CPU)
    for wrong in (
        given | {"inner": given["linear"], "linear": given["inner"]},
        given | {"linear_bias": None},
        given | {"inner": given["inner"].roll(1, -1)},
    ):
        assert error(sketch_scores(**wrong), given) > 5e-3


def test_more_rows_take_the_reference() -> None:
    assert cpu_sketch.serving(torch.randn(MOST_ROWS, 8)) is not None
    for m in (0, MOST_ROWS + 1):
        given = arguments(m, 40, 9, CPU)
        assert cpu_sketch.serving(given["x"]) is None
        assert torch.equal(sketch_scores(**given), sketch_scores_reference(**given))


def test_without_a_compiler_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(1, 40, 9, CPU)
    compiled = sketch_scores(**given)
    monkeypatch.setenv("GNOMON_CPU_KERNELS", "0")
    cpu_library.library.cache_clear()
    try:
        assert torch.equal(sketch_scores(**given), sketch_scores_reference(**given))
    finally:
        cpu_library.library.cache_clear()
    assert relative_rms(compiled.exp(), sketch_scores_reference(**given).exp()) < LIMIT
