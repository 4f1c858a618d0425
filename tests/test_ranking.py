"""The ranking objective on a real, if tiny, host: from stored labels, and recall rises."""

from __future__ import annotations

import functools
from pathlib import Path

import pytorch_lightning as pl
import torch

from gnomon.data.criteria import criterion
from gnomon.data.datamodule import TraceDataModule
from gnomon.data.sources import SyntheticText
from gnomon.data.stage import prepare
from gnomon.host import KINDS, describe
from gnomon.predictors import Shadow
from gnomon.predictors.module import PredictorModule
from gnomon.predictors.objectives import Ranking
from gnomon.tiny import tiny_host
from gnomon.training import fit


def test_it_trains_from_stored_labels_and_recall_rises(tmp_path: Path) -> None:
    model, tokenizer = tiny_host()
    spec = describe(model)
    torch.manual_seed(0)
    predictor = Shadow.for_host(spec, hidden=64, rank=32)
    data = prepare(
        model=model,
        tokenizer=tokenizer,
        spec=spec,
        text=SyntheticText(documents=200, block=64, tokens=64 * 64),
        criterion=criterion("magnitude"),
        taps=predictor.taps,
        needs=(Ranking.needs,),
        out_root=tmp_path,
        batch_size=256,
        batch=16,
        heldout_tokens=512,
    )
    assert isinstance(data, TraceDataModule)
    assert data.store.format == "bits"
    module = PredictorModule(
        predictor,
        Ranking(),
        functools.partial(torch.optim.AdamW, lr=1e-2),
        None,
        {"heads": 0.5, "neurons": 0.5},
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=120,
        max_epochs=-1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    metrics = fit(module, data, trainer)
    gains = {k: metrics[k]["recall"] - metrics[k]["static"]["recall"] for k in KINDS}
    assert gains["neurons"] > 0.04, "training starts at the static choice"
    assert gains["heads"] > 0
