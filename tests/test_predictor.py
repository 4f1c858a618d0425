"""Predictors: what decides what, one path for training and inference, the folder."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import gnomon
from gnomon.host import KINDS, HostSpec, Tap
from gnomon.predictors import (
    DejaVu,
    Predictor,
    PredictorInfo,
    Prior,
    Shadow,
    Sketch,
    Static,
    find_predictor,
)
from gnomon.predictors.folder import load_predictor
from gnomon.tiny import tiny_host

CASES: list[tuple[type[Any], dict[str, Any]]] = [
    (Shadow, {"rank": 8, "hidden": 16}),
    (Shadow, {"tap": Tap(0, "attn_context"), "rank": 8, "hidden": 16}),
    (Shadow, {"tap": Tap(1, "ffn_input"), "rank": 8, "hidden": 16}),
    (DejaVu, {"rank": 8}),
    (DejaVu, {"rank": 8, "lookahead": 1, "heads_site": "ffn_input", "activation": True}),
    (DejaVu, {"rank": 8, "heads_site": "attn_input", "neurons_site": "attn_input"}),
    (Static, {}),
    (Prior, {}),
    (Sketch, {"rank": 8}),
    (Sketch, {"bits": 3, "up_bits": 1, "heads_site": "attn_input"}),
]
IDS = [f"{cls.name}-{i}" for i, (cls, _) in enumerate(CASES)]


@pytest.fixture(scope="module")
def spec() -> HostSpec:
    return gnomon.describe(tiny_host("llama")[0])


def build(case: tuple[type[Any], dict[str, Any]], spec: HostSpec) -> Predictor:
    """A predictor with random biases and means, as if trained on the host."""
    cls, kwargs = case
    torch.manual_seed(0)
    predictor = cls.for_host(spec, **kwargs)
    if isinstance(predictor, Sketch):
        for layer, copy in itertools.product(range(spec.L), predictor.copies):
            copy.adopt(layer, torch.randn(spec.F, spec.D), torch.rand(spec.F) + 0.5)
    noise = {kind: torch.rand(spec.L, spec.units(kind)) for kind in KINDS}
    predictor.set_means(noise)
    predictor.set_output_bias(noise)
    predictor.info = PredictorInfo(
        host=spec.name, spec_hash=spec.hash, criterion="plainact", created="2024-01-01"
    )
    return predictor


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("quantized", [False, True], ids=["fp32", "int8"])
def test_layer_by_layer_scores_are_the_training_forward(
    case: tuple[type[Any], dict[str, Any]], spec: HostSpec, quantized: bool
) -> None:
    predictor = build(case, spec)
    if quantized:
        predictor.quantize()
    inputs = torch.randn(5, len(predictor.taps), predictor.width)
    whole = predictor(inputs)
    for kind in KINDS:
        assert whole[kind].shape == (5, spec.L, spec.units(kind))
        assert predictor.decided(kind).any()
        for layer in range(spec.L):
            tap = predictor.decided_from(kind, layer)
            assert (tap is not None) == bool(predictor.decided(kind)[layer])
            if tap is None:
                assert whole[kind][:, layer].eq(0).all()
                with pytest.raises(ValueError, match="stay dense"):
                    predictor.score(kind, layer, inputs[:, 0])
                continue
            code = predictor.encode(tap, inputs[:, predictor.taps.index(tap)])
            close = {"rtol": 1e-4, "atol": 1e-3} if case[0] is Sketch else {}  # logs near zero
            found = predictor.score(kind, layer, code)
            torch.testing.assert_close(found, whole[kind][:, layer], **close)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_nothing_is_decided_from_a_later_state(
    case: tuple[type[Any], dict[str, Any]], spec: HostSpec
) -> None:
    predictor = build(case, spec)
    order = ["layer_input", "attn_input", "attn_context", "ffn_input"]
    before = {"heads": 1, "neurons": 3}
    for kind in KINDS:
        for layer in range(spec.L):
            tap = predictor.decided_from(kind, layer)
            if tap is not None:
                assert tap in predictor.taps
                late = order.index(tap.site) > before[kind]
                assert tap.layer < layer or (tap.layer == layer and not late)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_folder_gives_the_same_scores_bit_for_bit(
    case: tuple[type[Any], dict[str, Any]], spec: HostSpec, tmp_path: Path
) -> None:
    predictor = build(case, spec).quantize()
    state = torch.random.get_rng_state()
    predictor.save_pretrained(tmp_path / "p")
    back = gnomon.load_predictor(tmp_path / "p")
    assert torch.equal(state, torch.random.get_rng_state())
    inputs = torch.randn(7, len(predictor.taps), predictor.width)
    for kind in KINDS:
        assert torch.equal(back(inputs)[kind], predictor(inputs)[kind])
        assert torch.equal(back.means[kind], predictor.means[kind])
    assert type(back) is case[0] and back.params == predictor.params and back.taps == predictor.taps
    assert back.info == predictor.info and back.nbytes == predictor.nbytes
    assert not back.training and not any(p.requires_grad for p in back.parameters())
    again = case[0].from_pretrained(tmp_path / "p")
    assert torch.equal(again(inputs)["heads"], predictor(inputs)["heads"])


def test_folder_holds_what_the_contract_says(spec: HostSpec, tmp_path: Path) -> None:
    predictor = build(CASES[0], spec)
    predictor.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["class"] == "shadow" and config["host"]["spec_hash"] == spec.hash
    for key in ("criterion", "objective", "text", "seed", "versions", "metrics"):
        assert key in config
    means = torch.tensor(config["means"]["neurons"])
    assert means.shape == (spec.L, spec.F)
    torch.testing.assert_close(means, predictor.means["neurons"], rtol=5e-4, atol=0)
    assert "library_name: gnomon" in (tmp_path / "README.md").read_text()
    assert not predictor.quantized, "saving must not end a training"


def test_folders_from_before_tilts_load_without_any(spec: HostSpec, tmp_path: Path) -> None:
    made = Shadow.for_host(spec, hidden=8, rank=4).quantize()
    made.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {k: v for k, v in weights.items() if not k.startswith("tilt_")}
    assert len(weights) - len(kept) == 2
    save_file(kept, tmp_path / "model.safetensors")
    back = gnomon.load_predictor(tmp_path)
    assert not back.has_tilt and torch.equal(back.trunk.q, made.trunk.q)


def test_the_split_of_its_text_is_kept_and_older_folders_load(
    spec: HostSpec, tmp_path: Path
) -> None:
    predictor = build(CASES[0], spec)
    facts = {"seed": 3, "heldout": 0.2, "fingerprint": "f", "files": ["wiki"]}
    predictor.info = replace(predictor.info, text="t", text_digest="d", text_split=facts)
    predictor.save_pretrained(tmp_path)
    assert gnomon.load_predictor(tmp_path).info.text_split == facts
    assert "text.heldout=0.2, text.seed=3" in (tmp_path / "README.md").read_text()
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config["text"] == {"name": "t", "digest": "d", "split": facts}
    del config["text"]["split"]
    file.write_text(json.dumps(config))
    older = gnomon.load_predictor(tmp_path)
    assert older.info == replace(predictor.info, text_split={})


def test_nbytes_are_int8_rows_scales_and_biases(spec: HostSpec) -> None:
    predictor = build((Shadow, {"rank": 8, "hidden": 16}), spec).quantize()
    rows = 16 + 8 + 2 * (spec.H + spec.F)
    weights = 16 * spec.D + 8 * 16 + 2 * (spec.H + spec.F) * 8
    assert predictor.nbytes == weights + rows * (4 + 4)


def test_another_host_is_refused_by_both_names(spec: HostSpec) -> None:
    other = gnomon.describe(tiny_host("qwen2", seed=3)[0])
    predictor = build(CASES[0], spec)
    predictor.check_host(spec)
    with pytest.raises(ValueError, match=f"{spec.name}.*{other.name}"):
        predictor.check_host(other)
    with pytest.raises(ValueError, match="criterion='fisher'.*plainact"):
        predictor.check(criterion="fisher")
    with pytest.raises(ValueError, match="rank=16"):
        predictor.check(rank=16)


def test_damaged_folders_are_refused(spec: HostSpec, tmp_path: Path) -> None:
    build(CASES[0], spec).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def written(**changes: Any) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        return tmp_path

    with pytest.raises(ValueError, match="outputs.heads.q.*rank"):
        load_predictor(written(params=config["params"] | {"rank": 9}))
    with pytest.raises(
        ValueError, match="known are calibration, dejavu, prior, shadow, sketch, static"
    ):
        load_predictor(written(**{"class": "oracle"}))
    with pytest.raises(ValueError, match="params do not fit"):
        load_predictor(written(params={"L": 3}))
    with pytest.raises(ValueError, match="format 0"):
        load_predictor(written(format=0))
    with pytest.raises(ValueError, match="not dejavu"):
        DejaVu.from_pretrained(written())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="cannot be read"):
        load_predictor(tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor a hub id"):
        load_predictor(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="could not be fetched"):
        load_predictor("someone/something")


def test_find_predictor_takes_the_newest_for_this_host(spec: HostSpec, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"python train.py predictor=shadow"):
        find_predictor(tmp_path, spec, Shadow)
    for i, (case, created) in enumerate(
        [(CASES[0], "2024-01-02"), (CASES[0], "2024-01-01"), (CASES[3], "2024-01-03")]
    ):
        predictor = build(case, spec)
        predictor.info = PredictorInfo(host=spec.name, spec_hash=spec.hash, created=created)
        predictor.save_pretrained(tmp_path / "host" / str(i))
    assert find_predictor(tmp_path, spec, "shadow").name == "0"
    assert find_predictor(tmp_path, spec).name == "2"
    learned = build((Static, {}), spec)
    learned.info = PredictorInfo(host=spec.name, spec_hash=spec.hash, created="2024-01-04")
    learned.save_pretrained(tmp_path / "host" / "learned")
    assert find_predictor(tmp_path, spec).name == "2"
    assert find_predictor(tmp_path, spec, "static").name == "learned"
    with pytest.raises(ValueError, match="auto"):
        find_predictor(tmp_path, gnomon.describe(tiny_host("opt")[0]))


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (lambda s: Shadow.for_host(s, tap=Tap(3)), "tap"),
        (lambda s: Shadow.for_host(s, tap=Tap(2, "ffn_input")), "leaves no layer"),
        (lambda s: Shadow.for_host(s, rank=0), "rank=0"),
        (lambda s: DejaVu.for_host(s, lookahead=3), "lookahead=3"),
        (lambda s: DejaVu.for_host(s, heads_site="ffn_input"), "heads_site"),
    ],
)
def test_impossible_predictors_are_refused(build_it: Any, message: str, spec: HostSpec) -> None:
    with pytest.raises(ValueError, match=message):
        build_it(spec)
