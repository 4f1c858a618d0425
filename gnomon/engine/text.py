"""Text that is being generated: pieces for a stream, and where a stop string ends a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # a token may end in the middle of a character
Stream = Callable[[int, str], None]


class GrowingText:
    """Decodes the tokens of one row as they come.

    Args:
        tokenizer: the host's.
        stops: strings before which the text ends.
        ends: token ids that end the row and are no text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], ends: Sequence[int]
    ) -> None:
        self._tokenizer, self._stops, self._ends = tokenizer, tuple(stops), frozenset(ends)
        self._tokens: list[int] = []
        self._shown = 0
        self.text, self.finished = "", False

    def add(self, tokens: Sequence[int], *, decode: bool = True) -> str:
        """Takes more tokens and returns the text that is certain and was not returned before.

        Without ``decode`` they are only kept, until :meth:`close`.
        """
        if self.finished:
            return ""
        for token in tokens:
            if token in self._ends:
                self.finished = True
                break
            self._tokens.append(token)
        if not decode:
            return ""
        self._decode()
        return self._piece(len(self.text) if self.finished else self._certain())

    def close(self) -> str:
        """No token follows: the text that was held back."""
        self.finished = True
        self._decode()
        return self._piece(len(self.text))

    def _decode(self) -> None:
        # From the start each time: spaces and merges depend on what stands before.
        self.text = str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
        found = [at for stop in self._stops if (at := self.text.find(stop)) >= 0]
        if found:
            self.text, self.finished = self.text[: min(found)], True

    def _certain(self) -> int:
        """Characters that later tokens cannot change or make part of a stop string."""
        sure = self.text.rstrip(UNFINISHED)
        held = [_overlap(sure, stop) for stop in self._stops]
        return max(len(sure) - max(held, default=0), self._shown)

    def _piece(self, end: int) -> str:
        piece, self._shown = self.text[self._shown : end], max(self._shown, end)
        return piece


class Texts:
    """The rows of a batch.

    Args:
        rows: sequences.
        tokenizer, stops, ends: as in :class:`GrowingText`.
        stream: called with (row, piece) for every new piece of text.
    """

    def __init__(
        self,
        rows: int,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[str],
        ends: Sequence[int],
        stream: Stream | None,
    ) -> None:
        self._rows = [GrowingText(tokenizer, stops, ends) for _ in range(rows)]
        self._stream = stream
        self._watched = stream is not None or bool(stops)

    def add(self, tokens: Tensor) -> Tensor:
        """Takes tokens (B, n) and tells which rows have ended, (B,) bool on the CPU."""
        for i, (row, new) in enumerate(zip(self._rows, tokens.tolist(), strict=True)):
            self._show(i, row.add(new, decode=self._watched))
        return torch.tensor([row.finished for row in self._rows])

    def close(self) -> list[str]:
        """The whole text of every row."""
        for i, row in enumerate(self._rows):
            self._show(i, row.close())
        return [row.text for row in self._rows]

    def _show(self, row: int, piece: str) -> None:
        if piece and self._stream is not None:
            self._stream(row, piece)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop string may begin with."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
