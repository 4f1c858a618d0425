"""Attention of a decode step: reference against double precision, kernel against reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attention import EXTRAS, SHAPES, SLOTS, arguments, in_double, one_rounding, run, slots
from gathered import poison
from gnomon.kernels import decode_attention as module
from gnomon.kernels.attention_launch import Plan, launch, plan
from gnomon.kernels.decode_attention import (
    decode_attention,
    decode_attention_reference,
    decode_attention_triton,
)
from gnomon.kernels.launch import tickets
from tolerances import TOLERANCE, relative_rms


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("kind", SLOTS)
def test_reference_in_double_precision(
    kind: str, extra: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments((2, 3, 2, 20, 70, 8), kind, torch.float32, extra, device)
    y, keys, values = run(decode_attention_reference, given)
    assert relative_rms(y, in_double(given)) < TOLERANCE[torch.float32]
    monkeypatch.setattr(module, "_attend_sliced", module._attend_masked)  # what a GPU runs
    z, other_keys, other_values = run(decode_attention_reference, given)
    assert relative_rms(z, y) < TOLERANCE[torch.float32]
    assert torch.equal(keys, other_keys) and torch.equal(values, other_values)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, torch.float32) for kind in SLOTS]
    + [("all", torch.bfloat16), ("some", torch.bfloat16), ("shuffled", torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_is_the_reference(
    shape: tuple[int, ...], kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    extra = {"shuffled": "norms", "some": "everything", "shared": "softcap"}.get(kind, "plain")
    given = arguments(shape, kind, dtype, extra, device)
    poison(*given["q"].shape, device=device)
    y, keys, values = run(decode_attention_triton, given)
    expected, right_keys, right_values = run(decode_attention_reference, given)
    assert relative_rms(y, expected) < TOLERANCE[dtype]
    assert one_rounding(keys, right_keys) and torch.equal(values, right_values)
    assert not tickets(device).any()


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[6]])
def test_extras_in_the_kernel(shape: tuple[int, ...], extra: str, device: torch.device) -> None:
    given = arguments(shape, "some", torch.float32, extra, device)
    y, expected = run(decode_attention_triton, given)[0], in_double(given)
    assert relative_rms(y, expected) < TOLERANCE[torch.float32]


def planned(chosen: Plan, **given: Any) -> Tensor:
    """The kernel with its tiles and splits chosen by the test."""
    fields = ("q", "k_new", "v_new", "k_cache", "v_cache", "position", "slot", "cos", "sin")
    norms = (given.get("q_norm"), given.get("k_norm"), given.get("eps", 1e-6))
    rest = (given["k_cache"].shape[3] ** -0.5, 0, 0.0, None, None, None, torch.float32, False)
    return launch(*(given.get(f) for f in fields), *norms, *rest, chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[5:9])
def test_tensor_cores(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """The path of large batches, for groups that small launches sum in registers."""
    given = arguments(shape, "some", dtype, "norms", device)
    y = run(planned, given, chosen=Plan(16, 3, 4, 3, dot=True))[0]
    assert relative_rms(y, run(decode_attention_reference, given)[0]) < TOLERANCE[dtype]


@pytest.mark.parametrize("ends", [(0, 1), (15, 16), (17, 69), (69, 0)], ids=str)
@pytest.mark.parametrize("group", [1, 2])
def test_lengths_and_splits(group: int, ends: tuple[int, ...], device: torch.device) -> None:
    """However the tokens are split, the result is the same, and the same again."""
    given = arguments((2, 2, group, 20, 70, 20), "some", torch.float32, "plain", device, ends)
    expected = run(decode_attention_reference, given)[0]
    for chosen in (
        Plan(16, 1, 4, 1),
        Plan(32, 3, 4, 2),
        Plan(16, 2, 4, 3),
        Plan(16, 9, 4, 1),
        Plan(64, 2, 4, 1, dot=True),
        Plan(32, 3, 4, 2, dot=True),
    ):
        own = {"chosen": chosen}
        y = run(planned, given, **own)[0]
        assert relative_rms(y, expected) < TOLERANCE[torch.float32]
        if device.type == "cuda" or chosen.splits == 3:  # the interpreter has one order
            assert torch.equal(run(planned, given, **own)[0], y)
        assert not tickets(device).any()


@pytest.mark.parametrize("group", [1, 3])
def test_what_is_not_attended_is_not_read(group: int, device: torch.device) -> None:
    """NaN in skipped groups, after the length, outside the window and in padding is harmless."""
    given = arguments((2, 4, group, 20, 70, 20), "some", torch.float32, "window", device, (60, 20))
    given["slot"] = torch.full((2, 4 * group), -1, dtype=torch.int32, device=device)
    given["slot"][0, 2 * group], given["slot"][1, 0], given["slot"][1, -1] = 1, 1, 0
    given["slot"][0, 0] = 0
    given["first"] = torch.tensor([0, 15], dtype=torch.int32, device=device)
    given["q"] = torch.randn(2, 40, device=device)
    clean = [run(op, given)[0] for op in (decode_attention_reference, decode_attention_triton)]
    for cache in (given["k_cache"], given["v_cache"]):
        cache[0, [1, 3]] = cache[1, [1, 2]] = torch.nan
        cache[0, :, :52] = cache[1, :, :15] = cache[0, :, 60:] = cache[1, :, 20:] = torch.nan
    for op, expected in zip(
        (decode_attention_reference, decode_attention_triton), clean, strict=True
    ):
        assert torch.equal(run(op, given)[0], expected)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("group", [1, 2])
def test_dropped_groups_are_not_written(group: int, shared: bool, device: torch.device) -> None:
    """With ``write="active"`` keys come compact, and absent groups' caches keep what they held."""
    given = arguments((2, 3, group, 20, 70, 20), "all", torch.bfloat16, "norms", device)
    kv_slot = torch.tensor([[1, -1, 0], [-1, 0, -1]], dtype=torch.int32)[: 1 if shared else 2]
    slot = kv_slot.repeat_interleave(group, 1)
    slot = torch.where(slot >= 0, slot * group + torch.arange(3 * group) % group, -1).int()
    d = given["k_cache"].shape[-1]
    given |= {"kv_slot": kv_slot.to(device), "slot": slot.to(device), "write": "active"}
    for field, n in (("q", 2 * group), ("k_new", 2), ("v_new", 2)):
        given[field] = torch.randn(2, n * d, device=device).bfloat16().float()
    y, keys, values = run(decode_attention_reference, given)
    z, other_keys, other_values = run(decode_attention_triton, given)
    assert relative_rms(z, y) < TOLERANCE[torch.bfloat16]
    assert one_rounding(other_keys, keys) and torch.equal(other_values, values)
    full = given | {"write": "all", "kv_slot": None}
    for field in ("k_new", "v_new"):
        rows = torch.zeros(2, 3, d, device=device)
        for b, places in enumerate(kv_slot.expand(2, -1).tolist()):
            for g, place in enumerate(places):
                if place >= 0:
                    rows[b, g] = given[field].view(2, 2, d)[b, place]
        full[field] = rows.flatten(1)
    assert relative_rms(y, in_double(full)) < TOLERANCE[torch.bfloat16]
    absent = (kv_slot.expand(2, -1) < 0).to(device)
    assert torch.equal(keys[absent], given["k_cache"][absent])


def test_slices_dtypes_and_registration(device: torch.device) -> None:
    """q, k and v as slices of one fused projection, in the cache's dtype."""
    given = arguments((2, 3, 2, 20, 70, 20), "shared", torch.bfloat16, "plain", device)
    fused = torch.randn(2, 9 * 20, device=device).bfloat16()
    given["q"], given["k_new"], given["v_new"] = fused[:, :60], fused[:, 60:120], fused[:, 120:]
    y, keys, _ = run(decode_attention_triton, given)
    assert y.dtype == torch.bfloat16
    z, other_keys, _ = run(decode_attention, given, out_dtype=torch.float32)
    assert z.dtype == torch.float32 and relative_rms(y, z) < 2 * TOLERANCE[torch.bfloat16]
    assert one_rounding(keys, other_keys)
    torch.library.opcheck(
        decode_attention, (), arguments((2, 3, 1, 4, 9, 4), "all", torch.float32, "first", device)
    )


def test_no_head_of_a_long_cache(device: torch.device) -> None:
    """A skipped attention sublayer still stores the new keys and values."""
    given = arguments((1, 2, 1, 64, 5000, 64), "none", torch.bfloat16, "plain", device)
    y, keys, values = run(decode_attention_triton, given)
    _, right_keys, right_values = run(decode_attention_reference, given)
    assert y.shape == (1, 0)
    assert one_rounding(keys, right_keys) and torch.equal(values, right_values)


def test_a_wrong_result_is_caught(device: torch.device) -> None:
    """A kernel that overlooks a setting, a place or the new token does not pass."""
    given = arguments((2, 3, 2, 20, 70, 20), "shuffled", torch.float32, "everything", device)
    expected = run(decode_attention_reference, given)[0]
    for wrong in (
        {"window": 39},
        {"softcap": 0.0},
        {"first": None, "window": 0},
        {"alibi": None},
        {"k_norm": None},
        {"cos": None, "sin": None},
        {"position": given["position"] - 1},
        {"slot": given["slot"].flip(1).contiguous()},
        {"v_new": torch.zeros_like(given["v_new"])},
    ):
        assert relative_rms(run(decode_attention_triton, given, **wrong)[0], expected) > 1e-3


def test_plan_fills_the_processors() -> None:
    cpu = torch.device("cpu")  # counted as four processors
    assert plan(1, 2048, 128, 2, 1, cpu) == Plan(128, 16, 8, 1, dot=True)  # a tile a program
    assert plan(1, 200, 128, 2, 1, cpu) == Plan(32, 7, 8, 1, dot=True)
    assert plan(1, 16384, 128, 2, 1, cpu).splits == 64  # several tiles a program
    assert plan(64, 4096, 128, 2, 1, cpu).splits == 1
    assert plan(0, 64, 128, 2, 1, cpu).splits == plan(0, 8192, 128, 2, 1, cpu).splits == 1
    assert plan(4, 4096, 256, 4, 4, cpu).block_t == 16
    assert not plan(1, 64, 128, 4, 1, cpu).dot


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("write", "some", "write='some' is unknown"),
        ("write", "active", "use both or neither"),
        ("position", torch.zeros(2, dtype=torch.int64), "use int32"),
        ("slot", torch.zeros(2, 5, dtype=torch.int32), "5 heads"),
        ("slot", torch.zeros(2, 6), "slot is torch.float32"),
        ("q", torch.zeros(2, 50), "heads"),
        ("k_new", torch.zeros(2, 20), "k_new is"),
        ("v_cache", torch.zeros(2, 3, 70, 21), "of one dtype"),
        ("sin", None, "both be"),
        ("alibi", torch.zeros(4), "for 6 heads"),
    ],
)
def test_bad_arguments(field: str, value: Any, message: str) -> None:
    cpu = torch.device("cpu")
    given = arguments((2, 3, 2, 20, 70, 20), "some", torch.float32, "plain", cpu)
    for op in (decode_attention_reference, decode_attention_triton):
        with pytest.raises(ValueError, match=message):
            op(**(given | {field: value}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("group", [1, 4])
def test_replays_of_one_graph(group: int) -> None:
    """A captured launch follows position and slot on the device, with both splits and merge."""
    device = torch.device("cuda")
    shape = (2, 8, group, 128, 1024, 128)
    given = arguments(shape, "some", torch.bfloat16, "plain", device, (5, 900))
    decode_attention(**given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = decode_attention(**given)
    for ends in ((17, 1000), (1023, 0), (300, 301)):
        given["position"].copy_(torch.tensor(ends, dtype=torch.int32))
        given["slot"].copy_(slots("some", 2, 8 * group)[0])
        expected = run(decode_attention_reference, given)[0]
        graph.replay()
        held = (given["slot"] >= 0).sum(1, keepdim=True) * 128
        y_held = torch.where(torch.arange(y.shape[1], device=device) < held, y, 0)
        assert relative_rms(y_held, expected) < TOLERANCE[torch.bfloat16]
        assert not tickets(device).any()
