"""What else could tell which neurons matter: candidates beside few-bit copies, at equal bytes.

    python benchmarks/features.py --host smollm2 --out features.jsonl

Every candidate scores the neurons of every layer from the *dense* host's own states, and is asked
how much of the true top units (recall) and of the true magnitude |h|·‖w_down‖ (mass) it finds.

==================  ===============================================================================
candidate           score
==================  ===============================================================================
copies              a sketch's, of b bits (:mod:`gnomon.predictors.sketch`); floors included
low rank            the same of int8 copies on the r main directions of the layer's own inputs
low rank, shared    the same on the directions of all layers' inputs: one factor for all
previous            log magnitude at the previous token; free, were every neuron computed
prefix              log mean magnitude over all tokens before; likewise
static              log mean magnitude over calibration text
copies + λ · other  the sum
==================  ===============================================================================

``previous`` and ``prefix`` know all neurons of the tokens before, where a sparse step knows those
that it computed: what they add is an upper bound. Rows go to ``--out``, one JSON a line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gnomon

if __name__ == "__main__":  # this folder's kernels.py must not answer to the package `kernels`
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]

import torch
from torch import Tensor

from gnomon.activation import kernel_name
from gnomon.data.sources import EmbeddedText, FileText
from gnomon.env import versions
from gnomon.evaluation.results import commit
from gnomon.hooks import HostHooks
from gnomon.host import HostSpec, Tap
from gnomon.kernels.gather_common import activate
from gnomon.kernels.sketch_scores import half_log
from gnomon.predictors.rounding import levels_of, output_error, round_rows
from gnomon.predictors.sketch import PASSED_ON
from gnomon.sketching import ffn_moments, ffn_weights

SHARES = (0.5, 0.3)
LAMBDAS = (0.05, 0.1, 0.2, 0.4)
Scores = dict[str, Tensor]


class Copies:
    """Approximate gate and up projections of one layer, and the score that they give.

    Args:
        weights, norms: of :func:`ffn_weights`.
        moments: (D, D) of the layer's inputs.
        make: what stands for a weight (F, D).
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        norms: Tensor,
        moments: Tensor,
        activation: str,
        make: Callable[[Tensor], Tensor],
    ) -> None:
        self.activation, self.offset = activation, norms.clamp_min(1e-9).log()
        roles = [role for role in ("gate", "up") if role in weights]
        self.parts = []
        for i, role in enumerate(roles):
            weight = weights[role].float()
            rounded = make(weight)
            floor = output_error(weight, rounded, moments) * (PASSED_ON if i == 0 else 1.0)
            self.parts.append((rounded, floor))

    def __call__(self, x: Tensor) -> Tensor:
        """Scores (M, F) of inputs (M, D)."""
        (first, floor), *rest = self.parts
        score = half_log(activate(x @ first.T, self.activation), floor) + self.offset
        for weight, floor in rest:
            score = score + half_log(x @ weight.T, floor)
        return score


def candidates(
    weights: dict[str, Tensor], norms: Tensor, moments: Tensor, shared: Tensor, spec: HostSpec
) -> dict[str, Copies]:
    """Copies of one layer: 1 and 2 bits, and low rank at the bytes of either."""
    make = partial(Copies, weights, norms, moments, kernel_name(spec))
    own = torch.linalg.eigh(moments).eigenvectors.flip(-1).float()
    found = {}
    for bits in (1, 2):

        def rounded(weight: Tensor, bits: int = bits) -> Tensor:
            latent, scale = round_rows(weight, moments, bits)
            return levels_of(latent, scale, bits)

        found[f"copies, {bits} bits"] = make(rounded)
        for name, basis, held in (("low rank", own, 1), ("low rank, shared", shared, spec.L)):
            rank = rank_of(bits, len(weights), spec, held)
            v = basis[:, :rank]
            found[f"{name}, bytes of {bits} bits"] = make(lambda w, v=v: (w @ v) @ v.T)
    return found


def rank_of(bits: int, matrices: int, spec: HostSpec, held: int) -> int:
    """The rank whose int8 factors, the inner shared by ``held`` layers, have as many bytes."""
    return int(matrices * spec.F * spec.D * bits / 8 / (matrices * spec.F + spec.D / held))


class Count:
    """Sums of recall and mass of every candidate, over layers and tokens."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, float], Tensor] = {}

    def add(self, name: str, scores: Tensor, truth: Tensor) -> None:
        """Scores and truth (M, F)."""
        for share in SHARES:
            k = max(1, round(share * truth.shape[1]))
            top = truth.topk(k, -1)
            inside = torch.zeros_like(truth, dtype=torch.bool).scatter_(-1, top.indices, True)
            picked = scores.topk(k, -1, sorted=False).indices
            recall = inside.gather(-1, picked).double().mean(-1)
            mass = truth.gather(-1, picked).sum(-1) / truth.sum(-1)
            of_best = mass / (top.values.sum(-1) / truth.sum(-1))
            new = torch.stack([recall.sum(), mass.double().sum(), of_best.double().sum()])
            new = torch.cat([new, new.new_tensor([len(truth)])])
            key = (name, share)
            self.sums[key] = self.sums[key] + new if key in self.sums else new

    def rows(self) -> Iterator[dict[str, Any]]:
        """One for each candidate and density."""
        for (name, share), sums in self.sums.items():
            recall, mass, of_best = (sums[:3] / sums[3]).tolist()
            yield {
                "candidate": name,
                "neurons": share,
                "recall": round(recall, 5),
                "mass": round(mass, 5),
                "mass_of_best": round(of_best, 5),
                "tokens_times_layers": int(sums[3]),
            }


@torch.no_grad()
def study(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measures every candidate on held-out blocks.

    Raises:
        ValueError: text too short, or a host that cannot be loaded.
    """
    text: Any = EmbeddedText if args.text == "embedded" else partial(FileText, args.text)
    text = text(block=args.block, tokens=args.tokens)
    model, tokenizer = gnomon.load_host(args.host)
    spec = gnomon.describe(model)
    train = text.blocks(tokenizer, "train").ids
    held = text.blocks(tokenizer, "validation", args.blocks * args.block).ids
    moments = ffn_moments(model, spec, train, args.batch)
    shared = torch.linalg.eigh(sum(m / m.trace() for m in moments)).eigenvectors
    shared = shared.flip(-1).float()
    makers, means, inputs = [], mean_magnitudes(model, spec, train, args.batch), {}
    for layer in range(spec.L):
        weights, _, norms = ffn_weights(model, spec, layer)
        makers.append(candidates(dict(weights), norms.float(), moments[layer], shared, spec))
    count = Count()

    def read(layer: int, x: Tensor) -> None:
        inputs[layer] = x.float()

    def score(layer: int, units: Tensor) -> None:
        truth = units.float().abs() * ffn_weights(model, spec, layer)[2].float()
        x = inputs.pop(layer)
        for name, scores in scored(makers[layer], means[layer], x, truth).items():
            count.add(name, scores.flatten(0, 1), truth[:, 1:].flatten(0, 1))

    with HostHooks(model, spec) as hooks:
        for layer in range(spec.L):
            hooks.on_tap(Tap(layer, "ffn_input"), partial(read, layer))
            hooks.on_units("neurons", layer, partial(score, layer))
        for part in held.split(args.batch):
            model(input_ids=part, use_cache=False)
    yield from count.rows()


def scored(copies: dict[str, Copies], mean: Tensor, x: Tensor, truth: Tensor) -> Scores:
    """Scores (B, T − 1, F) of all tokens but the first, which has none before it."""
    found = {name: copy(x.flatten(0, 1)).view_as(truth)[:, 1:] for name, copy in copies.items()}
    past = truth.cumsum(1)[:, :-1] / torch.arange(1, truth.shape[1])[:, None]
    free = {"previous": truth[:, :-1], "prefix": past, "static": mean.expand_as(past)}
    logs = {name: value.clamp_min(1e-9).log() for name, value in free.items()}
    found |= logs
    base = found["copies, 2 bits"]
    for name, other in logs.items():
        found |= {f"copies, 2 bits + {w:g} · {name}": base + w * other for w in LAMBDAS}
    return found


def mean_magnitudes(model: Any, spec: HostSpec, ids: Tensor, batch: int) -> Tensor:
    """Mean magnitude of every neuron over ids (n, block): (L, F)."""
    sums = torch.zeros(spec.L, spec.F)

    def add(layer: int, units: Tensor) -> None:
        sums[layer] += units.float().abs().flatten(0, 1).sum(0)

    with HostHooks(model, spec) as hooks:
        for layer in range(spec.L):
            hooks.on_units("neurons", layer, partial(add, layer))
        for part in ids.split(batch):
            model(input_ids=part, use_cache=False)
    norms = torch.stack([ffn_weights(model, spec, i)[2].float() for i in range(spec.L)])
    return sums / ids.numel() * norms


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Candidates beside few-bit copies")
    parser.add_argument("--host", default="smollm2", help="a name for gnomon.load_host")
    parser.add_argument("--text", default="embedded", help="embedded, or a local file")
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration")
    parser.add_argument("--blocks", type=int, default=8, help="of held-out text")
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4, help="blocks in one forward")
    parser.add_argument("--out", type=Path, default=Path("outputs/features.jsonl"))
    return parser.parse_args(given)


def main() -> None:
    """Appends rows to ``--out`` and prints them."""
    args = arguments()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python benchmarks/features.py", *sys.argv[1:]])
    about = {"host": args.host, "commit": commit(), "versions": versions(), "command": command}
    with args.out.open("a", encoding="utf-8") as file:
        for row in study(args):
            file.write(json.dumps(row | about) + "\n")
            print(
                f"{row['candidate']:32s} {row['neurons']:.1f} recall {row['recall']:.3f} "
                f"mass {row['mass']:.3f}, of the best {row['mass_of_best']:.3f}"
            )
    print(args.out)


if __name__ == "__main__":
    main()
