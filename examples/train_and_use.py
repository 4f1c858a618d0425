"""Train a predictor for your own model on your own text, then run the model with it.

    python examples/train_and_use.py --host <hub id | folder | smollm2> --text notes.txt

Without arguments: a tiny random host and synthetic text, in seconds.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch

import gnomon
from gnomon import training
from gnomon.data.criteria import PlainAct
from gnomon.data.datamodule import OnlineDataModule
from gnomon.data.sources import FileText, SyntheticText
from gnomon.predictors.module import PredictorModule
from gnomon.predictors.objectives import Bce
from gnomon.predictors.shadow import Shadow

DENSITY = {"heads": 0.75, "neurons": 0.5}


def train(args: argparse.Namespace) -> Path:
    """Harvests straight from the host while training; returns the predictor's folder."""
    model, tokenizer = gnomon.load_host(args.host)
    spec = gnomon.describe(model)
    size = {"block": args.block, "tokens": args.tokens}
    text = FileText(args.text, **size) if args.text else SyntheticText(**size)
    network = Shadow.for_host(spec, hidden=args.rank, rank=args.rank)
    data = OnlineDataModule(
        model, tokenizer, spec, text, PlainAct(), network.taps, density=DENSITY, batch_size=192
    )
    module = PredictorModule(
        network, Bce(), partial(torch.optim.AdamW, lr=3e-3), scheduler=None, density=DENSITY
    )
    trainer = pl.Trainer(max_steps=args.steps, logger=False, enable_checkpointing=False)
    metrics = training.fit(module, data, trainer)
    info = training.describe_training(spec, "bce", 0, data.info, metrics)
    return training.save(network, args.out, info)


def use(args: argparse.Namespace, folder: Path) -> str:
    """Generates with half of the neurons; ``with gnomon.sparsify(...)`` works on any call."""
    model, tokenizer = gnomon.load_host(args.host)
    predictor = gnomon.load_predictor(folder)
    policy = gnomon.policies.Shadow(predictor, gnomon.Budget(**DENSITY))
    text = gnomon.generate(model, tokenizer, args.prompt, policy=policy, max_new_tokens=40)
    with torch.no_grad(), gnomon.sparsify(model, policy, protocol="all") as session:
        model(**tokenizer(args.prompt, return_tensors="pt"))
    print(f"neurons kept: {session.density().neurons:.2f}")
    return text


def main() -> None:
    """Trains, then generates."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="tiny:llama")
    parser.add_argument("--text", help=".txt or .jsonl; default: synthetic text")
    parser.add_argument("--prompt", default="The sundial's shadow")
    parser.add_argument("--out", type=Path, default=Path("my-predictor"))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rank", type=int, default=32)
    args = parser.parse_args()
    folder = train(args)
    print(folder)
    print(use(args, folder))


if __name__ == "__main__":
    main()
