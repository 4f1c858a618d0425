"""Harvest tokens/s with gradients, against the bare forward + backward of the same host and batch.

    python benchmarks/harvest_speed.py --host smollm2 --device cuda --blocks 8

Two bare passes are timed: ``activations`` computes the gradients that the harvest does (activations
only) and ``training`` those of the parameters as well, as a training step does. All run in turn,
round by round; medians are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gnomon
from gnomon.data.capture import Probe
from gnomon.data.criteria import criterion
from gnomon.host import Tap

WARM_UP = 2  # rounds


def bare(model: Any, parameters: bool) -> Callable[[Tensor], None]:
    """One forward and backward of the summed loss, with or without parameter gradients."""

    def step(ids: Tensor) -> None:
        for p in model.parameters():
            p.requires_grad_(parameters)
        embed = model.get_input_embeddings()
        hook = embed.register_forward_hook(lambda m, a, out: out.requires_grad_())
        logits = model(input_ids=ids, use_cache=False).logits.float()
        loss = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        )
        loss.backward()
        hook.remove()
        model.zero_grad(set_to_none=True)

    return step


def timed(step: Callable[[Tensor], object], ids: Tensor) -> float:
    """Seconds of one step, device work included."""
    if ids.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(ids)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Times, prints a table, writes JSON."""
    args = arguments()
    model, _ = gnomon.load_host(args.host, dtype=args.dtype, device=args.device)
    spec = gnomon.describe(model)
    steps: dict[str, Callable[[Tensor], object]] = {
        "harvest": Probe(model, spec, (Tap(1),), criterion(args.criterion)),
        "activations": bare(model, parameters=False),
        "training": bare(model, parameters=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(args.rounds + WARM_UP):
        ids = torch.randint(0, spec.V, (args.blocks, args.block), device=args.device)
        for name, step in steps.items():
            spent = timed(step, ids)
            if turn >= WARM_UP:
                seconds[name].append(spent)
    result = summary(args, seconds)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, value in result["tokens_per_s"].items():
        print(f"{name:12s} {value:10.0f} tokens/s")
    print(
        f"harvest / bare: {result['harvest_over_activations']:.2f} (same gradients), "
        f"{result['harvest_over_training']:.2f} (with parameter gradients)"
    )


def summary(args: argparse.Namespace, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Rates from the medians, with everything they were made from."""
    tokens = args.blocks * args.block
    rate = {name: tokens / statistics.median(s) for name, s in seconds.items()}
    cuda = args.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "settings": {k: str(v) for k, v in vars(args).items() if k != "out"},
        "tokens_per_s": rate,
        "harvest_over_activations": rate["harvest"] / rate["activations"],
        "harvest_over_training": rate["harvest"] / rate["training"],
        "seconds": seconds,
        "torch": torch.__version__,
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Harvest tokens/s against a bare pass")
    parser.add_argument("--host", default="smollm2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--criterion", default="plainact")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/harvest_speed.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
