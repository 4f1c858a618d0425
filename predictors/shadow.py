"""ShadowLLM: one network on an early layer scores every unit of every layer.

Paper: "ShadowLLM: Predictor-based Contextual Sparsity for Large Language Models"
(https://arxiv.org/abs/2406.16635). Deviations: heads and neurons share one trunk with factorised
outputs instead of two networks; the input is any tap (the release reads the attention context of
layer 0 and normalises it by min-max), normalised here by its root mean square; layers before the
tap stay dense by construction instead of being re-enabled after selection; weights are row-scaled
int8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Self

from torch import Tensor

from gnomon.host import KINDS, HostSpec, Tap, UnitKind
from gnomon.predictors.base import Predictor, decidable_from
from gnomon.predictors.linear import LinearStack, StackByKind, rms_normalise

EARLY = Tap(1, "layer_input")


class Shadow(Predictor):
    """code = relu(B relu(A rms(x))); scores of layer l = C_l code + b_l.

    Args:
        L, H, F: layers, heads and neurons of the host.
        width: W, width of the tap.
        tap: the hidden state read. Layers before it stay dense.
        hidden: width of the trunk.
        rank: width of the code that every output row reads.

    Raises:
        ValueError: the tap is outside the host or leaves nothing to decide.
    """

    name = "shadow"

    def __init__(
        self,
        L: int,
        H: int,
        F: int,
        width: int,
        tap: Tap = EARLY,
        hidden: int = 512,
        rank: int = 512,
    ) -> None:
        super().__init__(L, H, F, width, (tap,))
        self.hidden, self.rank = hidden, rank
        if not 0 <= tap.layer < L or decidable_from(tap, "heads") >= L:
            raise ValueError(
                f"predictor.tap={tap.site} of layer {tap.layer} leaves no layer to decide in a "
                f"host of {L} layers; use an earlier layer"
            )
        _require_positive(hidden=hidden, rank=rank)
        self.trunk = LinearStack(1, hidden, width, gain=2**0.5)
        self.squeeze = LinearStack(1, rank, hidden, gain=2**0.5)
        self.outputs = StackByKind(
            {
                kind: LinearStack(L - decidable_from(tap, kind), self.units(kind), rank, gain=0.1)
                for kind in KINDS
            }
        )

    @classmethod
    def for_host(cls, spec: HostSpec, tap: Tap = EARLY, hidden: int = 512, rank: int = 512) -> Self:
        """An untrained predictor sized for a host."""
        return cls(spec.L, spec.H, spec.F, spec.width(tap.site), tap, hidden, rank)

    @property
    def params(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""
        sizes = {"L": self.L, "H": self.H, "F": self.F, "width": self.width}
        return sizes | {"tap": asdict(self.taps[0]), "hidden": self.hidden, "rank": self.rank}

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Self:
        """Builds an untrained predictor from :attr:`params`."""
        return cls(**{**params, "tap": Tap(**params["tap"])})

    def decided_from(self, kind: UnitKind, layer: int) -> Tap | None:
        """The one tap, for every layer that it may decide."""
        tap = self.taps[0]
        return tap if layer >= decidable_from(tap, kind) else None

    def encode(self, tap: Tap, hidden: Tensor) -> Tensor:
        """The trunk: hidden (..., W) -> code (..., rank) fp32."""
        trunk = self.trunk.one(0, rms_normalise(hidden)).relu()
        return self.squeeze.one(0, trunk).relu()

    def score(self, kind: UnitKind, layer: int, code: Tensor) -> Tensor:
        """Scores of one layer: code (..., rank) -> (..., N)."""
        return self.outputs[kind].one(self._require_decided(kind, layer), code)

    def scores_of(self, kind: UnitKind, layers: Sequence[int], code: Tensor) -> Tensor:
        """Scores of several layers, in one GEMM: code (R, rank) -> (R, layers, N)."""
        own = [self._require_decided(kind, layer) for layer in layers]
        scores = self.outputs[kind].shared(code)
        return scores if len(own) == scores.shape[1] else scores[:, own]

    def decided_scores(self, inputs: Tensor) -> dict[UnitKind, Tensor]:
        """inputs (R, 1, W) -> kind -> (R, decided layers, N); one GEMM per kind."""
        code = self.encode(self.taps[0], inputs[:, 0])
        return {kind: self.outputs[kind].shared(code) for kind in KINDS}


def _require_positive(**fields: int) -> None:
    for key, value in fields.items():
        if value < 1:
            raise ValueError(f"predictor.{key}={value}: use 1 or more")
