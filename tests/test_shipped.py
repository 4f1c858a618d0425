"""The predictors that ship with the project: complete, small, and found for their host alone."""

from __future__ import annotations

import pytest
import torch

import gnomon
from gnomon.host import describe
from gnomon.predictors.folder import CONFIG, SHIPPED, find_pretrained, load_predictor, read_config
from gnomon.tiny import tiny_host

FOLDERS = sorted(file.parent for file in SHIPPED.glob(f"**/{CONFIG}"))


def test_they_are_at_most_20_mb_together() -> None:
    assert FOLDERS
    assert sum(f.stat().st_size for f in SHIPPED.rglob("*")) <= 20e6


@pytest.mark.parametrize("folder", FOLDERS, ids=[f.name for f in FOLDERS])
def test_each_is_complete(folder) -> None:
    predictor = load_predictor(folder)
    config, card = read_config(folder), (folder / "README.md").read_text()
    assert predictor.quantized and predictor.means["neurons"].gt(0).any()
    assert config["host"]["name"] in card and "## Operating points" in card
    assert "python train.py" in card  # the command that makes it again
    inputs = torch.randn(2, len(predictor.taps), predictor.width)
    assert all(scores.isfinite().all() for scores in predictor(inputs).values())


def test_another_host_has_none_and_is_told_what_ships() -> None:
    spec = describe(tiny_host()[0])
    with pytest.raises(ValueError, match=r"no sketch ships .*what ships: sketch for SmolLM2-135M"):
        find_pretrained(spec, "sketch")


@pytest.mark.slow
def test_the_embedded_host_has_one_that_beats_the_fixed_choice(smollm2_wheel: None) -> None:
    model, tokenizer = gnomon.load_host("smollm2", dtype="float32")
    spec = describe(model)
    predictor = load_predictor(find_pretrained(spec, "sketch"))
    predictor.check_host(spec)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids

    def loss(policy) -> float:
        with torch.no_grad(), gnomon.sparsify(model, policy, backend="mask", protocol="all"):
            return float(model(ids, labels=ids).loss)

    half = gnomon.Budget(neurons=0.5)
    dense = loss(gnomon.policies.Dense())
    own = loss(gnomon.policies.Sketch(predictor, half)) - dense
    fixed = loss(gnomon.policies.Static(predictor, half)) - dense
    assert own < 0.4 and own < 0.3 * fixed


TEXT = """The sundial is among the oldest instruments for telling the time of day. A gnomon, the
part that casts the shadow, points to the celestial pole, so that its shadow moves at the same rate
throughout the year. The hours were marked on a plate of stone or bronze, and a traveller could
carry a small one in the pocket."""
