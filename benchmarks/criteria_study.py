"""Which criterion makes the best choice, at equal data: as fixed, per-prompt and per-token scores.

    python benchmarks/criteria_study.py --host smollm2 --device cuda --text notes.txt

Every criterion scores the same training tokens (``jacov`` and ``epenas``, which hold the gradients
of all at once, 4096 of them, evenly spread), and the same validation blocks are then measured:

==========  ========  ==========================================================================
use         protocol  units are kept by
==========  ========  ==========================================================================
static      both      static scores of the training tokens
prompt      decode    the score of the block's first half, gradients of its own tokens included
sequence    decode    the score of its second half: what a per-prompt predictor is to predict;
                      not causal
token       all       each token's own score: what a per-token predictor is to predict; not
                      causal, as the gradient knows the token that follows
==========  ========  ==========================================================================

Neurons and heads are skipped separately. ``spearman`` beside ``prompt`` is the rank correlation of
the scores of both halves within a layer, beside ``static`` that of the static score and the second
half's. ``oracle`` and ``random``, per token, stand beside them. Figures of the two protocols do not
compare: ``decode`` leaves the first half dense and scores the second alone. Rows go to ``--out``,
one JSON a line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import gnomon

if __name__ == "__main__":  # this folder's kernels.py must not answer to the package `kernels`
    here = Path(__file__).resolve().parent
    others = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    sys.path[:] = [str(here / "support"), *others]

import torch
from criteria_rows import CAUSAL, USES, Row, Study, references, rows_of
from rich.console import Console
from rich.table import Table

from gnomon import Budget
from gnomon.data.criteria import CRITERIA, criterion
from gnomon.data.sources import EmbeddedText, FileText, SyntheticText
from gnomon.data.text import Text
from gnomon.env import versions
from gnomon.evaluation.results import commit
from gnomon.host import KINDS, UnitKind


def text_of(name: str, block: int, tokens: int) -> Text:
    """``embedded``, ``synthetic``, or a local file."""
    if name == "synthetic":
        return SyntheticText(documents=tokens // 100 + 64, block=block, tokens=tokens)
    if name == "embedded":
        return EmbeddedText(block=block, tokens=tokens)
    return FileText(name, block=block, tokens=tokens)


def prepare(args: argparse.Namespace) -> Study:
    """Loads the host and the tokens, and measures the dense model.

    Raises:
        ValueError: text too short, or a host that cannot be loaded.
    """
    text = text_of(args.text, args.block, args.tokens)
    model, tokenizer = gnomon.load_host(args.host, dtype=args.dtype, device=args.device)
    kept = {"neurons": args.neurons, "heads": args.heads}
    study = Study(
        model,
        gnomon.describe(model),
        text.blocks(tokenizer, "train").ids,
        text.blocks(tokenizer, "validation", args.blocks * args.block).ids,
        args.batch,
        {kind: Budget(**{kind: kept[kind]}) for kind in KINDS},
        {},
    )
    study.dense.update({p: study.nll(None, p, study.blocks) for p in study.protocols})
    return study


def run(args: argparse.Namespace, write: Callable[[Row], None]) -> None:
    """Measures everything that the arguments name.

    Raises:
        ValueError: an unknown criterion or use.
    """
    chosen = [criterion(name) for name in args.criteria.split(",")]
    uses = args.uses.split(",")
    if not set(uses) <= set(USES):
        raise ValueError(f"--uses={args.uses!r}: use some of {','.join(USES)}")
    study = prepare(args)
    cuda = torch.device(args.device).type == "cuda"
    about = {
        "host": study.spec.name,
        "dtype": args.dtype,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "text": Path(args.text).name,
        "calibration_tokens": study.train.numel(),
        "commit": commit(),
        "versions": versions(),
        "command": " ".join(["python benchmarks/criteria_study.py", *sys.argv[1:]]),
    }
    for row in references(study):
        write(row | about)
    for one in chosen:
        for row in rows_of(study, one, uses):
            write(row | about)


def table(rows: Sequence[Row], kind: UnitKind) -> Table:
    """Perplexity ratios of a kind: a line for each criterion, a column for each use."""
    mine = [row for row in rows if row["kind"] == kind]
    columns = list(dict.fromkeys((r["use"], r["protocol"]) for r in mine if r["use"] in USES))
    columns.sort(key=lambda c: (c[1], USES.index(c[0])))
    cells = {(r["criterion"], r["use"], r["protocol"]): r["ppl_ratio"] for r in mine}
    shown = Table(
        title=f"{kind} {mine[0]['density']:g}: perplexity over the dense model's",
        caption="* not causal: a reference",
    )
    shown.add_column("criterion")
    for use, protocol in columns:
        shown.add_column(f"{use}{'' if CAUSAL[use] else '*'}\n{protocol}", justify="right")
    for name in dict.fromkeys(r["criterion"] for r in mine):
        found = [
            cells.get((name, use, protocol), cells.get((name, "reference", protocol)))
            for use, protocol in columns
        ]
        shown.add_row(name, *("–" if x is None else f"{x:.4f}" for x in found))
    return shown


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Criteria at equal data")
    parser.add_argument("--host", default="smollm2", help="a name for gnomon.load_host")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--text", default="embedded", help="embedded, synthetic, or a local file")
    parser.add_argument("--criteria", default=",".join(CRITERIA))
    parser.add_argument("--uses", default=",".join(USES))
    parser.add_argument("--tokens", type=int, default=65536, help="that every criterion scores")
    parser.add_argument("--blocks", type=int, default=32, help="of validation text")
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4, help="blocks in one forward and backward")
    parser.add_argument("--neurons", type=float, default=0.5, help="density")
    parser.add_argument("--heads", type=float, default=0.67, help="density")
    parser.add_argument("--out", type=Path, default=Path("outputs/criteria_study.jsonl"))
    return parser.parse_args(given)


def main() -> None:
    """Appends rows to ``--out`` as they come, prints a table last."""
    args, rows = arguments(), []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as file:

        def write(row: Row) -> None:
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()

        run(args, write)
    for kind in KINDS:
        Console().print(table(rows, kind))
    print(args.out)


if __name__ == "__main__":
    main()
