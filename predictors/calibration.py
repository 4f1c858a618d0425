"""Calibration: what training-free policies know of a host, measured once on calibration text.

It is saved, found and loaded like a predictor, and scores nothing at inference: it holds quantiles
of activations (CATS, CHESS and TEAL place their thresholds by them), per-unit means of the true
contribution (``static``, GLASS, FFSplit), how little each sublayer changes what passes through it
(SkipSublayers), and what each loses at a few densities (``budget.spread=calibrated``).
``python train.py predictor=calibration`` makes one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from gnomon.allocation import Sensitivity
from gnomon.host import KINDS, HostSpec, Tap, UnitKind
from gnomon.predictors.base import Predictor

POINTS = 1001  # quantiles kept per table: every tenth of a percent of density
TABLES = ("attn_input", "attn_context", "ffn_input", "neurons")
GATED = ("gate", "gate_up")  # |act(gate)|, and |act(gate)| times the mean |up| of its neuron
SUBLAYERS = ("attention", "ffn", "layer")
GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
Measure = Literal["cett", "loss"]
_LEAST = 50  # values that must lie beyond a quantile for it to be placed


class Calibration(Predictor):
    """Measured statistics of a host; has no networks and no taps.

    Args:
        L, H, F: sizes of the host.
        gated: whether its FFN has a gate.
        sensitivity: measured for ``budget.spread=calibrated``: ``cett``, ``loss``
            (:mod:`gnomon.sensitivity`), or None.
        grid: densities at which it is, ascending in (0, 1).
        sensitivity_tokens: first tokens of the text that it is measured on.

    Attributes:
        up_mean: (L, F) mean |up-projection output| of every neuron; gated hosts alone.
        similarity: (L, 3) mean cosine of the residual stream before and after the attention
            sublayer, the FFN sublayer, and the layer; NaN where a host does not let it be seen.
        values: (tables,) values behind every quantile table of a layer.
        densities: (P,) at which sensitivities are measured: 0 and the grid.

    Raises:
        ValueError: an unknown measure, or a grid that is not ascending in (0, 1).
    """

    name = "calibration"
    up_mean: Tensor
    similarity: Tensor
    values: Tensor

    def __init__(
        self,
        L: int,
        H: int,
        F: int,
        gated: bool,
        sensitivity: Measure | None = None,
        grid: Sequence[float] = GRID,
        sensitivity_tokens: int = 1024,
    ) -> None:
        super().__init__(L, H, F, 0, ())
        self.gated, self.measure = gated, sensitivity
        self.sensitivity_tokens, self.densities = sensitivity_tokens, (0.0, *map(float, grid))
        self._check()
        self.tables = TABLES + (GATED if gated else ())
        for table in self.tables:
            self.register_buffer(f"table_{table}", torch.full((L, POINTS), torch.nan))
        self.register_buffer("up_mean", torch.zeros(L, F if gated else 0))
        self.register_buffer("similarity", torch.full((L, len(SUBLAYERS)), torch.nan))
        self.register_buffer("values", torch.zeros(len(self.tables)))
        for kind in KINDS if sensitivity else ():
            shape = (L, len(self.densities))
            self.register_buffer(f"errors_{kind}", torch.full(shape, torch.nan))

    @classmethod
    def for_host(
        cls,
        spec: HostSpec,
        sensitivity: Measure | None = None,
        grid: Sequence[float] = GRID,
        sensitivity_tokens: int = 1024,
    ) -> Self:
        """An empty one, sized for a host."""
        return cls(spec.L, spec.H, spec.F, spec.gated, sensitivity, grid, sensitivity_tokens)

    @property
    def params(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""
        sizes = {"L": self.L, "H": self.H, "F": self.F, "gated": self.gated}
        if self.measure is None:
            return sizes
        grid = {"grid": list(self.densities[1:]), "sensitivity_tokens": self.sensitivity_tokens}
        return sizes | {"sensitivity": self.measure} | grid

    @property
    def errors(self) -> dict[UnitKind, Tensor]:
        """Measured errors, kind -> (L, P); empty where none are."""
        return {k: getattr(self, f"errors_{k}") for k in KINDS} if self.measure else {}

    @property
    def sensitivity(self) -> Sensitivity:
        """What ``budget.spread=calibrated`` goes by.

        Raises:
            ValueError: it was not measured.
        """
        if self.measure is None:
            raise ValueError(
                "budget.spread='calibrated': this calibration holds no sensitivities: make one "
                "with python train.py predictor=calibration predictor.sensitivity=loss (or cett)"
            )
        rows = {k: tuple(map(tuple, self.errors[k].double().tolist())) for k in KINDS}
        info = self.info
        return Sensitivity(
            measure=self.measure,
            densities=self.densities,
            heads=rows["heads"],
            neurons=rows["neurons"],
            spec_hash=info.spec_hash,
            source=f"{info.text or 'unknown text'}, first {self.sensitivity_tokens} of "
            f"{info.tokens} tokens ({info.text_digest[:16]})",
        )

    def decided_from(self, kind: UnitKind, layer: int) -> Tap | None:
        """Decides nothing."""
        return None

    def cut(self, table: str, density: float) -> Tensor:
        """Values that a share ``density`` of a table's values exceed: (L,).

        Args:
            table: one of :attr:`tables`.
            density: kept fraction in (0, 1).

        Raises:
            ValueError: the calibration text is too short for this quantile.
        """
        count = float(self.values[self.tables.index(table)])
        beyond = min(density, 1 - density)
        if beyond * count < _LEAST or beyond < 1 / (POINTS - 1):
            raise ValueError(
                f"budget: a density of {density:g} needs the quantile {1 - density:.5f} of "
                f"{table}, and the calibration text gives {count:.0f} values and {POINTS} points: "
                "calibrate on more text (python train.py predictor=calibration text.tokens=…), or "
                "use a density further from 0 and 1"
            )
        rows = getattr(self, f"table_{table}")
        place = (1 - density) * (POINTS - 1)
        low = min(int(place), POINTS - 2)
        return torch.lerp(rows[:, low], rows[:, low + 1], place - low)

    def _check(self) -> None:
        if self.measure is not None and self.measure not in get_args(Measure):
            raise ValueError(
                f"predictor.sensitivity={self.measure!r}: use {', '.join(get_args(Measure))}, or "
                "null to leave it out"
            )
        grid = list(self.densities)
        if grid != sorted({*grid}) or len(grid) < 2 or grid[-1] >= 1:
            raise ValueError(f"predictor.grid={grid[1:]}: use ascending densities between 0 and 1")
        if self.sensitivity_tokens < 1:
            raise ValueError(
                f"predictor.sensitivity_tokens={self.sensitivity_tokens}: use 1 or more"
            )

    def card(self) -> str:
        """README.md of the folder."""
        info = self.info
        host, spec = info.host or "an unnamed host", info.spec_hash or "unknown"
        return _CARD.format(
            host=host,
            spec=spec,
            revision=info.revision or "unknown",
            text=info.text or "unknown text",
            digest=info.text_digest[:16] or "no digest",
            tokens=info.tokens,
            tables=", ".join(f"`{t}`" for t in self.tables),
            sensitivity=f"`{self.measure}`" if self.measure else "not measured",
        )


_CARD = """---
library_name: gnomon
tags:
- gnomon
- contextual-sparsity
- calibration
---
# Calibration of {host}

Quantiles of activations, per-unit means and sublayer similarities of `{host}`, for the policies
`cats`, `chess`, `teal`, `ffsplit`, `skip_sublayers`, `glass` and `static`. It holds no weights of
the host and no text.

```python
import gnomon

model, tokenizer = gnomon.load_host("{host}")
calibration = gnomon.load_predictor("<this folder>")
policy = gnomon.policies.Cats(calibration, gnomon.Budget(neurons=0.5))
with gnomon.sparsify(model, policy):
    model.generate(**tokenizer("The shadow of", return_tensors="pt"), max_new_tokens=32)
```

| measured on | |
|---|---|
| host | {host}, revision {revision}, spec {spec} |
| text | {text} ({digest}), {tokens} tokens |
| quantiles of | {tables} |
| sensitivities | {sensitivity} |
"""
