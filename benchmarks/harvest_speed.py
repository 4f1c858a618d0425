"""Capture against the bare forward and backward of the same host and batch; rows per second online.

python benchmarks/harvest_speed.py                  # random weights in the shape of SmolLM2-135M
python benchmarks/harvest_speed.py --host smollm2 --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gnomon
from gnomon.data.capture import Probe, _frozen, _summed_loss
from gnomon.data.criteria import criterion
from gnomon.data.datamodule import OnlineDataModule
from gnomon.data.sources import SyntheticText
from gnomon.host import Tap
from gnomon.tiny import tiny_host

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def main() -> None:
    """Measures and writes one JSON."""
    args = arguments()
    dtype = getattr(torch, args.dtype)
    if args.host:
        model, tokenizer = gnomon.load_host(args.host, dtype=dtype, device=args.device)
    else:
        model, tokenizer = tiny_host("llama", **SMOLLM2)
        model = model.to(args.device, dtype)
    spec = gnomon.describe(model)
    ids = torch.randint(0, 256, (args.batch, args.block), device=args.device)
    tokens, rows = ids.numel(), []
    bare = seconds(lambda: bare_step(model, ids), args)
    rows.append({"what": "forward + backward", "tokens_s": tokens / bare})
    for name in ("plainact", "fisher", "grad_norm", "l2norm", "magnitude"):
        probe = Probe(model, spec, [Tap(1)], criterion(name))
        spent = seconds(lambda probe=probe: probe(ids), args)  # type: ignore[misc]
        rows.append({"what": f"capture {name}", "tokens_s": tokens / spent, "ratio": bare / spent})
    for needs in ("labels", "scores"):
        rate = online(model, tokenizer, spec, args, needs)
        rows.append({"what": f"online, {needs}", "tokens_s": rate, "ratio": rate * bare / tokens})
    result: dict[str, Any] = {
        "command": "python benchmarks/harvest_speed.py",
        "arguments": {k: str(v) for k, v in vars(args).items()},
        "device": device_name(args.device),
        "torch": torch.__version__,
        "rows": rows,
    }
    if args.device.startswith("cuda"):
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(f"{row['what']:>20}: {row['tokens_s']:>10,.0f} tokens/s  {row.get('ratio', 1):.2f}")
    print(args.out)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--host", help="a name for gnomon.load_host; default: random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/harvest_speed.json"))
    return parser.parse_args()


def bare_step(model: Any, ids: torch.Tensor) -> None:
    """Forward and backward down to the embeddings' output, no parameter gradients."""
    valid = torch.ones_like(ids, dtype=torch.bool)
    with _frozen(model):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        _summed_loss(logits, ids, valid).backward()


def seconds(step: Callable[[], object], args: argparse.Namespace) -> float:
    """Seconds of one step, after one warm-up (three on a GPU)."""
    for _ in range(3 if args.device.startswith("cuda") else 1):
        step()
    wait(args.device)
    began = time.perf_counter()
    for _ in range(args.steps):
        step()
    wait(args.device)
    return (time.perf_counter() - began) / args.steps


def online(model: Any, tokenizer: Any, spec: Any, args: argparse.Namespace, needs: Any) -> float:
    """Rows per second of the online module, no predictor behind it."""
    tokens = args.batch * args.block * (args.steps + 1)
    text = SyntheticText(documents=tokens // 400 + 64, block=args.block, tokens=tokens)
    module = OnlineDataModule(
        model,
        tokenizer,
        spec,
        text,
        criterion("plainact"),
        [Tap(1)],
        needs=[needs],
        host_batch=args.batch,
        heldout_tokens=args.block,
        means_tokens=args.block,
    )
    module.setup()
    loader = iter(module.train_dataloader())
    next(loader)
    wait(args.device)
    began, rows = time.perf_counter(), 0
    for batch in loader:
        rows += len(batch["inputs"])
    wait(args.device)
    return rows / (time.perf_counter() - began)


def wait(device: str) -> None:
    """Waits for a GPU's queue."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def device_name(device: str) -> str:
    """The device in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
