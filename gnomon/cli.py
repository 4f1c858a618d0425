"""The ``gnomon`` command: ``generate`` (dense and sparse side by side), ``report``, ``env``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gnomon.budget import Budget


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"gnomon {args.command}: {error}", file=sys.stderr)
        return 2


def generate(args: argparse.Namespace) -> int:
    """``gnomon generate``: continues a prompt greedily, dense and sparse."""
    budget = _budget(args)
    from gnomon.evaluation.subject import find, make_subject, require_policy
    from gnomon.host import describe
    from gnomon.loading import load_host

    require_policy(args.policy)
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens={args.max_new_tokens} must be at least 1")
    model, tokenizer = load_host(args.host, dtype=args.dtype, device=args.device)
    spec = describe(model)
    found = find(args.policy, args.predictor or _default_predictor(args.policy), args.root, spec)
    settings = {"name": args.policy, "refresh": args.refresh}
    policy = make_subject(settings, budget, found, None, args.root, spec).policy
    texts, density = _both(model, tokenizer, policy, args)
    table = _side_by_side(texts, _titles(policy, density), args.prompt)
    out = Console()
    (out if out.is_terminal else Console(width=120)).print(table)
    return 0


def env(args: argparse.Namespace) -> int:
    """``gnomon env``: versions and devices, for bug reports."""
    from gnomon.env import report as facts

    print(facts())
    return 0


def report(args: argparse.Namespace) -> int:
    """``gnomon report``: table and figure of a sweep again, e.g. after one of its runs failed."""
    from gnomon.evaluation.report import show_sweep

    if not show_sweep(args.folder):
        raise ValueError(f"{args.folder} holds no run with results: give the folder of a sweep")
    return 0


def _both(model: Any, tokenizer: Any, policy: Any, args: argparse.Namespace) -> tuple[Any, Any]:
    """Dense and sparse continuations, and the sparse run's achieved density."""
    import torch

    import gnomon
    from gnomon.evaluation.generation import check_context, greedy_config

    ids = _encode(tokenizer, args.prompt, chat=args.chat).to(next(model.parameters()).device)
    check_context(model, ids.shape[1] + args.max_new_tokens)
    rules = greedy_config(model, args.max_new_tokens, exactly=False)
    rules.output_logits = False

    def write() -> str:
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=rules)
        return tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)

    dense = write()
    with gnomon.sparsify(model, policy) as session:
        sparse = write()
        density = session.density()
    return (dense, sparse), density


def _encode(tokenizer: Any, prompt: str, *, chat: bool) -> Any:
    if not prompt:
        raise ValueError("--prompt is empty")
    if not chat:
        return tokenizer(prompt, return_tensors="pt").input_ids
    if not tokenizer.chat_template:
        raise ValueError("--chat: the host's tokenizer has no chat template; leave --chat out")
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


def _titles(policy: Any, density: Any) -> tuple[str, str]:
    from gnomon.accounting import account

    accounting = account(policy, density)
    sparse = (
        f"{policy.name}: heads {density.heads:.2f}, neurons {density.neurons:.2f}, "
        f"bytes {accounting.byte_density:.2f} kept"
    )
    return "dense", sparse


def _side_by_side(texts: tuple[str, str], titles: tuple[str, str], prompt: str) -> Table:
    from rich.text import Text

    table = Table(title=Text(prompt, overflow="ellipsis"), show_lines=False, expand=True)
    for name in titles:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*(Text(text) for text in texts))
    return table


def _budget(args: argparse.Namespace) -> Budget:
    density = None if args.bytes is not None else args.density
    return Budget(density=density, heads=args.heads, neurons=args.neurons, bytes=args.bytes)


def _default_predictor(policy: str) -> str | None:
    """``auto`` for policies that stand on a predictor, else None."""
    from gnomon.policies import POLICIES

    means = policy in ("static", "glass", "core")
    optional = policy == "skip_sublayers"  # it asks for one under choose=similarity alone
    needed = hasattr(POLICIES[policy], "accepts") and not optional
    return "auto" if means or needed else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gnomon", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("generate", help="dense and sparse text side by side")
    write.set_defaults(run=generate)
    write.add_argument("--host", default="smollm2", help="smollm2, hub id, folder or GGUF file")
    write.add_argument("--dtype", help="float32, bfloat16 or float16; default: as stored")
    write.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<n>")
    write.add_argument("--policy", default="shadow", help="e.g. shadow, dejavu, static, oracle")
    write.add_argument("--predictor", help="auto (default), a folder or a hub id")
    write.add_argument("--refresh", help="static, prompt or token; default: the policy's own")
    write.add_argument("--density", type=float, default=0.5, help="kept fraction of both kinds")
    write.add_argument("--heads", type=float, help="kept fraction of heads, over --density")
    write.add_argument("--neurons", type=float, help="kept fraction of neurons, over --density")
    write.add_argument("--bytes", type=float, help="byte density to reach, instead of --density")
    write.add_argument("--prompt", required=True)
    write.add_argument("--max-new-tokens", type=int, default=64)
    write.add_argument("--chat", action="store_true", help="put the prompt in the chat template")
    root = Path(os.environ.get("GNOMON_ROOT", "outputs")) / "predictors"
    write.add_argument("--root", type=Path, default=root, help="where --predictor auto looks")
    sweep = commands.add_parser("report", help="table and figure of a sweep's folder, again")
    sweep.set_defaults(run=report)
    sweep.add_argument("folder", type=Path)
    commands.add_parser("env", help="versions and devices").set_defaults(run=env)
    return parser


if __name__ == "__main__":
    sys.exit(main())
