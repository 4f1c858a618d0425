"""FFSplit: the FFN's heavy hitters are kept whole, the other neurons are compressed.

https://arxiv.org/abs/2401.04044. With FFN(x) = Σ_j h_j(x) v_j, a neuron's output norm for a token
is |h_j|·‖v_j‖₂. The heavy part holds the neurons of a layer whose mean over calibration text is
largest; it stays as it is. The rest is stored as weight-only int8 or int4, or as a low-rank pair,
so that bits go where the output is made:

    FFN(x) = FFN_heavy(x) + FFN_rest(x)        both are ordinary FFNs, added

With an inner policy the heavy neurons are always on, and it chooses among the rest.

Deviations: quality is computed with the rounded weights held in the host's dtype (as dense_int8
does); plain SVD and rounding to nearest, by our own code: the maintained quantisation libraries
replace whole linears, and here each neuron has its own precision; BERT is not a host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gnomon.accounting import Density, Role, account
from gnomon.budget import Budget
from gnomon.errors import Refused
from gnomon.host import UnitKind, weight
from gnomon.policies.base import Policy, Prefill
from gnomon.policies.compressed import check_method, compress, rest_bytes
from gnomon.policies.core import Core
from gnomon.policies.dense import Dense
from gnomon.policies.split_weights import SplitWeights
from gnomon.policies.static import Source
from gnomon.predictors.calibration import Calibration


class FFSplit(Core):
    """Keeps heavy neurons whole and compresses the others.

    Args:
        source: a calibration, whose means are the neurons' output norms; or anything with means.
        budget: ``bytes`` finds the heavy share (``lowrank`` with ``heavy`` said: the rank); else
            ``neurons`` is the heavy share. Not used where ``heavy`` says it.
        inner: chooses among the rest, by its own budget; None keeps all.
        rest: ``int8``, ``int4`` or ``lowrank``.
        heavy: share of a layer's neurons that stay whole, in [0, 1].
        rank: of ``lowrank``, as a share of min(neurons of the rest, D).
        weights: a folder that :meth:`save` wrote; its split is taken instead of a new one.
        prefill: what the inner policy skips, it skips in the prompt too (``sparse``); None takes
            the inner policy's. Compressed weights serve the prompt in any case.

    Raises:
        ValueError: an unknown method, shares outside [0, 1], an inner policy that skips channels.
    """

    name = "ffsplit"
    kinds = ("neurons",)
    accepts = Calibration  # what policy.predictor=auto looks for

    def __init__(
        self,
        source: Source,
        budget: Budget | None = None,
        inner: Policy | None = None,
        rest: str = "int8",
        heavy: float | None = None,
        rank: float | None = None,
        weights: str | Path | None = None,
        prefill: Prefill | None = None,
    ) -> None:
        check_method(rest)
        if budget is None and heavy is None and weights is None:
            raise ValueError("ffsplit needs policy.params.heavy, or a budget that gives it")
        for field, value in (("heavy", heavy), ("rank", rank)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"policy.params.{field}={value} is a share: use 0 to 1")
        own = None if budget is None else self._own(budget)
        share = heavy if heavy is not None else 1.0 if own is None else own.target("neurons")
        super().__init__(source, Dense() if inner is None else inner, share)
        if self.channels:
            raise ValueError(
                f"policy=ffsplit compresses neurons, and {inner.name if inner else ''} skips input "
                "channels, whose bytes are not those of neurons: use cats, chess "
                "(attention=false) or a policy that scores neurons"
            )
        if prefill is not None:
            self.set_prefill(prefill)
        self.alone = inner is None
        if self.alone:
            self.kinds = ("neurons",)
            self.budget = Budget(density=1.0) if own is None else own
        self.rest, self.rank, self._heavy_said = rest, 0.5 if rank is None else rank, heavy
        self._folder = None if weights is None else Path(weights)

    def prepare(self, model: nn.Module) -> None:
        """Marks the heavy neurons, or reads a stored split."""
        super().prepare(model)
        first = self.spec.layers[0]
        linears = {path: model.get_submodule(path) for path in (first.up, first.down)}
        odd = [type(m).__name__ for m in linears.values() if not isinstance(m, nn.Linear)]
        if self.spec.gate_up != "separate" or odd:
            what = odd[0] if odd else "one linear for gate and up"
            raise Refused(
                f"policy=ffsplit replaces rows of plain gate, up and down linears, and host "
                f"{self.spec.name} ({self.spec.family}) has {what}: use policy=core or static"
            )
        self._split: SplitWeights | None = None
        if self._folder is not None:
            self._split = SplitWeights.load(self._folder, self.spec)
            self.core, self.rest = self._split.heavy, self._split.method
            self.share, self.rank = self._split.share, self._split.rank

    def settle(self, budget: Budget) -> None:
        """Alone there is nothing to skip."""
        super().settle(Budget(density=1.0) if self.alone else budget)

    def _resolve(self) -> Budget:
        """Solves a byte budget by the heavy share, or by the rank where that share was said."""
        asked = self.budget.bytes
        if not self.alone or asked is None or self._split is not None:
            return super()._resolve() if not self.alone else Budget(density=1.0)
        by_rank = self.rest == "lowrank" and self._heavy_said is not None
        if self._heavy_said is not None and not by_rank:
            raise ValueError(
                f"budget.bytes={asked:g} finds the heavy share, and policy.params.heavy="
                f"{self._heavy_said} says it: leave one out"
            )
        field = "rank" if by_rank else "share"
        low, high = 0.0, 1.0
        for _ in range(40):
            setattr(self, field, (low + high) / 2)
            middle = (low + high) / 2
            low, high = (low, middle) if self._density() > asked else (middle, high)
        setattr(self, field, low)
        if self._density() > asked * 1.001:
            raise Refused(
                f"budget.bytes={asked:g} cannot be reached by policy=ffsplit, rest={self.rest}: "
                f"with the least it still reads {self._density():.3f} of the dense bytes. Raise "
                "budget.bytes, or use rest=int4 or lowrank"
            )
        self._mark()
        return Budget(density=1.0)

    def _density(self) -> float:
        self.resolved = Budget(density=1.0)
        self.inner.resolved = self.resolved
        return account(self, Density(1, 1, 1), dtype=self.bytes_dtype).byte_density

    def keeps_all(self, kind: UnitKind, layer: int) -> bool:
        """Whether the inner policy does: compressed neurons are kept."""
        return self.inner.keeps_all(kind, layer)

    def saved_bytes(self, density: Density, size: int) -> float:
        """Bytes of the rest as it is in the host, less what is stored instead."""
        spec, heavy = self.spec, self._heavy_count
        rest, read = spec.F - heavy, self.fractions(density)
        saved = self.inner.saved_bytes(density, size)
        roles: tuple[Role, ...] = ("gate", "up", "down") if spec.gated else ("up", "down")
        for role in roles:
            rows = max(0.0, read[role] * spec.F - heavy)
            plain = rows * spec.D * size
            small = rest_bytes(self.rest, rows, rest, spec.D, size, self.rank_of(rest))
            saved += spec.L * (plain - small)
        return saved

    @property
    def facts(self) -> dict[str, Any]:
        """The split."""
        own: dict[str, Any] = {"heavy": self.share, "rest": self.rest}
        if self.rest == "lowrank":
            own["rank"] = self.rank_of(self.spec.F - self._heavy_count)
        return self.inner.facts | {"ffsplit": own}

    def rank_of(self, rest: int) -> int:
        """R of the low-rank pair of a part with so many neurons."""
        return max(1, round(self.rank * min(rest, self.spec.D)))

    @property
    def _heavy_count(self) -> int:
        return round(self.share * self.spec.F)

    @contextmanager
    def transform(self, model: nn.Module) -> Iterator[None]:
        """Puts the weights that the split stands for in place, and the host's own back on exit."""
        split = self.split(model)
        original: dict[str, Any] = {}
        with self.inner.transform(model):  # puts its own back after this
            try:
                for (layer, role), part in split.parts.items():
                    path = str(getattr(self.spec.layers[layer], role))
                    linear = model.get_submodule(path)
                    original[path] = linear.weight
                    rows = split.put(weight(model, path).detach(), layer, role, part)
                    linear.weight = nn.Parameter(rows, requires_grad=False)
                yield
            finally:
                for path, held in original.items():
                    setattr(model.get_submodule(path), "weight", held)  # noqa: B010

    @torch.no_grad()
    def split(self, model: nn.Module) -> SplitWeights:
        """The compressed rest of a bound policy's host, made on first use."""
        if self._split is None:
            parts = {}
            rest = self.spec.F - self._heavy_count
            for layer, where in enumerate(self.spec.layers if rest else ()):
                for role in ("gate", "up", "down"):
                    path = getattr(where, role)
                    if path is not None:
                        matrix = weight(model, path).detach()
                        rows = matrix.t() if role == "down" else matrix
                        chosen = rows[~self.core[layer].to(rows.device)]
                        parts[layer, role] = compress(chosen, self.rest, self.rank_of(rest))
            self._split = SplitWeights(self.rest, self.core, self.share, self.rank, parts)
        return self._split

    def save(self, model: nn.Module, folder: str | Path) -> None:
        """Writes the split of a bound policy; ``weights=folder`` takes it back.

        Raises:
            ValueError: the folder exists.
        """
        self.split(model).save(Path(folder), self.spec)
