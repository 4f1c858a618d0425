"""What the trace store costs: bytes per token, write and read rate, peak memory for 10x the tokens.

    python benchmarks/harvest_store.py                  # a small random host
    python benchmarks/harvest_store.py --host smollm2 --text embedded --tokens 2048

Every case runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Large enough that ten times the tokens would be felt in memory, small enough for two CPU cores.
TINY = {"hidden_size": 128, "intermediate_size": 2048, "num_hidden_layers": 6, "head_dim": 32}


def main() -> None:
    """Runs the cases and writes one JSON."""
    args = arguments()
    if args.case:
        print(json.dumps(measure(args, *json.loads(args.case))))
        return
    cases = [(f, args.tokens * k) for f in ("int8", "bits") for k in (1, 10)]
    rows = [in_process(args, case) for case in cases]
    by_case = {(r["format"], r["tokens"]): r for r in rows}
    for fmt in ("int8", "bits"):
        small, large = (by_case[fmt, args.tokens * k]["peak_bytes"] for k in (1, 10))
        by_case[fmt, args.tokens * 10]["peak_over_tenth"] = round(large / small, 3)
    result = {
        "command": "python benchmarks/harvest_store.py " + " ".join(sys.argv[1:]),
        "hardware": f"{platform.machine()}, {platform.system()}, {args.device}",
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for r in rows:
        print(
            f"{r['format']:>5} {r['tokens']:>8} tokens: {r['bytes_per_token']:>9,.0f} bytes/token, "
            f"write {r['write_mb_s']:>6,.0f} MB/s, read {r['read_tokens_s']:>9,.0f} tokens/s, "
            f"harvest {r['harvest_tokens_s']:>7,.0f} tokens/s, peak {r['peak_bytes'] / 1e6:,.0f} MB"
        )
    print(args.out)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--host", default="tiny", help="tiny, or a name for gnomon.load_host")
    parser.add_argument("--text", default="synthetic", choices=["synthetic", "embedded"])
    parser.add_argument("--tokens", type=int, default=4096, help="of the smaller case; also 10x it")
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--shard-blocks", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/harvest_store.json"))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_process(args: argparse.Namespace, case: tuple[str, int]) -> dict[str, Any]:
    """One case in a fresh interpreter."""
    command = [sys.executable, __file__, *sys.argv[1:], "--case", json.dumps(case)]
    # freed blocks go back at once, so that the peak is of live memory and not of malloc's habits
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace, fmt: Any, tokens: int) -> dict[str, Any]:
    """Harvests, then reads one epoch of training batches."""
    import gnomon
    from gnomon.data.criteria import criterion
    from gnomon.data.datamodule import TraceDataModule
    from gnomon.data.harvest import harvest
    from gnomon.data.sources import EmbeddedText, SyntheticText
    from gnomon.host import Tap
    from gnomon.tiny import tiny_host

    if args.host == "tiny":
        model, tokenizer = tiny_host("llama", **TINY)
        model = model.to(args.device)
    else:
        model, tokenizer = gnomon.load_host(args.host, device=args.device)
    text = (
        EmbeddedText(block=args.block, tokens=tokens)
        if args.text == "embedded"
        else SyntheticText(documents=tokens // 400 + 64, block=args.block, tokens=tokens)
    )
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        store = harvest(
            model,
            tokenizer,
            gnomon.describe(model),
            text,
            criterion("plainact"),
            [Tap(1)],
            Path(folder) / "traces",
            format=fmt,
            heldout_tokens=args.block,
            shard_blocks=args.shard_blocks,
            max_gb=None,
        )
        harvested = time.perf_counter() - began
        module = TraceDataModule(store, {"labels"}, batch_size=256)
        began = time.perf_counter()
        rows = sum(len(b["inputs"]) for b in module.train_dataloader())
        read = time.perf_counter() - began
        shards = store.shards("train")
        return {
            "host": args.host,
            "format": fmt,
            "tokens": tokens,
            "shard_blocks": args.shard_blocks,
            "bytes_per_token": sum(s.bytes for s in shards) / sum(s.rows for s in shards),
            "harvest_tokens_s": round(tokens / harvested, 1),
            "write_mb_s": round(store.nbytes / 1e6 / store.manifest["run"]["write_seconds"], 1),
            "read_tokens_s": round(rows / read, 1),
            "read_mb_s": round(sum(s.bytes for s in shards) / 1e6 / read, 1),
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


if __name__ == "__main__":
    main()
