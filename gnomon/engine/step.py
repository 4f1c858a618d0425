"""One decode step: a token per sequence through every layer, skipping what a decider says.

Written once against :class:`gnomon.engine.ops.Ops`: with PyTorch operators it is the lean loop of a
CPU, with Triton launches what a CUDA graph captures. Static shapes, no wait for the host; the
residual stream is fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gnomon.engine.active import Active, Decider, KeepAll
from gnomon.engine.arithmetic import Arithmetic, LayerMath, Norm
from gnomon.engine.cache import Cache
from gnomon.engine.linears import Linears
from gnomon.engine.ops import Ops
from gnomon.engine.weights import LayerWeights, Matrix, StepWeights
from gnomon.host import HostSpec, Site, Tap

__all__ = ["Active", "Decider", "KeepAll", "decode_step"]


@torch.no_grad()
def decode_step(
    token: Tensor,
    cache: Cache,
    weights: StepWeights,
    math: Arithmetic,
    spec: HostSpec,
    decider: Decider,
    ops: Ops,
) -> Tensor:
    """Runs one token of every sequence; writes its keys and values and advances the cache.

    Args:
        token: (B,) int64.
        cache: of B sequences; ``position`` is advanced by one.
        weights: laid out for the kernels.
        math: the host's arithmetic, its tables covering the cache's capacity.
        spec: the host's description.
        decider: what is active.
        ops: the operators.

    Returns:
        Logits (B, V) fp32 of the next token.
    """
    step = _Step(cache, math, spec, decider, ops)
    x = step.embed(token, weights)
    for layer in range(spec.L):
        step.see(Tap(layer, "layer_input"), x)
        x = step.attend(layer, x, weights.layers[layer])
        x = step.feed_forward(layer, x, weights.layers[layer])
    final = math.final
    if weights.project_out is not None:
        x, final = step.rows(x, Matrix(weights.project_out), final, bias=None), Norm()
    logits = step.rows(x, weights.head, final, bias=weights.head_bias)
    if math.final_softcap:
        logits = math.final_softcap * torch.tanh(logits / math.final_softcap)
    cache.position.add_(1)
    return logits


class _Step(Linears):
    """The sublayers of one step."""

    def __init__(
        self, cache: Cache, math: Arithmetic, spec: HostSpec, decider: Decider, ops: Ops
    ) -> None:
        super().__init__(spec, decider, ops, math.activation)
        self.cache, self.math, self.taps = cache, math, frozenset(decider.taps)

    def embed(self, token: Tensor, weights: StepWeights) -> Tensor:
        """Tokens (B,) -> the residual stream (B, D) that enters the first layer."""
        x = F.embedding(token, weights.embed).float()
        if self.math.embed_scale != 1:
            x = x * self.math.embed_scale
        if weights.project_in is not None:
            x = self.rows(x, Matrix(weights.project_in), Norm(), bias=None)
        if self.math.positions is not None:
            x = x + F.embedding(self.cache.position, self.math.positions)
        return x

    def see(self, tap: Tap, hidden: Tensor) -> None:
        """Hands a hidden state over where it is wanted."""
        if tap in self.taps:
            self.decider.see(tap, hidden)

    def _see_normed(self, site: Site, layer: int, x: Tensor, norm: Norm) -> None:
        """Only for a predictor that reads it: the norm is otherwise part of the projection."""
        tap = Tap(layer, site)
        if tap in self.taps:
            self.decider.see(tap, self.normed(x, norm))

    def attend(self, layer: int, x: Tensor, w: LayerWeights) -> Tensor:
        """The attention sublayer, residual added."""
        math, spec = self.math.layers[layer], self.spec
        self._see_normed("attn_input", layer, x, math.attn_norm)
        active = self.decider.active("heads", layer)
        k, v, q = self.qkv(layer, x, w, math.attn_norm, active)
        context = self._attention(layer, math, q, k, v, active)
        self._see_context(layer, context, active)
        residual = None if _is(math.attn_post) else x
        if "out" in self.decider.channels:
            y = self.passing(("out",), layer, context, w.out_t, w.out_bias, residual=residual)
        else:
            y = self.columns(context, w.out_t, active, spec.d, w.out_bias, residual)
        return self._finish(y, x, math.attn_post, math.attn_after)

    def _attention(
        self,
        layer: int,
        math: LayerMath,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        active: Active | None,
    ) -> Tensor:
        """Context of the heads in q's order; skipped ones are zero where q holds every head."""
        own = active is not None and active.index.shape[0] > 1
        slot = None if active is None else active.slot
        kv_slot = None if active is None or active.kv_slot is None else active.kv_slot
        if active is not None and own:
            every = torch.arange(self.spec.H, dtype=torch.int32, device=q.device)
            slot = torch.where(active.slot >= 0, every, -1)
        context = self.ops.decode_attention(
            q,
            k,
            v,
            self.cache.keys[layer],
            self.cache.values[layer],
            self.cache.position,
            slot,
            math.cos,
            math.sin,
            math.q_norm,
            math.k_norm,
            math.qk_eps,
            math.scaling,
            math.window,
            math.softcap,
            write="all" if kv_slot is None else "active",
            kv_slot=kv_slot,
            early=not own,  # the projection ran in between; a list of each sequence is made here
        )
        if slot is None or not own:
            return context
        kept = (slot >= 0).repeat_interleave(self.spec.d, -1)
        return torch.where(kept, context, 0)

    def _see_context(self, layer: int, context: Tensor, active: Active | None) -> None:
        """The out-projection's whole input, zero for skipped heads."""
        tap = Tap(layer, "attn_context")
        if tap not in self.taps:
            return
        if active is not None and active.index.shape[0] == 1:
            heads = context.unflatten(-1, (-1, self.spec.d))
            place = active.slot.clamp_min(0).long().expand(context.shape[0], -1)
            whole = heads.gather(1, place[..., None].expand(-1, -1, self.spec.d))
            context = torch.where((active.slot >= 0)[..., None], whole, 0).flatten(1)
        self.decider.see(tap, context)

    def feed_forward(self, layer: int, x: Tensor, w: LayerWeights) -> Tensor:
        """The FFN sublayer, residual added."""
        math = self.math.layers[layer]
        self._see_normed("ffn_input", layer, x, math.ffn_norm)
        residual = None if _is(math.ffn_post) else x
        sketch = self.decider.sketch(layer)
        if w.rest is not None:
            y = self.two_parts(layer, x, w, w.rest, math.ffn_norm, residual)
        elif sketch is not None:
            h, down = self.sketched_units(layer, x, w, math.ffn_norm, sketch), w.down_t
            how = (w.down_bias, down.scale, torch.float32)
            y = self.ops.threshold_gemv(h, down.weight, sketch.nothing, *how, residual=residual)
        elif "up" in self.decider.channels:
            h = self.units(layer, x, w, math.ffn_norm)
            y = self.passing(("down",), layer, h, w.down_t, w.down_bias, residual=residual)
        else:
            h, active = self.kept_units(layer, x, w, math.ffn_norm)
            y = self.columns(h, w.down_t, active, 1, w.down_bias, residual)
        return self._finish(y, x, math.ffn_post, math.ffn_after)

    def _finish(self, y: Tensor, x: Tensor, post: Norm, after: Norm) -> Tensor:
        """Norms of a sublayer's result, before or after the residual is added."""
        if _is(post):
            return self.ops.norm_add(y, post.weight, post.bias, post.kind, post.eps, x)
        if _is(after):
            return self.ops.norm_add(y, after.weight, after.bias, after.kind, after.eps)
        return y


def _is(norm: Norm) -> bool:
    return norm.kind != "none"
