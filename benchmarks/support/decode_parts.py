"""What a decode benchmark is made of: a random host, its policies, and random caches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from shapes import random_host
from torch import Tensor

import gnomon
from gnomon.budget import Budget
from gnomon.calibration import measure
from gnomon.engine.cache import Cache
from gnomon.engine.engine import Engine
from gnomon.evaluation.decoding import Cell
from gnomon.host import KINDS, HostSpec
from gnomon.policies import (
    Cats,
    Chess,
    DejaVu,
    DenseInt8,
    FFSplit,
    Glass,
    Griffin,
    Policy,
    Random,
    Shadow,
    Sketch,
    SkipSublayers,
    Static,
    Teal,
    TealAttention,
)
from gnomon.predictors.base import QUANTILES, Predictor
from gnomon.predictors.calibration import Calibration
from gnomon.predictors.dejavu import DejaVu as DejaVuPredictor
from gnomon.predictors.shadow import Shadow as ShadowPredictor
from gnomon.predictors.sketch import Sketch as SketchPredictor

BLOCKS, BLOCK = 8, 128  # of random tokens that thresholds are placed on


@dataclass
class Bench:
    """One host and what its rows share."""

    cfg: Any
    shape: str
    model: Any
    spec: HostSpec
    _made: dict[str, Predictor]
    _calibration: Calibration | None = None

    @classmethod
    def build(cls, cfg: Any, shape: str, device: torch.device) -> Bench:
        """Builds the host on the device."""
        model = random_host(shape, dtype=cfg.dtype, device=device, seed=cfg.seed)
        return cls(cfg, shape, model, gnomon.describe(model), {})

    def shadow(self) -> Predictor:
        """A random shadow predictor, int8 as at inference."""
        sizes = {"hidden": self.cfg.hidden, "rank": self.cfg.rank}
        return self._once("shadow", lambda: ShadowPredictor.for_host(self.spec, **sizes))

    def dejavu(self) -> Predictor:
        """Random predictors of every layer, int8."""
        rank = self.cfg.rank
        return self._once("dejavu", lambda: DejaVuPredictor.for_host(self.spec, rank=rank))

    def sketch(self) -> Predictor:
        """Random codes of 2 bits: a step reads and computes the same, whatever they say."""
        if "sketch" not in self._made:
            with torch.device("meta"):  # latent weights in fp32 would be twice the host
                made = SketchPredictor.for_host(self.spec).quantize()
            made = made.to_empty(device=self.model.device)
            for name, tensor in (*made.named_buffers(), *made.named_parameters()):
                whole = not tensor.is_floating_point()
                tensor.random_(0, 127) if whole else tensor.fill_(
                    0.01 * (name.endswith("scale") or name == "neurons_bias")
                )
            self._made["sketch"] = _with_quantiles(made.eval(), self.cfg.seed)
        return self._made["sketch"]

    def calibration(self) -> Calibration:
        """The host's own activations on random tokens: thresholds of any density."""
        if self._calibration is None:
            made = Calibration.for_host(self.spec)
            generator = torch.Generator().manual_seed(self.cfg.seed)
            ids = torch.randint(4, self.spec.V, (BLOCKS, BLOCK), generator=generator)
            measure(made, self.model, self.spec, ids)
            made.info = replace(made.info, host=self.spec.name, spec_hash=self.spec.hash)
            self._calibration = made
        return self._calibration

    def means(self) -> dict[str, Tensor]:
        """Random means: which units a static policy keeps."""
        generator = torch.Generator().manual_seed(self.cfg.seed)
        sizes = {kind: (self.spec.L, self.spec.units(kind)) for kind in KINDS}
        return {kind: torch.rand(size, generator=generator) for kind, size in sizes.items()}

    def _once(self, name: str, make: Callable[[], Predictor]) -> Predictor:
        if name not in self._made:
            torch.manual_seed(self.cfg.seed)
            with self.model.device:
                self._made[name] = make().quantize()
        return self._made[name]


class RandomCache:
    """Begins sequences on random keys and values that both engines share, instead of a prompt.

    The caches of 24 sequences of 4 k tokens of Llama-2-7B alone are 50 GB: with the prompt's own
    and one for each engine no GPU holds them. Time and bytes of a step are the same. Only for
    decisions that are made at every token.
    """

    def __init__(self, bench: Bench, cell: Cell) -> None:
        model, spec = bench.model, bench.spec
        self._cache = Cache(spec, cell.batch, cell.room, model.dtype, model.device)
        for tensor in (*self._cache.keys, *self._cache.values):
            tensor.normal_()

    def __call__(self, engine: Engine, ids: Tensor) -> None:
        """As if the prompts (B, P) were run but for their last token; then one step."""
        if engine.policy is not None and engine.policy.refresh != "token":
            raise ValueError(
                f"cache=random has no prompt that refresh={engine.policy.refresh} could decide "
                "from: use cache=prompt"
            )
        if engine._cache is None:
            engine._cache = copy.copy(self._cache)
            engine._cache.position = self._cache.position.clone()
        engine._cache.position.fill_(ids.shape[1] - 1)
        engine._loop.start(ids[:, -1])
        engine._used, engine._written = ids.shape[1] - 1, 0
        engine.step()


Make = Callable[["Bench", Budget], Policy]
POLICIES: dict[str, Make] = {
    "shadow": lambda b, k: Shadow(b.shadow(), k, "token", b.cfg.policy_batch),
    "dejavu": lambda b, k: DejaVu(b.dejavu(), k, "token", b.cfg.policy_batch),
    "sketch": lambda b, k: Sketch(b.sketch(), k, "token", b.cfg.policy_batch),
    "sketch_threshold": lambda b, k: Sketch(b.sketch(), replace(k, heads=1.0), choose="threshold"),
    "prompt": lambda b, k: Shadow(b.shadow(), k, "prompt", b.cfg.policy_batch, "drop"),
    "prompt_keep": lambda b, k: Shadow(b.shadow(), k, "prompt", b.cfg.policy_batch),
    "static": lambda b, k: Static(b.means(), k, b.cfg.policy_batch, "drop"),
    "static_keep": lambda b, k: Static(b.means(), k, b.cfg.policy_batch),
    "griffin": lambda b, k: Griffin(_neurons(k), b.cfg.policy_batch),
    "glass": lambda b, k: Glass(b.means(), _neurons(k), b.cfg.policy_batch),
    "skip_attention": lambda b, k: SkipSublayers(k, what="attention"),
    "skip_layers": lambda b, k: SkipSublayers(k, what="layer"),
    "random": lambda b, k: Random(k, batch=b.cfg.policy_batch),
    "cats": lambda b, k: Cats(b.calibration(), _neurons(k)),
    "chess": lambda b, k: Chess(b.calibration(), k),
    "chess_ffn": lambda b, k: Chess(b.calibration(), _neurons(k), attention=False),
    "teal": lambda b, k: Teal(b.calibration(), k),
    "teal_attention": lambda b, k: TealAttention(b.calibration(), Sketch(b.sketch(), k)),
    "ffsplit": lambda b, k: FFSplit(b.means(), _neurons(k)),
    "ffsplit_int4": lambda b, k: FFSplit(b.means(), _neurons(k), rest="int4"),
    "dense_int8": lambda b, k: DenseInt8(),
}

THRESHOLDS = {"cats", "chess", "chess_ffn", "teal", "teal_attention"}


def _with_quantiles(sketch: SketchPredictor, seed: int) -> SketchPredictor:
    """Places of thresholds: what the codes say of 16 random inputs of unit variance."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, sketch.width, generator=generator).to(sketch.floors.device)
    shares = torch.linspace(0, 1, QUANTILES, device=x.device)
    for layer in range(sketch.L):
        scores = sketch.score("neurons", layer, x).flatten()
        place = (shares * (scores.numel() - 1)).round().long()
        sketch.quantiles["neurons"][layer] = scores.sort().values[place]
    return sketch


def _neurons(budget: Budget) -> Budget:
    """The budget of a policy that decides neurons alone."""
    return replace(budget, heads=None)
