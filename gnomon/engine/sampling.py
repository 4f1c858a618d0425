"""The next token from the logits of a decode step, without a host sync and safe in a CUDA graph.

    greedy     t = argmax z
    sampling   t = argmax (z / temperature - log e),  e ~ Exp(1) per token,  over the tokens kept

The second is the Gumbel trick: the very distribution softmax(z / temperature), drawn by one argmax.
``top_k`` keeps the k largest logits, then ``top_p`` the fewest tokens that together hold that much
probability.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the likeliest tokens that together hold this probability; at least one.

    Raises:
        ValueError: a value outside its range, or a filter under greedy decoding.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: use 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: keep at least 1 token, or None for all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is outside (0, 1]; None keeps all tokens")
        if self.greedy and (self.top_k is not None or self.top_p is not None):
            raise ValueError(
                f"top_k={self.top_k}, top_p={self.top_p} need sampling: set do_sample=True and a "
                "temperature above 0"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0


GREEDY = Sampling()


def next_token(
    logits: Tensor, sampling: Sampling = GREEDY, generator: torch.Generator | None = None
) -> Tensor:
    """Draws one token per row.

    Args:
        logits: (B, V) fp32.
        sampling: how.
        generator: random state on the logits' device; None takes the device's own.

    Returns:
        (B,) int64.
    """
    if sampling.greedy:
        return logits.argmax(-1)
    kept, tokens = _filtered(logits / sampling.temperature, sampling)
    noise = torch.empty_like(kept).exponential_(generator=generator)
    drawn = (kept - noise.log()).argmax(-1, keepdim=True)
    return (drawn if tokens is None else tokens.gather(-1, drawn)).squeeze(-1)


def _filtered(z: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Logits (B, n) of the tokens kept, -inf elsewhere, and which tokens they are (None: all)."""
    if sampling.top_k is not None:
        z, tokens = z.topk(min(sampling.top_k, z.shape[-1]), dim=-1)
    elif sampling.top_p is not None:
        z, tokens = z.sort(dim=-1, descending=True)
    else:
        return z, None
    if sampling.top_p is not None:
        p = z.softmax(-1)
        z = z.masked_fill(p.cumsum(-1) - p >= sampling.top_p, -torch.inf)
    return z, tokens
