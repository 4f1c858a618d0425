"""Predictors: small networks from a hidden state of the host to a score of every unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from gnomon.allocation import Tilt
from gnomon.host import KINDS, HostSpec, Tap, UnitKind
from gnomon.predictors.linear import Stack, StackByKind

QUANTILES = 201  # predicted-score quantiles kept per layer: every half percent of density


@dataclass(frozen=True)
class PredictorInfo:
    """What a predictor was trained on and how well it did; every field is written to config.json.

    Attributes:
        host, revision, spec_hash: the host it belongs to.
        criterion, objective, granularity: what its scores mean.
        text, text_digest, trace_hash: its text, and its trace store (None when trained online).
        text_split: which documents it saw (``Text.facts``): seed, held-out share, fingerprint and
            what else the source has; empty in folders written before it was recorded.
        tokens: training tokens that were harvested, or in one epoch online.
        metrics: held-out metrics (docs/predictors.md lists the keys).
    """

    host: str = ""
    revision: str = ""
    spec_hash: str = ""
    criterion: str = ""
    objective: str = ""
    granularity: str = ""
    text: str = ""
    text_digest: str = ""
    text_split: dict[str, Any] = field(default_factory=dict)
    trace_hash: str | None = None
    tokens: int = 0
    seed: int = 0
    created: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)


class Predictor(nn.Module, PyTorchModelHubMixin):
    """Base class: scores (higher = keep) of heads (L, H) and neurons (L, F) from taps of the host.

    A subclass sets ``name``, builds ``self.outputs`` (one :class:`LinearStack` per kind, one linear
    per decided layer) and implements :meth:`decided_from`, :meth:`decided_scores`, :meth:`score`.
    Layers that a kind cannot be decided for come first and must stay dense.
    """

    name: ClassVar[str]
    contents: ClassVar[str] = "It holds no weights of the host."  # for the model card
    subject: ClassVar[str] = "every attention head and FFN neuron"  # likewise: what it scores
    reads: ClassVar[str | None] = None  # likewise: what from; None: its taps
    learned_means: ClassVar[bool] = False  # its means are scores that it learned, not harvested
    undecayed: ClassVar[tuple[str, ...]] = ("bias",)  # ends of names that weight decay spares
    registry: ClassVar[dict[str, type[Predictor]]] = {}
    outputs: StackByKind

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            Predictor.registry[cls.name] = cls

    def __init__(self, L: int, H: int, F: int, width: int, taps: tuple[Tap, ...]) -> None:
        super().__init__()
        self.L, self.H, self.F, self.width, self.taps = L, H, F, width, taps
        self.info = PredictorInfo()
        self._first: dict[UnitKind, int] = {}
        for kind in KINDS:
            n = self.units(kind)
            self.register_buffer(f"means_{kind}", torch.zeros(L, n))
            self.register_buffer(f"quantiles_{kind}", torch.full((L, QUANTILES), torch.nan))
            self.register_parameter(f"tilt_{kind}", nn.Parameter(torch.zeros(L), False))

    # -- what a subclass says -------------------------------------------------------------------

    @property
    def params(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able; :meth:`from_params` takes them back."""
        raise NotImplementedError

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Self:
        """Builds an untrained predictor from :attr:`params`."""
        return cls(**params)

    def decided_from(self, kind: UnitKind, layer: int) -> Tap | None:
        """The tap that decides a layer's units, or None where they must stay dense."""
        raise NotImplementedError

    def encode(self, tap: Tap, hidden: Tensor) -> Tensor:
        """Work shared by the layers that read a tap, done once: hidden (..., W) -> (..., C)."""
        raise NotImplementedError

    def score(self, kind: UnitKind, layer: int, code: Tensor) -> Tensor:
        """Scores of one decided layer: code (..., C) -> (..., N)."""
        raise NotImplementedError

    def scores_of(self, kind: UnitKind, layers: Sequence[int], code: Tensor) -> Tensor:
        """Scores of several layers that one tap decides: code (R, C) -> (R, layers, N)."""
        if len(layers) == 1:  # a view: no launch of its own in a decode step
            return self.score(kind, layers[0], code)[:, None]
        return torch.stack([self.score(kind, layer, code) for layer in layers], dim=1)

    def decided_scores(self, inputs: Tensor) -> dict[UnitKind, Tensor]:
        """Scores of the decided layers: inputs (R, n_taps, W) -> kind -> (R, decided layers, N)."""
        raise NotImplementedError

    # -- what every predictor does --------------------------------------------------------------

    def forward(self, inputs: Tensor) -> dict[UnitKind, Tensor]:
        """inputs (R, n_taps, W) -> heads (R, L, H), neurons (R, L, F); dense layers are zero."""
        scores = self.decided_scores(inputs)
        return {
            kind: nn.functional.pad(scores[kind], (0, 0, self.first(kind), 0)) for kind in KINDS
        }

    def units(self, kind: UnitKind) -> int:
        """Units of one layer: H or F."""
        return self.H if kind == "heads" else self.F

    def decided(self, kind: UnitKind) -> Tensor:
        """(L,) bool: which layers the predictor decides."""
        return torch.tensor([self.decided_from(kind, i) is not None for i in range(self.L)])

    def first(self, kind: UnitKind) -> int:
        """The first decided layer; all before it stay dense."""
        if kind not in self._first:
            decided = (i for i in range(self.L) if self.decided_from(kind, i) is not None)
            self._first[kind] = next(decided)
        return self._first[kind]

    @property
    def means(self) -> dict[UnitKind, Tensor]:
        """Mean harvested score of every unit, kind -> (L, N) fp32: what ``static`` ranks by."""
        return {kind: getattr(self, f"means_{kind}") for kind in KINDS}

    @property
    def quantiles(self) -> dict[UnitKind, Tensor]:
        """Quantiles (at 0, 0.005, … 1) of held-out predicted scores, kind -> (L, 201).

        NaN before :meth:`calibrate` and in layers that stay dense.
        """
        return {kind: getattr(self, f"quantiles_{kind}") for kind in KINDS}

    @property
    def tilts(self) -> dict[UnitKind, nn.Parameter]:
        """Logits by which the layers' shares of a budget differ, kind -> (L,): ``spread=learned``.

        Zero, and without a gradient, until :meth:`learn_spread`.
        """
        return {kind: getattr(self, f"tilt_{kind}") for kind in KINDS}

    @property
    def has_tilt(self) -> bool:
        """Whether a spread was learned."""
        return any(bool(tilt.any()) for tilt in self.tilts.values())

    def learn_spread(self) -> None:
        """Trains the tilts too."""
        for tilt in self.tilts.values():
            tilt.requires_grad_(True)

    def forget_spread(self) -> None:
        """Drops the tilts: what is trained next has the same share in every layer."""
        for tilt in self.tilts.values():
            tilt.requires_grad_(False).zero_()

    def tilt(self) -> Tilt:
        """The tilts as they are now.

        Raises:
            ValueError: none were learned.
        """
        tilts = self.tilts
        if not (self.has_tilt or any(tilt.requires_grad for tilt in tilts.values())):
            raise ValueError(
                f"budget.spread='learned': this {self.name} predictor holds no spread that was "
                "learned: train one with objective=kl student.spread=learned (predictor=shadow, "
                "dejavu, sketch, prior or static), or use budget.spread=layer"
            )
        return Tilt(*(tuple(tilts[kind].detach().double().tolist()) for kind in KINDS))

    @property
    def quantized(self) -> bool:
        """Whether the weights are rounded as they are used at inference."""
        return all(m.quantized for m in self.modules() if isinstance(m, Stack))

    @property
    def stored(self) -> str:
        """How the weights are stored once quantised, for the record."""
        return "int8"

    @property
    def nbytes(self) -> int:
        """Bytes read when every unit is scored once: weights as they are now, scales and biases."""
        return sum(m.nbytes for m in self.modules() if isinstance(m, Stack))

    def bytes_for(self, kinds: Sequence[UnitKind]) -> int:
        """Bytes read when only these kinds are scored; a kind's own networks bear its name."""
        other = {kind for kind in KINDS if kind not in kinds}
        return sum(
            m.nbytes
            for path, m in self.named_modules()
            if isinstance(m, Stack) and path.rpartition(".")[2] not in other
        )

    def set_means(self, means: Mapping[UnitKind, Tensor]) -> None:
        """Stores the per-unit means, kind -> (L, N)."""
        for kind in KINDS:
            self.means[kind].copy_(means[kind])

    @torch.no_grad()
    def set_output_bias(self, bias: Mapping[UnitKind, Tensor]) -> None:
        """Sets the output biases, kind -> (L, N), so that training starts at the fixed choice."""
        for kind in KINDS:
            own = self.outputs[kind].bias
            if own is not None:
                own.copy_(bias[kind][self.first(kind) :])

    def calibrate(self, quantiles: Mapping[UnitKind, Tensor]) -> None:
        """Stores quantiles of held-out predicted scores, kind -> (L, QUANTILES)."""
        for kind in KINDS:
            self.quantiles[kind].copy_(quantiles[kind])

    def quantize(self) -> Self:
        """Rounds the weights as they are used at inference, in place; training ends here."""
        for m in self.modules():
            if isinstance(m, Stack):
                m.quantize()
        return self

    def dequantize(self) -> Self:
        """Turns rounded weights back into fp32 parameters, in place: training can go on."""
        for m in self.modules():
            if isinstance(m, Stack):
                m.dequantize()
        return self

    def freeze(self, kind: UnitKind) -> None:
        """Takes the gradient from what scores a kind alone: networks that bear its name."""
        for path, part in self.named_modules():
            if isinstance(part, Stack) and path.rpartition(".")[2] == kind:
                part.requires_grad_(False)

    def follow(self, found: Predictor) -> None:
        """Before training goes on from another: takes on what was read off the host."""

    def begin(self) -> None:
        """Before training goes on from another, whose weights are in."""

    def check_host(self, spec: HostSpec) -> None:
        """Refuses another host than the one trained for.

        Raises:
            ValueError: names both hosts.
        """
        mine = (self.L, self.H, self.F)
        same = self.info.spec_hash in ("", spec.hash) and mine == (spec.L, spec.H, spec.F)
        if not same or any(spec.width(tap.site) != self.width for tap in self.taps):
            raise ValueError(
                f"predictor ({self.name}) was trained for host {self.info.host or 'unnamed'!r} "
                f"(spec {self.info.spec_hash or 'unknown'}, L={self.L} H={self.H} F={self.F}), but "
                f"this host is {spec.name!r} (spec {spec.hash}, L={spec.L} H={spec.H} F={spec.F}). "
                "Train one for it with train.py"
            )

    def check(self, *, criterion: str | None = None, rank: int | None = None) -> None:
        """Refuses a predictor that is not what was asked for.

        Raises:
            ValueError: trained on another criterion, or of another rank.
        """
        for key, asked, found in (
            ("criterion", criterion, self.info.criterion),
            ("rank", rank, self.params.get("rank")),
        ):
            if asked is not None and asked != found:
                raise ValueError(
                    f"{key}={asked!r} was asked for, but this predictor ({self.name}) has "
                    f"{key}={found!r}; choose another folder or train one with train.py"
                )

    def _require_decided(self, kind: UnitKind, layer: int) -> int:
        first = self.first(kind)
        if not first <= layer < self.L:
            raise ValueError(
                f"layer {layer} is not decided by this predictor for {kind}: layers before {first} "
                f"stay dense, and the host has {self.L}"
            )
        return layer - first

    def card(self) -> str:
        """README.md of the folder."""
        from gnomon.predictors.card import model_card

        return model_card(self)

    # -- folder -----------------------------------------------------------------------------------

    def _save_pretrained(self, save_directory: Path) -> None:
        from gnomon.predictors.folder import write_folder

        write_folder(self, save_directory)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *, revision: str | None = None
    ) -> Self:
        """Loads a predictor folder or hub id; see :func:`gnomon.load_predictor`.

        Raises:
            ValueError: no such folder, damaged, or of another class than this one.
        """
        from gnomon.predictors.folder import load_predictor

        predictor = load_predictor(pretrained_model_name_or_path, revision=revision)
        if not isinstance(predictor, cls):
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a {predictor.name} predictor, not "
                f"{cls.name}; use Predictor.from_pretrained for any class"
            )
        return predictor


def decidable_from(tap: Tap, kind: UnitKind) -> int:
    """The first layer whose units a tap may decide: nothing computed after the decision is used.

    ``layer_input`` and ``attn_input`` of a layer precede its heads and neurons; ``ffn_input`` and
    ``attn_context`` exist only after its heads have run.
    """
    before_heads = tap.site in ("layer_input", "attn_input")
    return tap.layer if before_heads or kind == "neurons" else tap.layer + 1
