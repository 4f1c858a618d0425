"""The lists that drive every generic test: policies, and the hosts they are tried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from gnomon import policies
from gnomon.budget import Budget
from gnomon.calibration import measure
from gnomon.host import Tap, describe
from gnomon.policies.base import Policy
from gnomon.predictors.base import Predictor
from gnomon.predictors.calibration import Calibration
from gnomon.predictors.dejavu import DejaVu
from gnomon.predictors.prior import Prior
from gnomon.predictors.shadow import Shadow
from gnomon.predictors.sketch import Sketch
from gnomon.sketching import ffn_weights

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "opt"]


def predictor(model: PreTrainedModel, kind: str = "shadow", **params: Any) -> Predictor:
    """A random predictor that claims to be trained for the host."""
    spec = describe(model)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        cls = {"shadow": Shadow, "dejavu": DejaVu, "sketch": Sketch, "prior": Prior}[kind]
        sizes = {} if kind == "prior" else {"rank": 8}
        sizes |= {"hidden": 16} if kind == "shadow" else {}
        made = cls.for_host(spec, **(sizes | params))
        with torch.no_grad():
            for name, p in made.named_parameters():
                if not name.startswith("tilt"):  # of a spread that was learned
                    p.add_(torch.randn_like(p))
        if isinstance(made, Sketch):  # whatever the moments, it copies its host
            for layer in range(spec.L):
                made.adopt(layer, *ffn_weights(model, spec, layer), torch.eye(spec.D))
        made.set_means({"heads": torch.rand(spec.L, spec.H), "neurons": torch.rand(spec.L, spec.F)})
        rows = torch.randn(64, len(made.taps), made.width)
        q = torch.linspace(0, 1, 201)
        table = {
            k: torch.stack([torch.quantile(s[:, i].flatten(), q) for i in range(spec.L)])
            for k, s in made(rows).items()
        }
        for k, row in table.items():  # of layers that stay dense there are none
            row[: made.first(k)] = torch.nan
        made.calibrate({k: v.detach() for k, v in table.items()})
    made.info = replace(made.info, host=spec.name, spec_hash=spec.hash)
    return made


def tilted(made: Predictor) -> Predictor:
    """With a spread that was learned."""
    with torch.no_grad():
        for tilt in made.tilts.values():
            tilt.copy_(torch.linspace(-1.0, 1.5, len(tilt)))
    return made


def calibration(model: PreTrainedModel, ids: torch.Tensor | None = None) -> Calibration:
    """A calibration of the host on random tokens, or on ids (n, block)."""
    spec = describe(model)
    if ids is None:
        ids = torch.randint(0, 256, (32, 32), generator=torch.Generator().manual_seed(9))
    made = Calibration.for_host(spec)
    measure(made, model, spec, ids, batch=16)
    made.info = replace(made.info, host=spec.name, spec_hash=spec.hash, criterion="magnitude")
    return made


def neurons(budget: Budget) -> Budget:
    """The budget of a policy that decides neurons alone."""
    return replace(budget, heads=None)


Make = Callable[[PreTrainedModel, Budget], Policy]
POLICIES: dict[str, Make] = {
    "random": lambda m, b: policies.Random(b),
    "random-prompt": lambda m, b: policies.Random(b, refresh="prompt"),
    "oracle": lambda m, b: policies.Oracle(b),
    "static": lambda m, b: policies.Static(predictor(m), b),
    "shadow": lambda m, b: policies.Shadow(predictor(m), b),
    "shadow-prompt": lambda m, b: policies.Shadow(predictor(m), b, refresh="prompt"),
    "shadow-context": lambda m, b: policies.Shadow(predictor(m, tap=Tap(0, "attn_context")), b),
    "shadow-threshold": lambda m, b: policies.Shadow(predictor(m), b, choose="threshold"),
    "dejavu-learned": lambda m, b: policies.DejaVu(
        tilted(predictor(m, "dejavu")), replace(b, spread="learned")
    ),
    "shadow-shared": lambda m, b: policies.Shadow(predictor(m), b, batch="shared"),
    "dejavu": lambda m, b: policies.DejaVu(predictor(m, "dejavu"), b),
    "dejavu-lookahead": lambda m, b: policies.DejaVu(
        predictor(m, "dejavu", lookahead=1, neurons_site="layer_input"), b
    ),
    "dejavu-prompt": lambda m, b: policies.DejaVu(predictor(m, "dejavu"), b, refresh="prompt"),
    "sketch": lambda m, b: policies.Sketch(predictor(m, "sketch").quantize(), b),
    "sketch-shared": lambda m, b: policies.Sketch(
        predictor(m, "sketch", bits=3, up_bits=1).quantize(), b, batch="shared"
    ),
    "sketch-threshold": lambda m, b: policies.Sketch(
        predictor(m, "sketch").quantize(), b, choose="threshold"
    ),
    "griffin-prompt": lambda m, b: policies.Griffin(neurons(b)),
    "griffin-sampling-prompt": lambda m, b: policies.Griffin(neurons(b), variant="sampling"),
    "griffin-shared-prompt": lambda m, b: policies.Griffin(neurons(b), batch="shared"),
    "griffin-magnitude": lambda m, b: policies.Griffin(neurons(b), variant="magnitude"),
    "glass-prompt": lambda m, b: policies.Glass(predictor(m), neurons(b)),
    "prior-prompt": lambda m, b: policies.Prior(predictor(m, "prior"), neurons(b)),
    "prior-shared-prompt": lambda m, b: policies.Prior(
        predictor(m, "prior"), neurons(b), batch="shared"
    ),
    "cats": lambda m, b: policies.Cats(calibration(m), neurons(b)),
    "chess": lambda m, b: policies.Chess(calibration(m), b),
    "chess-ffn": lambda m, b: policies.Chess(calibration(m), neurons(b), attention=False),
    "teal": lambda m, b: policies.Teal(calibration(m), b),
    "teal-of-sketch": lambda m, b: policies.TealAttention(
        calibration(m), policies.Sketch(predictor(m, "sketch").quantize(), b)
    ),
    "teal-of-context": lambda m, b: policies.TealAttention(
        calibration(m), policies.Shadow(predictor(m, tap=Tap(0, "attn_context")), b)
    ),
    "skip-attention": lambda m, b: policies.SkipSublayers(replace(b, neurons=None)),
    "skip-ffn": lambda m, b: policies.SkipSublayers(neurons(b), what="ffn"),
    "core-of-shadow": lambda m, b: policies.Core(
        predictor(m), policies.Shadow(predictor(m), b), share=0.1
    ),
    "fallback-of-shadow": lambda m, b: policies.DenseFallback(policies.Shadow(predictor(m), b)),
    "ffsplit-of-shadow": lambda m, b: policies.FFSplit(
        predictor(m),
        inner=policies.Shadow(predictor(m), b),
        heavy=1.0 if b.density == 1 else 0.125,
    ),
    "skip-layers-of-griffin-prompt": lambda m, b: policies.SkipSublayers(
        inner=policies.Griffin(neurons(b)),
        what="layer",
        layers=() if b.density == 1 else (1,),
    ),
}
GATED_ONLY = ("cats", "chess", "chess-ffn")  # refused on hosts without a gate
THRESHOLDS = (*GATED_ONLY, "teal")  # met in the mean over calibration tokens
IN_THE_MEAN = (*THRESHOLDS, "sketch-threshold", "shadow-threshold")  # of whatever text


def families_of(name: str) -> list[str]:
    """The families of hosts that a policy applies to."""
    return [family for family in FAMILIES if not (name in GATED_ONLY and family == "opt")]


STATIC_POLICIES = ["static", "griffin-magnitude", "skip-attention", "skip-ffn"]
TOKEN_POLICIES = [n for n in POLICIES if "prompt" not in n and n not in STATIC_POLICIES]
PROMPT_POLICIES = [n for n in POLICIES if "prompt" in n]
GENERIC_ONLY = ("oracle", "ffsplit-of-shadow")
ENGINE_POLICIES = [n for n in POLICIES if n not in GENERIC_ONLY]
BACKENDS = ["mask", "torch", "triton"]
