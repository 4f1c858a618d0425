"""A trained predictor stands between the brackets: oracle, shadow, (static,) random."""

from __future__ import annotations

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

import gnomon
from gnomon import training
from gnomon.budget import Budget
from gnomon.data.capture import capture
from gnomon.data.criteria import Magnitude
from gnomon.data.datamodule import OnlineDataModule
from gnomon.data.sources import SyntheticText
from gnomon.hooks import HostHooks
from gnomon.host import KINDS, HostSpec, UnitKind
from gnomon.policies import Oracle, Policy, Random, Seen, Shadow, Static
from gnomon.predictors.module import PredictorModule
from gnomon.predictors.objectives import Bce
from gnomon.predictors.shadow import Shadow as ShadowNetwork
from gnomon.tiny import tiny_host

HALF = {"heads": 0.5, "neurons": 0.5}


@pytest.fixture(scope="module")
def trained():
    pl.seed_everything(0, verbose=False)
    model, tokenizer = tiny_host("llama", num_hidden_layers=2, intermediate_size=96)
    spec = gnomon.describe(model)
    network = ShadowNetwork.for_host(spec, hidden=64, rank=64)
    text = SyntheticText(block=64, tokens=4096)
    data = OnlineDataModule(
        model, tokenizer, spec, text, Magnitude(), network.taps, density=HALF, batch_size=256
    )
    module = PredictorModule(
        network, Bce(), partial(torch.optim.AdamW, lr=1e-2), scheduler=None, density=HALF
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_steps=80, accelerator="cpu", **quiet)
    metrics = training.fit(module, data, trainer)
    network.info = training.describe_training(spec, "bce", 0, data.info, metrics)
    ids = text.blocks(tokenizer, "heldout", tokens=512).ids
    return model, spec, network, ids


def captured(model, spec: HostSpec, policy: Policy, ids: Tensor, kind: UnitKind) -> float:
    """Share of the true magnitude in layer 1 that the policy keeps, on the dense trajectory."""
    taps = policy.taps() or (gnomon.Tap(1),)
    found = capture(model, spec, taps, Magnitude(), ids)
    units: dict[UnitKind, Tensor] = {}
    with HostHooks(model, spec) as hooks, torch.no_grad():
        hooks.on_units(kind, 1, lambda x: units.update({kind: x.clone()}))
        model(ids)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    seen = Seen(
        hidden=lambda tap: found.inputs[:, :, taps.index(tap)],
        positions=positions,
        live=torch.ones_like(ids, dtype=torch.bool),
        memo={},
        units=units[kind],
    )
    policy.bind(model, spec)
    keep = policy.decide(kind, 1, seen)
    true = found.scores(kind)[:, :, 1]
    return float((true * keep).sum() / true.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_shadow_static_random(trained, kind: UnitKind) -> None:
    model, spec, network, ids = trained
    budget = Budget(density=0.75)  # layer 0 stays dense and counts: half of layer 1
    half = Budget(density=0.5)
    mass = {
        "oracle": captured(model, spec, Oracle(half), ids, kind),
        "shadow": captured(model, spec, Shadow(network, budget), ids, kind),
        "static": captured(model, spec, Static(network, half), ids, kind),
        "random": captured(model, spec, Random(half), ids, kind),
    }
    assert mass["oracle"] > mass["shadow"] > mass["random"], mass
    assert mass["oracle"] > mass["static"] > mass["random"], mass
    if kind == "neurons":  # the four heads of a random host differ too little to predict
        assert mass["shadow"] > mass["static"] + 0.01, mass
    assert mass["random"] == pytest.approx(0.5, abs=0.05)
