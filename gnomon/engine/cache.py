"""The decode engine's key/value cache: static buffers in which every row starts at position 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gnomon.host import HostSpec


class Cache:
    """Keys and values of every layer, and how many tokens each row holds.

    Attributes:
        keys, values: per layer (B, G, C, d), in the host's dtype.
        position: (B,) int32, tokens cached: the index of the next one.
    """

    def __init__(
        self, spec: HostSpec, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocates for ``batch`` rows of ``capacity`` tokens."""
        shape = (batch, spec.G, capacity, spec.d)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.L)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.L)]
        self.position = torch.zeros(batch, dtype=torch.int32, device=device)

    @property
    def batch(self) -> int:
        """Rows."""
        return self.position.shape[0]

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        return self.keys[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def fill(self, past: Any, lengths: Tensor) -> None:
        """Takes the cache of a dense Hugging Face prefill of left-padded rows.

        Args:
            past: the forward's dynamic ``past_key_values``, whose sliding layers hold the tokens
                that can still be attended; None for rows without any cached token.
            lengths: (B,) tokens of each row, its last columns.

        Raises:
            ValueError: more tokens than the cache holds.
        """
        longest = int(lengths.max())
        if longest > self.capacity:
            raise ValueError(
                f"the prompt has {longest} tokens, the cache holds {self.capacity}: raise context"
            )
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            for row, length in enumerate(lengths.tolist()):
                if length == 0:
                    continue
                source = past.layers[layer]
                for target, given in ((keys, source.keys), (values, source.values)):
                    held = min(length, given.shape[2])
                    target[row, :, length - held : length] = given[row, :, given.shape[2] - held :]
        self.position.copy_(lengths)

    def rewind(self, lengths: Tensor) -> None:
        """Forgets tokens past (B,) ``lengths``."""
        self.position.copy_(lengths)
