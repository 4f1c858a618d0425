"""Where a forward pass is sparse: the position semantics of protocols, prompts, caches and padding.

A sequence has a prompt of P tokens, padding excluded. Under ``decode`` positions < P-1 are dense
and position P-1 and all after it are sparse; under ``all`` every position is. ``prompt`` refresh
decides at position P-2. A fixed policy with ``prefill=sparse`` is sparse at every position under
``decode`` too. ``published`` is ShadowLLM's accuracy set-up, which is not causal: every
position is sparse, and ``prompt`` refresh decides from the last token of the whole text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Protocol = Literal["decode", "all", "published"]


@dataclass
class Step:
    """One forward of the host.

    Attributes:
        sparse: (B, T) bool, where skipping applies.
        live: (B, T) bool, real tokens.
        positions: (B, T) index of the token in its own sequence; padding has no meaning.
        decide_at: (B,) column of position P-2 when this forward holds it, else None.
        single: a decode step of one token per row.
        begins: the cache is empty before it, or there is none.
    """

    sparse: Tensor
    live: Tensor
    positions: Tensor
    decide_at: Tensor | None
    single: bool
    begins: bool = False

    @property
    def prompt(self) -> Tensor:
        """(B, T) bool, tokens of the prompt that are dense."""
        return self.live & ~self.sparse

    @property
    def start(self) -> int | None:
        """First column that is sparse in any row; None if the forward is dense."""
        if self.single:  # every row is sparse: nothing to ask the device
            return 0
        columns = self.sparse.any(0).nonzero()
        return int(columns[0]) if len(columns) else None


def check_protocol(protocol: str) -> None:
    """Raises ValueError for an unknown protocol."""
    if protocol not in get_args(Protocol):
        raise ValueError(f"protocol={protocol!r}: use {', '.join(get_args(Protocol))}")


def read_step(args: dict[str, Any], protocol: str, prompt_length: int | Tensor | None) -> Step:
    """Reads the bound arguments of a host's forward.

    Args:
        args: by name, as ``HostHooks.on_forward`` hands them over.
        protocol: ``decode``, ``all`` or ``published``.
        prompt_length: P, one for all rows or (B,); None where the cache tells. With a cache the
            prompt may come in chunks.

    Raises:
        ValueError: a multi-token forward without cache has no boundary; P does not fit.
    """
    tokens = args.get("input_ids")
    tokens = args["inputs_embeds"] if tokens is None else tokens
    batch, length, device = tokens.shape[0], tokens.shape[1], tokens.device
    cache = args.get("past_key_values")
    past = 0 if cache is None else int(cache.get_seq_length())
    live, positions = _live(args.get("attention_mask"), batch, length, past, device)
    given = args.get("position_ids")
    if past > 0 and isinstance(given, Tensor) and given.dim() == 2:
        positions = given.to(device).expand(batch, length)  # a 4-D mask hides the left padding
    if protocol == "published":
        if past > 0:
            raise ValueError(
                "protocol='published' decides from the last token of a whole text and has no "
                "decode steps: use protocol='decode' to generate (and "
                "measure.quality.generation.tokens=0 to leave continuations out)"
            )
        at = _column(live, positions, live.sum(1) - 1)
        return Step(live.clone(), live, positions, at, single=False, begins=True)
    if protocol == "all":
        single = length == 1 and past > 0
        return Step(live.clone(), live, positions, None, single, begins=past == 0)
    if prompt_length is not None:
        ends = _lengths(prompt_length, batch, device)
        chunked = cache is not None or args.get("use_cache")  # a prompt may go on in later forwards
        if not chunked and bool((ends > live.sum(1)).any()):
            raise ValueError(
                f"prompt_length={ends.tolist()} exceeds the rows' lengths {live.sum(1).tolist()}"
            )
    elif past > 0:
        return Step(live.clone(), live, positions, None, single=length == 1)
    elif cache is not None or args.get("use_cache") or length == 1:
        ends = live.sum(1)
    else:
        raise ValueError(
            f"a forward of {length} tokens without a cache has no prompt boundary: pass "
            'protocol="all" or prompt_length= to sparsify, or use generate()'
        )
    sparse = live & (positions >= (ends - 1)[:, None])
    at = _column(live, positions, ends - 2)
    return Step(sparse, live, positions, at, single=False, begins=past == 0)


def _column(live: Tensor, positions: Tensor, wanted: Tensor) -> Tensor | None:
    hit = live & (positions == wanted[:, None])
    return hit.int().argmax(1) if bool(hit.any(1).all()) else None


def _lengths(prompt_length: int | Tensor, batch: int, device: torch.device) -> Tensor:
    ends = torch.as_tensor(prompt_length, device=device).expand(batch)
    if bool((ends < 1).any()):
        raise ValueError(f"prompt_length={ends.tolist()}: a prompt has at least one token")
    return ends


def _live(
    mask: Any, batch: int, length: int, past: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Live tokens and positions of the last ``length`` columns from a 2-D, 4-D, dict or no mask."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if isinstance(mask, Tensor) and mask.dim() == 2:
        whole = mask.to(device).bool()
        if past > 0 and whole.shape[1] == length:  # covers the new tokens only
            return whole, past + whole.long().cumsum(1) - 1
        positions = whole.long().cumsum(1) - 1
        return whole[:, past : past + length], positions[:, past : past + length]
    live = torch.ones(batch, length, dtype=torch.bool, device=device)
    if isinstance(mask, Tensor) and mask.dim() == 4 and past == 0:
        own = mask[:, 0, :length, :length].diagonal(dim1=1, dim2=2)
        live = (own if own.dtype == torch.bool else own >= 0).expand(batch, length).to(device)
    return live, past + live.long().cumsum(1) - 1
