"""Rotary tables of a host, from its own rotary module, and the proof that they mean the same."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from gnomon.engine.expressible import decoder_of, unsupported
from gnomon.host import HostSpec, module

_GROWING = ("dynamic", "longrope")  # frequencies depend on how long the sequence has become


class RotaryTables:
    """cos and sin by position, (limit, rot) fp32; layers of one kind share them.

    Args:
        model: the host.
        spec: its description.
        limit: positions to cover.
    """

    def __init__(self, model: nn.Module, spec: HostSpec, limit: int) -> None:
        self._model, self._spec, self._limit = model, spec, limit
        self._rotary = getattr(decoder_of(model, spec), "rotary_emb", None)
        self._config: Any = model.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]
        self._made: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        if self._rotary is not None:
            self._require_fixed()

    def of(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """The tables of a layer; None, None where it does not rotate.

        Raises:
            UnsupportedHostError: a rotation that the kernels do not compute.
        """
        attention = module(self._model, self._spec.layers[layer].q.rpartition(".")[0])
        if self._rotary is None or not getattr(attention, "use_rope", True):
            return None, None
        kind: tuple[Any, ...] = ()
        if "layer_type" in inspect.signature(self._rotary.forward).parameters:
            kind = (self._config.layer_types[layer],)
        if kind not in self._made:
            self._made[kind] = self._make(kind)
            self._require_halves(attention, *self._made[kind])
        return self._made[kind]

    def _make(self, kind: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        assert self._rotary is not None
        device = next(self._model.parameters()).device
        probe = torch.zeros(1, 1, self._spec.D, dtype=torch.float32, device=device)
        cos, sin = self._rotary(probe, torch.arange(self._limit, device=device)[None], *kind)
        if cos.shape[-1] > self._spec.d:
            raise unsupported(
                self._model,
                f"its rotary tables are {cos.shape[-1]} wide, its heads {self._spec.d}",
            )
        return cos[0].float().contiguous(), sin[0].float().contiguous()

    def _require_fixed(self) -> None:
        found = getattr(self._rotary, "rope_type", "default")
        kinds = found.values() if isinstance(found, dict) else [found]
        if not any(kind in _GROWING for kind in kinds):
            return
        given = getattr(self._config, "rope_parameters", None) or {}
        longest = getattr(self._rotary, "original_max_seq_len", 0)
        original = int(given.get("original_max_position_embeddings") or longest)
        if self._limit > original:
            raise unsupported(
                self._model,
                f"its rotation changes once a sequence exceeds {original} tokens, and context="
                f"{self._limit} does",
            )

    def _require_halves(self, attention: nn.Module, cos: Tensor, sin: Tensor) -> None:
        """The host's own function must turn the first half of the columns against the second."""
        apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        if apply is None:
            raise unsupported(self._model, "its rotation was not found (apply_rotary_pos_emb)")
        at = self._limit - 1
        x = torch.linspace(-1, 2, cos.shape[-1], device=cos.device)
        low, high = x.chunk(2)
        expected = x * cos[at] + torch.cat([-high, low]) * sin[at]
        seen = apply(x.view(1, 1, 1, -1), x.view(1, 1, 1, -1), cos[None, at:], sin[None, at:])[0]
        if seen.numel() != x.numel() or not torch.allclose(seen.flatten(), expected, atol=1e-5):
            raise unsupported(self._model, "it rotates other pairs of columns than halves")
