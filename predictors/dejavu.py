"""DejaVu: one low-rank network per layer and kind, reading that layer or one a few layers earlier.

Paper: "Deja Vu: Contextual Sparsity for Efficient LLMs at Inference Time"
(https://arxiv.org/abs/2310.17157). Deviations: a ReLU between the two linears (the release has
none: ``activation=False``); the output has a bias, so that training starts at the fixed choice; the
input is normalised by its root mean square; weights are row-scaled int8.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from gnomon.host import KINDS, HostSpec, Site, Tap, UnitKind
from gnomon.predictors.base import Predictor, decidable_from
from gnomon.predictors.linear import LinearStack, StackByKind, rms_normalise
from gnomon.predictors.shadow import _require_positive


class DejaVu(Predictor):
    """scores of layer l = B_l relu(A_l rms(x)) + b_l, with x tapped ``lookahead`` layers before l.

    Args:
        L, H, F: layers, heads and neurons of the host.
        width: W, width of every tap.
        rank: inner width of each network.
        lookahead: layers between the tap and the layer it decides; the first ones stay dense.
        heads_site, neurons_site: where each kind is read.
        activation: ReLU between the two linears; False as in the release.

    Raises:
        ValueError: a site that does not exist yet when its units are decided, or no layer left.
    """

    name = "dejavu"

    def __init__(
        self,
        L: int,
        H: int,
        F: int,
        width: int,
        rank: int = 128,
        lookahead: int = 0,
        heads_site: Site = "layer_input",
        neurons_site: Site = "ffn_input",
        activation: bool = True,
    ) -> None:
        if not 0 <= lookahead < L:
            raise ValueError(f"predictor.lookahead={lookahead}: use 0 to {L - 1} in {L} layers")
        _require_positive(rank=rank)
        self._sites: dict[UnitKind, Site] = {"heads": heads_site, "neurons": neurons_site}
        for kind, site in self._sites.items():
            if decidable_from(Tap(0, site), kind) > lookahead:
                raise ValueError(
                    f"predictor.{kind}_site={site!r} exists only after the {kind} of its layer "
                    "have run; use layer_input or attn_input, or predictor.lookahead of 1 or more"
                )
        taps = {Tap(i, site) for i in range(L - lookahead) for site in self._sites.values()}
        super().__init__(L, H, F, width, tuple(sorted(taps)))
        self.rank, self.lookahead, self.activation = rank, lookahead, activation
        free = L - lookahead
        self.inner = StackByKind(
            {kind: LinearStack(free, rank, width, bias=False) for kind in KINDS}
        )
        self.outputs = StackByKind(
            {kind: LinearStack(free, self.units(kind), rank, gain=0.1) for kind in KINDS}
        )
        self._order = {
            kind: [self.taps.index(Tap(i, site)) for i in range(free)]
            for kind, site in self._sites.items()
        }

    @classmethod
    def for_host(
        cls,
        spec: HostSpec,
        rank: int = 128,
        lookahead: int = 0,
        heads_site: Site = "layer_input",
        neurons_site: Site = "ffn_input",
        activation: bool = True,
    ) -> Self:
        """An untrained predictor sized for a host."""
        width = spec.width(heads_site)
        if spec.width(neurons_site) != width:
            raise ValueError(
                f"predictor.heads_site={heads_site!r} is {width} wide, predictor.neurons_site="
                f"{neurons_site!r} {spec.width(neurons_site)}; use sites of one width"
            )
        return cls(
            spec.L, spec.H, spec.F, width, rank, lookahead, heads_site, neurons_site, activation
        )

    @property
    def params(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""
        return {
            "L": self.L,
            "H": self.H,
            "F": self.F,
            "width": self.width,
            "rank": self.rank,
            "lookahead": self.lookahead,
            "heads_site": self._sites["heads"],
            "neurons_site": self._sites["neurons"],
            "activation": self.activation,
        }

    def decided_from(self, kind: UnitKind, layer: int) -> Tap | None:
        """The tap ``lookahead`` layers before; None for the first layers."""
        source = layer - self.lookahead
        return Tap(source, self._sites[kind]) if source >= 0 else None

    def encode(self, tap: Tap, hidden: Tensor) -> Tensor:
        """hidden (..., W) -> the same, normalised, fp32: layers share nothing else."""
        return rms_normalise(hidden)

    def score(self, kind: UnitKind, layer: int, code: Tensor) -> Tensor:
        """Scores of one layer: code (..., W) -> (..., N)."""
        i = self._require_decided(kind, layer)
        return self.outputs[kind].one(i, self._activate(self.inner[kind].one(i, code)))

    def decided_scores(self, inputs: Tensor) -> dict[UnitKind, Tensor]:
        """inputs (R, n_taps, W) -> kind -> (R, decided layers, N); two batched GEMMs per kind."""
        code = rms_normalise(inputs).transpose(0, 1)
        scores: dict[UnitKind, Tensor] = {}
        for kind in KINDS:
            rows = code[torch.tensor(self._order[kind], device=code.device)]
            inner = self._activate(self.inner[kind].grouped(rows))
            scores[kind] = self.outputs[kind].grouped(inner).transpose(0, 1)
        return scores

    def _activate(self, x: Tensor) -> Tensor:
        return x.relu() if self.activation else x
