"""Text as documents, split once into three, and packed into blocks of token ids.

``train`` trains, ``validation`` picks the checkpoint and the calibration, ``heldout`` is what
evaluation reads; ``all`` is the whole text. A document is in one of the three.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Split = Literal["train", "validation", "heldout", "all"]
_MARGIN = (
    256  # tokens read beyond the wanted prefix, so that its last tokens are those of the whole text
)


@dataclass(frozen=True)
class Document:
    """One document; ``id`` is unique within its text and does not depend on where the file lies."""

    id: str
    text: str


@dataclass(frozen=True, eq=False)
class Blocks:
    """Packed token ids (n, block); ``digest`` is the sha256 of the ids as little-endian int64."""

    ids: Tensor
    digest: str
    name: str
    split: Split
    source: Text

    def __len__(self) -> int:
        return self.ids.shape[0]


class Text:
    """Base of every text source: override :meth:`read` and ``fingerprint``, and set ``name``.

    Args:
        block: tokens per block, a beginning-of-text token included.
        tokens: tokens that :meth:`blocks` takes by default; rounded down to whole blocks.
        heldout: share of the documents kept out of training, half of it ``validation`` and half
            ``heldout``.
        seed: decides, with each document's id, its split and its place in the order.
        bos: whether every block starts with the tokenizer's beginning-of-text token; ``auto``: only
            if the tokenizer adds one by itself.
    """

    name: str = "text"
    streaming: bool = False  # documents too many to list: they keep the order of the stream

    def __init__(
        self,
        block: int = 512,
        tokens: int = 8192,
        heldout: float = 0.1,
        seed: int = 0,
        bos: Literal["auto"] | bool = "auto",
    ) -> None:
        if block < 2:
            raise ValueError(f"text.block={block} must be at least 2 tokens")
        if tokens < block:
            raise ValueError(
                f"text.tokens={tokens} is fewer than one block of text.block={block} tokens"
            )
        if not 0 <= heldout < 1:
            raise ValueError(f"text.heldout={heldout} must be a share in [0, 1)")
        if bos not in ("auto", True, False):
            raise ValueError(f"text.bos={bos!r} must be auto, true or false")
        self.block, self.tokens, self.heldout, self.seed, self.bos = (
            block,
            tokens,
            heldout,
            seed,
            bos,
        )

    @property
    def fingerprint(self) -> str:
        """Identity of the source's content, without paths; part of a trace folder's identity."""
        raise NotImplementedError(f"{type(self).__name__}.fingerprint")

    def facts(self, *splits: Split) -> dict[str, Any]:
        """What tells which documents ``splits`` hold, JSON-able; predictors record it."""
        return {"seed": self.seed, "heldout": self.heldout, "fingerprint": self.fingerprint}

    def read(self, split: Split) -> Iterator[Document]:
        """Every document, in file order; ``split`` is for sources that have parts of their own."""
        raise NotImplementedError(f"{type(self).__name__}.read")

    def documents(self, split: Split) -> Iterator[Document]:
        """Documents of a split: ``all`` in file order, the others in seeded order.

        Raises:
            ValueError: unknown split, nothing is held out, or the source cannot be read.
        """
        if split not in get_args(Split):
            raise ValueError(f"split={split!r} is unknown; use one of {', '.join(get_args(Split))}")
        if split == "all":
            yield from self.read(split)
        elif self.streaming:
            self._require_share(split)
            yield from (d for d in self.read(split) if self._part(d) == split)
        else:
            order = sorted(self.read(split), key=self._draw)
            yield from self.partition(order, split)

    def partition(self, order: list[Document], split: Split) -> list[Document]:
        """The part of the seeded ``order`` that belongs to ``split``.

        Each document's draw decides alone, so that parts only grow when documents are added. A part
        that this leaves empty takes the lowest draw of the training documents.

        Raises:
            ValueError: fewer than three documents, or nothing is held out.
        """
        self._require_share(split)
        if not self.heldout:
            return order
        if len(order) < 3:
            raise ValueError(
                f"text {self.name} has {len(order)} document(s), and training, validation and "
                "evaluation need one each: give more text, or a .jsonl file with a document a "
                "line (text.split=all evaluates on the whole text)"
            )
        parts: dict[str, list[Document]] = {"train": [], "validation": [], "heldout": []}
        for document in order:
            parts[self._part(document)].append(document)
        for found in parts.values():
            if not found:
                train = parts["train"]
                donor = train if len(train) > 1 else max(parts.values(), key=len)
                found.append(donor.pop(0))
        return parts[split]

    def blocks(
        self,
        tokenizer: Any,
        split: Split,
        tokens: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> Blocks:
        """Tokenises and packs one split.

        ``all``: the documents joined verbatim and tokenised as one string, cut into blocks.
        The others: each document tokenised alone, packed end to end; rank ``r`` of
        ``world`` takes every ``world``-th document, so ranks never share one.

        Args:
            tokenizer: a Hugging Face tokenizer.
            split: which documents.
            tokens: at most so many tokens over all ranks; ``None``: ``self.tokens``.
            rank: this process.
            world: number of processes.

        Returns:
            Blocks with ids (n, block).

        Raises:
            ValueError: the split holds less than one block for this rank.
        """
        wanted = (self.tokens if tokens is None else tokens) // self.block
        count = len(range(rank, wanted, world))
        if count < 1:
            raise ValueError(
                f"{self.tokens if tokens is None else tokens} tokens make {wanted} blocks of "
                f"{self.block} for {world} process(es): raise text.tokens or lower text.block"
            )
        prefix = self._prefix(tokenizer)
        body = self.block - len(prefix)
        if split == "all":
            ids = self._whole(tokenizer, wanted * body)
        else:
            mine = itertools.islice(self.documents(split), rank, None, world)
            ids = _take(_tokenise(tokenizer, mine), count * body)
        rows = ids[: len(ids) // body * body].view(-1, body)
        rows = rows[rank::world] if split == "all" else rows
        self._check_rows(rows, count, len(ids), split, world)
        if prefix:
            rows = torch.cat([torch.tensor(prefix).expand(len(rows), -1), rows], dim=1)
        rows = rows.contiguous()
        digest = hashlib.sha256(rows.numpy().astype("<i8").tobytes()).hexdigest()
        return Blocks(rows, digest, self.name, split, self)

    def _check_rows(self, rows: Tensor, count: int, found: int, split: Split, world: int) -> None:
        if len(rows) == 0:
            share = f" (for each of {world} processes)" if world > 1 else ""
            fix = "" if split == "all" else f", or change text.heldout={self.heldout}"
            raise ValueError(
                f"text {self.name}: split {split!r} has {found} tokens{share}, less than one "
                f"block: give more text, lower text.block={self.block}{fix}"
            )
        if len(rows) < count:
            log.warning(
                "text %s: split %r has only %d of %d blocks of %d tokens",
                *(self.name, split, len(rows), count, self.block),
            )

    def _whole(self, tokenizer: Any, wanted: int) -> Tensor:
        """First ``wanted`` tokens of the whole text, tokenising no more of it than needed."""
        source = self.documents("all")
        text, chars = "", wanted * 6 + 8 * _MARGIN
        while True:
            pieces = [text]
            size = len(text)
            for document in source:
                pieces.append(document.text)
                size += len(document.text)
                if size >= chars:
                    break
            else:
                return _encode(tokenizer, "".join(pieces))[:wanted]
            text = "".join(pieces)
            ids = _encode(tokenizer, text)
            if len(ids) >= wanted + _MARGIN:
                return ids[:wanted]
            chars = size * 2

    def _prefix(self, tokenizer: Any) -> list[int]:
        bos = tokenizer.bos_token_id
        if self.bos is False or (bos is None and self.bos == "auto"):
            return []
        if bos is None:
            raise ValueError(
                "text.bos=true, but the host's tokenizer has no beginning-of-text token"
            )
        adds = tokenizer("a").input_ids[:1] == [bos]
        return [bos] if self.bos is True or adds else []

    def _require_share(self, split: Split) -> None:
        if split != "train" and not self.heldout:
            raise ValueError(
                f"text {self.name}: split {split!r} is empty under text.heldout=0, which keeps no "
                "document out of training: set text.heldout, e.g. to 0.1"
            )

    def _part(self, document: Document) -> Split:
        draw = self._draw(document)
        if draw >= self.heldout:
            return "train"
        return "validation" if draw < self.heldout / 2 else "heldout"

    def _draw(self, document: Document) -> float:
        digest = hashlib.sha256(f"{self.seed}:{document.id}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64


def _encode(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids).long()


def _tokenise(tokenizer: Any, documents: Iterable[Document]) -> Iterator[list[int]]:
    source = iter(documents)
    while texts := [d.text for d in itertools.islice(source, 32)]:
        yield from tokenizer(texts, add_special_tokens=False, verbose=False).input_ids


def _take(streams: Iterable[list[int]], count: int) -> Tensor:
    ids: list[int] = []
    for stream in streams:
        ids.extend(stream)
        if len(ids) >= count:
            break
    return torch.tensor(ids[:count]).long()
