"""Sketch: few-bit copies of the FFN's own projections say which neurons will matter.

What a neuron adds to the residual stream has the magnitude |act(x·w_gate) (x·w_up)| ‖w_down‖, all
of which the host holds. A sketch keeps the gate and up projections in 1 to 4 bits, rounded so that
their outputs change least (:mod:`gnomon.predictors.rounding`), and scores by what they give:

    score = ½ log(act(x Ĝᵀ)² + γ) + ½ log((x Ûᵀ)² + υ) + b,    b = log ‖w_down‖ to begin with

so that it needs no training: ``trainer.max_steps=0``. υ is the mean square by which x Ûᵀ errs on
calibration text, γ a tenth of that of x Ĝᵀ: a neuron is not taken for nothing because a coarse copy
of one of its factors gives nothing. At 2 bits it reads an eighth of the bf16 projections that it
copies. ``objective=kl`` with ``tune=True`` trains copies, scales and b end to end. Heads have a
low-rank network each (as DejaVu's), which starts at the fixed choice.

No paper: SparseInfer (https://arxiv.org/abs/2411.12692) decides by the sign bits of gate and input
alone, for ReLU; 1-bit copies of an FFN without a gate are its relatives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from gnomon.activation import kernel_name
from gnomon.host import HostSpec, Site, Tap, UnitKind
from gnomon.kernels.fewbit import PLANES
from gnomon.kernels.gather_common import activate
from gnomon.kernels.sketch_scores import half_log, sketch_scores
from gnomon.predictors.base import Predictor, decidable_from
from gnomon.predictors.fewbit import FewBitStack
from gnomon.predictors.linear import LinearStack, StackByKind, rms_normalise
from gnomon.predictors.rounding import levels_of, output_error, round_rows

PASSED_ON = 0.1  # share of the error before an activation that is left after it (on SmolLM2)


class Sketch(Predictor):
    """Scores neurons from the input of their own FFN, heads from that of their layer.

    Args:
        L, H, F: layers, heads and neurons of the host.
        width: D, width of every tap.
        activation: of the FFN, by the kernels' name.
        gated: whether the FFN has a gate.
        bias: whether its gate and up projections have one; :meth:`adopt` adds it where they do.
        bits: of a weight of the copies, 1 to 4.
        up_bits: of those of the up projection; None: ``bits``. Only of a gated FFN.
        rank: inner width of the heads' networks.
        heads_site: where heads are decided from.
        tune: whether the copies are trained; row objectives train the heads' networks alone.
        tokens: of the training text, on whose FFN inputs the rounding errs least.

    Raises:
        ValueError: bits that are not offered, or a site that heads cannot be decided from.
    """

    name = "sketch"
    contents = (
        "It holds few-bit copies of the\nhost's gate and up projections, to which the host's "
        "licence applies."
    )
    floors: Tensor

    def __init__(
        self,
        L: int,
        H: int,
        F: int,
        width: int,
        activation: str,
        gated: bool = True,
        bias: bool = False,
        bits: int = 2,
        up_bits: int | None = None,
        rank: int = 32,
        heads_site: Site = "layer_input",
        tune: bool = False,
        tokens: int = 16384,
    ) -> None:
        if decidable_from(Tap(0, heads_site), "heads") > 0:
            raise ValueError(
                f"predictor.heads_site={heads_site!r} exists only after the heads of its layer "
                "have run; use layer_input or attn_input"
            )
        own_bits = {"bits": bits} | ({} if up_bits is None else {"up_bits": up_bits})
        for key, value in own_bits.items():
            if value not in PLANES:
                raise ValueError(f"predictor.{key}={value}: use {', '.join(map(str, PLANES))}")
        for key, value in {"rank": rank, "tokens": tokens}.items():
            if value < 1:
                raise ValueError(f"predictor.{key}={value}: use 1 or more")
        taps = {Tap(i, site) for i in range(L) for site in (heads_site, "ffn_input")}
        super().__init__(L, H, F, width, tuple(sorted(taps)))
        self.activation, self.gated, self.bias, self.tune = activation, gated, bias, tune
        self.bits, self.up_bits = bits, bits if up_bits is None or not gated else up_bits
        self.rank, self.heads_site, self.tokens = rank, heads_site, tokens
        self.gate = FewBitStack(L, F, width, bits, bias=bias) if gated else None
        self.up = FewBitStack(L, F, width, self.up_bits, bias=bias)
        self.neurons_bias = nn.Parameter(torch.zeros(L, F))
        self.register_buffer("floors", torch.zeros(2 if gated else 1, L, F))
        self._train_copies(tune)
        self.inner = StackByKind({"heads": LinearStack(L, rank, width, bias=False)})
        self.outputs = StackByKind({"heads": LinearStack(L, H, rank, gain=0.0)})
        self._places = {site: self._taps_at(site) for site in (heads_site, "ffn_input")}

    @classmethod
    def for_host(
        cls,
        spec: HostSpec,
        bits: int = 2,
        up_bits: int | None = None,
        rank: int = 32,
        heads_site: Site = "layer_input",
        tune: bool = False,
        tokens: int = 16384,
    ) -> Self:
        """An empty one, sized for a host; :mod:`gnomon.sketching` fills it."""
        return cls(
            *(spec.L, spec.H, spec.F, spec.D, kernel_name(spec), spec.gated, False),
            *(bits, up_bits, rank, heads_site, tune, tokens),
        )

    @property
    def params(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able, but for how it is filled and trained."""
        sizes = {"L": self.L, "H": self.H, "F": self.F, "width": self.width}
        ffn = {"activation": self.activation, "gated": self.gated, "bias": self.bias}
        own = {"bits": self.bits, "up_bits": self.up_bits, "rank": self.rank}
        return sizes | ffn | own | {"heads_site": self.heads_site}

    @property
    def copies(self) -> list[FewBitStack]:
        """The few-bit copies: what is activated first."""
        return [self.up] if self.gate is None else [self.gate, self.up]

    @torch.no_grad()
    def adopt(
        self,
        layer: int,
        weights: Mapping[str, Tensor],
        biases: Mapping[str, Tensor],
        norms: Tensor,
        moments: Tensor,
    ) -> None:
        """Copies the FFN of one layer.

        Args:
            layer: whose.
            weights: ``up`` and, with a gate, ``gate``: (F, D) in the host's dtype.
            biases: the same, (F,); empty without.
            norms: ‖w_down‖ of every neuron, (F,).
            moments: (D, D) mean of x xᵀ over calibration tokens.
        """
        if biases:
            self._add_biases()
        roles = ("gate", "up") if self.gated else ("up",)
        for i, (role, copy) in enumerate(zip(roles, self.copies, strict=True)):
            weight = weights[role].to(moments.device).float()
            latent, scale = round_rows(weight, moments, copy.bits)
            copy.adopt(layer, latent, scale, biases.get(role))
            error = output_error(weight, levels_of(latent, scale, copy.bits), moments)
            self.floors[i, layer].copy_(error * (PASSED_ON if i == 0 else 1.0))
        self.neurons_bias[layer].copy_(norms.float().clamp_min(1e-9).log())

    def follow(self, found: Predictor) -> None:
        """Biases, where the host has them."""
        if isinstance(found, Sketch) and found.bias:
            self._add_biases()

    def freeze(self, kind: UnitKind) -> None:
        """Heads' networks, or the copies."""
        super().freeze(kind)
        if kind == "neurons":
            self._train_copies(False)

    def decided_from(self, kind: UnitKind, layer: int) -> Tap | None:
        """Neurons from their own FFN's input, heads from their layer's."""
        return Tap(layer, self.heads_site if kind == "heads" else "ffn_input")

    def encode(self, tap: Tap, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> fp32: as it is for neurons, normalised for heads."""
        return hidden.float() if tap.site == "ffn_input" else rms_normalise(hidden)

    def score(self, kind: UnitKind, layer: int, code: Tensor) -> Tensor:
        """Scores of one layer: code (..., D) -> (..., N)."""
        self._require_decided(kind, layer)
        if kind == "heads":
            return self.outputs[kind].one(layer, self.inner[kind].one(layer, code).relu())
        if not self.quantized:
            parts = [copy.one(layer, code) for copy in self.copies]
            return self._combined(parts, self.floors[:, layer], self.neurons_bias[layer])
        found: Tensor = sketch_scores(code.reshape(-1, self.width), **self.operands(layer))
        return found.view(*code.shape[:-1], self.F)

    def operands(self, layer: int) -> dict[str, Any]:
        """What ``sketch_scores`` takes beside x for one layer, rounded as at inference."""
        first, second = self.copies[0], self.copies[1] if self.gated else None
        found = {
            "inner": first.codes[layer],
            "inner_scale": first.scale[layer],
            "inner_bits": first.bits,
            "activation": self.activation,
            "offset": self.neurons_bias[layer].detach(),
            "inner_bias": None if first.bias is None else first.bias[layer],
            "inner_floor": self.floors[0, layer],
        }
        if second is None:
            return found
        return found | {
            "linear": second.codes[layer],
            "linear_scale": second.scale[layer],
            "linear_bits": second.bits,
            "linear_bias": None if second.bias is None else second.bias[layer],
            "linear_floor": self.floors[1, layer],
        }

    def decided_scores(self, inputs: Tensor) -> dict[UnitKind, Tensor]:
        """inputs (R, n_taps, D) -> kind -> (R, L, N); rows train the heads' networks alone."""
        rows = inputs.transpose(0, 1)
        heads = rms_normalise(rows[self._places[self.heads_site]])
        inner = self.inner["heads"].grouped(heads).relu()
        with torch.no_grad():
            x = rows[self._places["ffn_input"]].float()
            neurons = torch.stack([self.score("neurons", i, x[i]) for i in range(self.L)], dim=1)
        return {
            "heads": self.outputs["heads"].grouped(inner).transpose(0, 1),
            "neurons": neurons,
        }

    @property
    def stored(self) -> str:
        """Bits of the copies; the rest is int8."""
        bits = dict.fromkeys(copy.bits for copy in self.copies)
        return f"{' and '.join(map(str, bits))}-bit copies, int8"

    def bytes_for(self, kinds: Any) -> int:
        """Bytes read when only these kinds are scored."""
        heads = sum(part["heads"].nbytes for part in (self.inner, self.outputs))
        own = sum(copy.nbytes for copy in self.copies)
        neurons = own + 4 * (self.neurons_bias.numel() + self.floors.numel())
        return heads * ("heads" in kinds) + neurons * ("neurons" in kinds)

    @property
    def nbytes(self) -> int:
        """Bytes read when every unit is scored once."""
        return self.bytes_for(("heads", "neurons"))

    def set_output_bias(self, bias: Mapping[UnitKind, Tensor]) -> None:
        """Heads start at the fixed choice, (L, H); neurons need none."""
        own = self.outputs["heads"].bias
        assert own is not None
        with torch.no_grad():
            own.copy_(bias["heads"])

    def quantize(self) -> Self:
        """Rounds everything as it is used at inference, in place; training ends here."""
        self.neurons_bias.requires_grad_(False)
        return super().quantize()

    def dequantize(self) -> Self:
        """Turns the weights back into parameters: copies to train where ``tune`` says so."""
        super().dequantize()
        self._train_copies(self.tune)
        return self

    def _train_copies(self, train: bool) -> None:
        for part in self.copies:
            part.requires_grad_(train)
        self.neurons_bias.requires_grad_(train)

    def _add_biases(self) -> None:
        if not self.bias:
            self.bias = True
            for copy in self.copies:
                copy.add_bias(self.tune)

    def _combined(self, parts: list[Tensor], floors: Tensor, bias: Tensor) -> Tensor:
        score = half_log(activate(parts[0], self.activation), floors[0]) + bias
        return score if len(parts) == 1 else score + half_log(parts[1], floors[1])

    def _taps_at(self, site: str) -> list[int]:
        return [i for i, tap in enumerate(self.taps) if tap.site == site]
