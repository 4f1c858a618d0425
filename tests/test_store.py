"""Codes within their stated error, and a store that says what is wrong with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gnomon.data import store as store_module
from gnomon.data.codes import (
    decode_rows,
    decode_scores,
    encode_rows,
    encode_scores,
    kept,
    pack_bits,
    top_k,
    unpack_bits,
)
from gnomon.data.criteria import criterion
from gnomon.data.harvest import harvest
from gnomon.data.sources import SyntheticText
from gnomon.data.store import TraceStore
from gnomon.host import KINDS, Tap, describe
from gnomon.tiny import tiny_host


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, tokenizer = tiny_host()
    out = tmp_path_factory.mktemp("traces") / "store"
    text = SyntheticText(block=32, tokens=1024)
    taps = [Tap(1)]
    harvest(
        model,
        tokenizer,
        describe(model),
        text,
        criterion("plainact"),
        taps,
        out,
        heldout_tokens=256,
        progress=False,
    )
    return out


@pytest.fixture
def folder(complete: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(complete, tmp_path / "copy"))


@pytest.mark.parametrize("shape", [(64, 3, 48), (5, 1, 1), (7, 2, 33)], ids=str)
@pytest.mark.parametrize("power", [1, 6], ids=["even", "heavy-tailed"])
def test_int8_error_is_within_the_bound(shape: tuple[int, ...], power: int) -> None:
    scores = torch.rand(shape) ** power * torch.rand(shape[:-1])[..., None] * 1e3
    codes, peak = encode_scores(scores)
    assert codes.dtype == torch.uint8 and peak.shape == shape[:-1]
    error = (decode_scores(codes, peak) - scores).abs()
    m = peak[..., None]
    assert (error <= (scores * m).sqrt() / 255 + m / 260100 + 1e-6 * m).all()
    assert (error <= m / 255).all()


def test_int8_keeps_order_zeros_and_extremes() -> None:
    scores = torch.rand(50, 2, 40).sort(dim=-1).values
    scores[0] = 0
    scores[1, 0, -1] = 1e-30
    scores[1, 0, :-1] = 0
    decoded = decode_scores(*encode_scores(scores))
    assert (decoded.diff(dim=-1) >= 0).all()
    assert decoded[0].eq(0).all()
    torch.testing.assert_close(decoded.amax(-1), scores.amax(-1))


@pytest.mark.parametrize("units", [1, 7, 8, 9, 48])
def test_bits_round_trip(units: int) -> None:
    mask = torch.rand(20, 3, units) > 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8 and packed.shape[-1] == -(-units // 8)
    assert torch.equal(unpack_bits(packed, units), mask)


@pytest.mark.parametrize(("density", "units", "expected"), [
    (0.5, 48, 24), (0.01, 48, 1), (1.0, 9, 9), (0.3, 9, 3)])  # fmt: skip
def test_top_k_keeps_that_many(density: float, units: int, expected: int) -> None:
    scores = torch.rand(11, 2, units)
    labels = top_k(scores, density)
    assert kept(density, units) == expected
    assert labels.sum(-1).eq(expected).all()
    if expected < units:
        worst_kept = scores.masked_fill(~labels, 2).amin(-1)
        assert (worst_kept >= scores.masked_fill(labels, -1).amax(-1)).all()


@pytest.mark.parametrize("format", ["int8", "bits"])
def test_rows_round_trip(format: Any) -> None:
    inputs = torch.randn(9, 2, 16)
    scores = {"heads": torch.rand(9, 3, 4), "neurons": torch.rand(9, 3, 21)}
    raw = encode_rows(inputs, scores, format, {"heads": 0.5, "neurons": 0.3}, torch.float16)
    density = {"heads": 0.5, "neurons": 0.3}
    batch = decode_rows(raw, {"heads": 4, "neurons": 21}, {"labels"}, density)
    assert set(batch) == {"inputs", "heads_labels", "neurons_labels"}
    torch.testing.assert_close(batch["inputs"], inputs.half().float())
    for kind in KINDS:
        right = batch[f"{kind}_labels"] == top_k(scores[kind], density[kind])
        assert right.float().mean() > (0.98 if format == "int8" else 0.9999)


def test_inputs_that_do_not_fit_are_an_error() -> None:
    scores = {"heads": torch.rand(1, 1, 2), "neurons": torch.rand(1, 1, 2)}
    big = torch.full((1, 1, 4), 1e6)
    with pytest.raises(ValueError, match="harvest.input_dtype=bfloat16"):
        encode_rows(big, scores, "int8", 0.5, torch.float16)
    encode_rows(big, scores, "int8", 0.5, torch.bfloat16)


def test_open_complete(complete: Path) -> None:
    store = TraceStore.open(complete, describe(tiny_host()[0]))
    assert store.rows("train") == 32 * 31 and store.rows("heldout") == 8 * 31
    assert store.taps == (Tap(1),)
    assert store.format == "int8" and store.label_density is None
    pieces = list(store.iterate("train"))
    assert sum(len(p["inputs"]) for p in pieces) == store.rows("train")
    assert not list(complete.glob("*.tmp")) and not list(complete.glob("part-*"))


def test_hash_has_no_time_path_or_version(complete: Path, folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert "time" in manifest["run"] and "versions" in manifest["run"]
    assert TraceStore.open(folder).hash == TraceStore.open(complete).hash
    text = json.dumps({k: v for k, v in manifest.items() if k != "run"})
    assert str(complete) not in text and str(complete.parent) not in text


def _spoil(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["train-00000.safetensors", "heldout-00000.safetensors",
                                  "means.safetensors"])  # fmt: skip
def test_a_changed_byte(folder: Path, name: str) -> None:
    _spoil(folder / name, -1)
    with pytest.raises(ValueError, match=f"{name} is not what was harvested"):
        TraceStore.open(folder)


def test_a_changed_byte_in_a_large_store_is_seen_when_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_EAGER", 0)
    _spoil(folder / "train-00001.safetensors", -1)
    store = TraceStore.open(folder)
    store.read(store.shards("train")[0])
    with pytest.raises(ValueError, match="train-00001.safetensors is not what was harvested"):
        list(store.iterate("train"))


def test_truncated_and_missing_shards(folder: Path) -> None:
    file = folder / "train-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="train-00001.safetensors is .* bytes, the manifest says"):
        TraceStore.open(folder)
    file.unlink()
    with pytest.raises(ValueError, match="train-00001.safetensors is missing"):
        TraceStore.open(folder)


def test_half_written(folder: Path, tmp_path: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="half-written.*resumes it"):
        TraceStore.open(folder)
    with pytest.raises(ValueError, match="does not exist"):
        TraceStore.open(tmp_path / "none")
    with pytest.raises(ValueError, match="is not a trace folder"):
        TraceStore.open(tmp_path)


def test_older_format_and_damaged_manifest(folder: Path) -> None:
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"version": 0}))
    with pytest.raises(ValueError, match="has format 0, this version reads 2"):
        TraceStore.open(folder)
    file.write_text(file.read_text()[:50])
    with pytest.raises(ValueError, match="manifest.json cannot be read"):
        TraceStore.open(folder)


def test_another_host(folder: Path) -> None:
    other = describe(tiny_host(seed=1)[0])
    with pytest.raises(ValueError, match="tiny-llama-0 .* not from tiny-llama-1"):
        TraceStore.open(folder, other)
