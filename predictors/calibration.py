"""Calibration: what training-free policies know of a host, measured once on calibration text.

It is saved, found and loaded like a predictor, and scores nothing at inference: it holds quantiles
of activations (CATS, CHESS and TEAL place their thresholds by them), per-unit means of the true
contribution (``static``, GLASS, FFSplit), and how little each sublayer changes what passes through
it (SkipSublayers). ``python train.py predictor=calibration`` makes one.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from gnomon.host import HostSpec, Tap, UnitKind
from gnomon.predictors.base import Predictor

POINTS = 1001  # quantiles kept per table: every tenth of a percent of density
TABLES = ("attn_input", "attn_context", "ffn_input", "neurons")
GATED = ("gate", "gate_up")  # |act(gate)|, and |act(gate)| times the mean |up| of its neuron
SUBLAYERS = ("attention", "ffn", "layer")
_LEAST = 50  # values that must lie beyond a quantile for it to be placed


class Calibration(Predictor):
    """Measured statistics of a host; has no networks and no taps.

    Args:
        L, H, F: sizes of the host.
        gated: whether its FFN has a gate.

    Attributes:
        up_mean: (L, F) mean |up-projection output| of every neuron; gated hosts alone.
        similarity: (L, 3) mean cosine of the residual stream before and after the attention
            sublayer, the FFN sublayer, and the layer; NaN where a host does not let it be seen.
        values: (tables,) values behind every quantile table of a layer.
    """

    name = "calibration"
    up_mean: Tensor
    similarity: Tensor
    values: Tensor

    def __init__(self, L: int, H: int, F: int, gated: bool) -> None:
        super().__init__(L, H, F, 0, ())
        self.gated = gated
        self.tables = TABLES + (GATED if gated else ())
        for table in self.tables:
            self.register_buffer(f"table_{table}", torch.full((L, POINTS), torch.nan))
        self.register_buffer("up_mean", torch.zeros(L, F if gated else 0))
        self.register_buffer("similarity", torch.full((L, len(SUBLAYERS)), torch.nan))
        self.register_buffer("values", torch.zeros(len(self.tables)))

    @classmethod
    def for_host(cls, spec: HostSpec) -> Self:
        """An empty one, sized for a host."""
        return cls(spec.L, spec.H, spec.F, spec.gated)

    @property
    def params(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""
        return {"L": self.L, "H": self.H, "F": self.F, "gated": self.gated}

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
"""
