"""The policy decides the active units at inference: one subclass per system, one method each."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from torch import Tensor, nn

from gnomon.accounting import Density, HostBytes, Role
from gnomon.budget import Budget, choices, layer_counts, sensitivity_of
from gnomon.byte_budget import solve_bytes
from gnomon.host import KINDS, HostSpec, Tap, UnitKind, describe
from gnomon.kernels.topk_mask import topk_mask
from gnomon.policies.seen import Seen

if TYPE_CHECKING:
    from gnomon.predictors.base import Predictor

Refresh = Literal["static", "prompt", "token"]
Batch = Literal["per_sequence", "shared"]
KV = Literal["keep", "drop"]
Prefill = Literal["dense", "sparse"]


class Policy:
    """Base class. Override :meth:`scores`; the budget turns scores into an active set.

    Args:
        budget: what may be kept.
        refresh: how often the policy decides; one of ``refreshes``.
        batch: ``per_sequence``, or ``shared``: one neuron set per step from the sum of the scores
            over live rows.
        kv: ``keep`` computes K and V of every head, ``drop`` skips those of inactive groups
            (byte accounting; the decision must be fixed for the sequence).
        prefill: ``dense``, or ``sparse``: under ``protocol=decode`` the prompt is sparse too, as
            under ``all``. For fixed policies alone.

    Raises:
        ValueError: a choice this policy does not offer.
    """

    name: ClassVar[str]
    refreshes: ClassVar[tuple[Refresh, ...]] = ("token",)
    spreads: ClassVar[tuple[str, ...]] = ("layer",)
    kinds: tuple[UnitKind, ...] = KINDS  # unit kinds it decides; others stay dense
    observes: tuple[UnitKind, ...] = ()  # unit kinds of the dense prompt that it sums up
    channels: tuple[Role, ...] = ()  # linears whose input channels it skips
    reads_gate: bool = False  # neurons are decided from the gate, which is dense
    needs_units: bool = False  # the oracle alone: it looks at what it decides about
    weight_dtype: str | None = None  # None: the host's own
    predictor: Predictor | None = None
    bytes_dtype: str | None = None  # dtype of byte accounting; None: the live host's

    def __init__(
        self,
        budget: Budget,
        refresh: Refresh | None = None,
        batch: Batch = "per_sequence",
        kv: KV = "keep",
        prefill: Prefill = "dense",
    ) -> None:
        self.budget = self._own(budget)
        self.refresh: Refresh = self.refreshes[0] if refresh is None else refresh
        self.batch, self.kv = batch, kv
        self._offer("refresh", self.refresh, self.refreshes)
        self._offer("batch", batch, get_args(Batch))
        self._offer("kv", kv, get_args(KV))
        if kv == "drop" and self.refresh == "token":
            raise ValueError(
                "policy.kv='drop' needs a decision that is fixed for the sequence: use "
                "policy.refresh=prompt or static, or policy.kv=keep"
            )
        self.set_prefill(prefill)
        self._offer("budget.spread", budget.spread, self.spreads)

    # -- what a subclass says -------------------------------------------------------------------

    def scores(self, kind: UnitKind, layer: int, seen: Seen) -> Tensor:
        """Scores of one layer's units, broadcastable to (B, T', N); higher = keep."""
        raise NotImplementedError

    def decides(self, kind: UnitKind, layer: int) -> bool:
        """Whether the policy decides this layer; otherwise it stays dense and counts."""
        return True

    def taps(self) -> tuple[Tap, ...]:
        """Hidden states that :meth:`scores` reads."""
        return ()

    def observe(self, kind: UnitKind, layer: int, units: Tensor, valid: Tensor) -> Tensor:
        """What the prompt's dense tokens say of one layer's units, summed over tokens.

        Called for the kinds in ``observes``; :meth:`scores` finds the sums in ``seen.prompt``.

        Args:
            kind, layer: of the units.
            units: (B, T', F), or (B, T', H, d) for heads.
            valid: (B, T') tokens at positions up to P-2, padding excluded.

        Returns:
            (B, N), fp32.
        """
        raise NotImplementedError

    def keep_channels(self, role: Role, layer: int, x: Tensor) -> Tensor:
        """Channels of a linear's input that are read: x (B, T', W) -> bool (B, T', W)."""
        raise NotImplementedError

    def channel_density(self, role: Role, budget: Budget) -> float:
        """Kept fraction of a linear's input channels that a budget aims at."""
        return 1.0

    def expected(self, kind: UnitKind, budget: Budget) -> list[float]:
        """Kept fraction of a kind in every layer that a budget aims at, in whole units."""
        n = choices(budget, self.spec, kind)
        if budget.target(kind) == 1:
            return [1.0] * self.spec.L
        decided = [self.decides(kind, layer) for layer in range(self.spec.L)]
        return [k / n for k in layer_counts(budget, self.spec, kind, decided)]

    def fractions(self, density: Density) -> dict[Role, float]:
        """What of each linear of a layer a token reads, in the mean over layers."""
        kv = density.groups if self.kv == "drop" else 1.0
        heads, neurons = density.heads, density.neurons
        ffn: dict[Role, float] = {"gate": neurons, "up": neurons, "down": neurons}
        return {"q": heads, "k": kv, "v": kv, "out": heads, **ffn}

    def prepare(self, model: nn.Module) -> None:
        """Computes what :meth:`scores` needs of the host; called once by :meth:`bind`."""

    def transform(self, model: nn.Module) -> AbstractContextManager[None]:
        """Changes of the host's weights while the policy is active, undone on exit."""
        return nullcontext()

    @property
    def transforms(self) -> bool:
        """Whether :meth:`transform` changes anything."""
        return type(self).transform is not Policy.transform

    def saved_bytes(self, density: Density, size: int) -> float:
        """Bytes per token by which :meth:`transform` makes the weights that are read smaller.

        Args:
            density: achieved.
            size: bytes of an element of the host's weights as they are stored.
        """
        return 0.0

    @property
    def facts(self) -> dict[str, Any]:
        """What was solved or chosen at :meth:`bind`, for the record of a result."""
        return {}

    @property
    def predictor_bytes(self) -> float:
        """Bytes of predictor weights that one decision reads."""
        return 0.0

    def set_prefill(self, prefill: Prefill) -> None:
        """Says whether the prompt is sparse too.

        Raises:
            ValueError: a value that is not offered, or ``sparse`` where the policy decides from
                the prompt.
        """
        self._offer("prefill", prefill, get_args(Prefill))
        if prefill == "sparse" and self.refresh != "static":
            raise ValueError(
                f"policy.prefill='sparse': policy={self.name} with refresh={self.refresh} decides "
                "from the prompt, which stays dense for it. Use policy.refresh=static or a fixed "
                "policy (static, skip_sublayers), or policy.prefill=dense"
            )
        self.prefill: Prefill = prefill

    # -- what the runtime calls -----------------------------------------------------------------

    def bind(self, model: nn.Module, spec: HostSpec | None = None) -> None:
        """Checks the policy against a host and fixes how many units each layer keeps.

        Raises:
            ValueError: the predictor belongs to another host, or the budget cannot be met or has
                not been found yet (``max_ppl_increase``).
        """
        self.budget.require_found()
        self.start(model, spec or describe(model))
        self.settle(self._resolve())

    def start(self, model: nn.Module, spec: HostSpec) -> None:
        """First half of :meth:`bind`: the host, while the budget's bytes are not solved yet."""
        self.spec, self.bytes = spec, HostBytes.of(model, spec)
        if self.budget.spread == "calibrated":
            sensitivity_of(self.budget, spec)
        self.prepare(model)
        self.resolved = replace(self.budget, bytes=None, density=0.5)

    def settle(self, budget: Budget) -> None:
        """Second half of :meth:`bind`: the budget, in densities."""
        self.resolved = budget
        self.counts = {kind: self.count_layers(kind) for kind in KINDS}

    def keeps_all(self, kind: UnitKind, layer: int) -> bool:
        """Whether nothing is skipped in this layer."""
        return self.resolved.target(kind) == 1 or not self.decides(kind, layer)

    def skips(self, kind: UnitKind, layer: int) -> bool:
        """Whether no decision ever keeps a unit of this layer."""
        return False

    @property
    def skips_nothing(self) -> bool:
        """Whether every unit and every channel is kept."""
        units = all(self.keeps_all(kind, i) for kind in KINDS for i in range(self.spec.L))
        return units and all(self.channel_density(r, self.resolved) == 1 for r in self.channels)

    def kept(self, kind: UnitKind, layer: int) -> int | None:
        """Units that every decision of a layer keeps; None where the number varies by decision."""
        if self.keeps_all(kind, layer):
            return self.spec.units(kind)
        if not self.resolved.fixed_counts:
            return None
        grouped = kind == "heads" and self.resolved.head_unit == "group"
        return self.counts[kind][layer] * (self.spec.group_size if grouped else 1)

    @property
    def ranks(self) -> bool:
        """Whether a layer keeps a number of its best units, the same at every token."""
        return self.resolved.fixed_counts and not self.reads_gate

    def decide(self, kind: UnitKind, layer: int, seen: Seen) -> Tensor:
        """Active set of one layer: bool, broadcastable to (B, T', N)."""
        scores = self.combine(kind, self.scores(kind, layer, seen), seen)
        keep = self.select(kind, layer, scores, seen)
        grouped = kind == "heads" and self.resolved.head_unit == "group"
        return keep.repeat_interleave(self.spec.group_size, -1) if grouped else keep

    def combine(self, kind: UnitKind, scores: Tensor, seen: Seen) -> Tensor:
        """Scores of what is chosen from: summed over live rows if shared, means of head groups."""
        if kind == "neurons" and self.batch == "shared" and scores.dim() == 3:
            scores = (scores * seen.live[..., None]).sum(0, keepdim=True)
        if kind == "heads" and self.resolved.head_unit == "group":
            scores = scores.unflatten(-1, (self.spec.G, self.spec.group_size)).mean(-1)
        return scores

    def select(self, kind: UnitKind, layer: int, scores: Tensor, seen: Seen) -> Tensor:
        """Turns the scores of one layer into its active set: its best K by default."""
        return topk_mask(scores, self.counts[kind][layer])

    def count_layers(self, kind: UnitKind) -> list[int]:
        """Units kept per layer (in groups where those are decided)."""
        decided = [self.decides(kind, i) for i in range(self.spec.L)]
        if self.resolved.target(kind) == 1:
            decided = [False] * self.spec.L
        return layer_counts(self.resolved, self.spec, kind, decided)

    def _resolve(self) -> Budget:
        return self.budget if self.budget.bytes is None else solve_bytes(self, self.budget)

    def _own(self, budget: Budget) -> Budget:
        """The budget with the kinds that the policy does not decide kept whole."""
        if budget.spread in ("calibrated", "learned") and budget.spread not in self.spreads:
            self._offer("budget.spread", budget.spread, self.spreads)
        for kind in KINDS:
            asked = getattr(budget, kind)
            if kind not in self.kinds and asked not in (None, 1):
                raise ValueError(
                    f"budget.{kind}={asked:g}: policy={self.name} decides {', '.join(self.kinds)} "
                    f"alone and keeps all {kind}; leave budget.{kind} out or use another policy"
                )
            if kind not in self.kinds:
                whole = {"heads": 1.0} if kind == "heads" else {"neurons": 1.0}
                budget = replace(budget, **whole)  # type: ignore[arg-type]
        return budget

    def _offer(self, field: str, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            raise ValueError(
                f"policy={self.name} does not offer {field}={value!r}: use {', '.join(allowed)}"
            )
