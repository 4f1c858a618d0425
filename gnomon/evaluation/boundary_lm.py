"""The harness's view of a host that may be sparse: it carries the boundary of every row.

lm-evaluation-harness asks for the log-likelihood of a continuation after a context. Under
``decode`` the context's last position, which predicts the first token of the continuation, is the
first sparse one, so that a single-token answer comes from a sparse step too; under ``all`` every
position is sparse. Only this module and :mod:`gnomon.evaluation.harness` import the harness.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from gnomon.runtime.session import Session

Request = tuple[tuple[str, str], list[int], list[int]]  # texts, context and continuation tokens
Row = tuple[tuple[int, ...], int]  # tokens fed, and the column that predicts the first answer token
Encoded = dict[tuple[str, str], tuple[list[int], list[int]]]
_encoded: WeakKeyDictionary[Any, Encoded] = WeakKeyDictionary()  # a sweep asks many policies


class BoundaryLM(HFLM):
    """A host for the harness.

    Attributes:
        session: of the :func:`gnomon.sparsify` around the host; None while it is dense.

    Args:
        model: the host.
        tokenizer: its tokenizer.
        batch: rows of a forward.
    """

    def __init__(self, model: Any, tokenizer: Any, batch: int) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        self.session: Session | None = None
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._encoded = _encoded.setdefault(tokenizer, {})

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a question and an answer, encoded once for all policies that are asked."""
        pair = (context, continuation)
        if pair not in self._encoded:
            self._encoded[pair] = super()._encode_pair(context, continuation)
        return self._encoded[pair]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding writes it) of every continuation."""
        rows: dict[Row, list[int]] = {}  # answers of one token share their context's forward
        for i, (_texts, context, continuation) in enumerate(requests):
            rows.setdefault(self._row(context, continuation), []).append(i)
        order = sorted(rows, key=lambda row: (-len(row[0]), row))
        found: dict[int, tuple[float, bool]] = {}
        size = override_bs or int(self.batch_size)
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            asked = [i for row in chunk for i in rows[row]]
            answers = [
                _answer(logits, requests[i][2])
                for row, logits in zip(chunk, self._logits(chunk), strict=True)
                for i in rows[row]
            ]
            # one wait for the device per forward, not two per request
            for i, (total, greedy) in zip(asked, torch.stack(answers).tolist(), strict=True):
                found[i] = (total, bool(greedy))
        return [found[i] for i in range(len(requests))]

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        """What is fed for a request: cut on the left to the host's context, its last token off."""
        if not context or not 0 < len(continuation) <= self.max_length:
            raise ValueError(
                f"a request of {len(context)} and {len(continuation)} tokens does not fit the "
                f"host's context of {self.max_length}: leave the task out of tasks.names"
            )
        tokens = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
        return tokens, len(tokens) - len(continuation)

    @torch.no_grad()
    def _logits(self, rows: Sequence[Row]) -> list[Tensor]:
        """Logits (answer, V) of every row, from one forward padded on the right."""
        lengths = [len(tokens) for tokens, _ in rows]
        least = self._least_prompt
        width = max(least, *lengths)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, (tokens, _) in enumerate(rows):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : max(least, len(tokens))] = 1
        first = min(column for _, column in rows)
        keep = {"logits_to_keep": width - first} if self._keeps else {}
        prompts = torch.tensor([max(least, column + 1) for _, column in rows])
        logits = self._forward(ids, mask, prompts, keep)
        offset = width - logits.shape[1]
        return [
            logits[i, column - offset : lengths[i] - offset] for i, (_, column) in enumerate(rows)
        ]

    @property
    def _least_prompt(self) -> int:
        """Tokens that a prompt must have. A policy that decides from all of them but the last has
        nothing in a context of one: the token after it counts as the prompt's last then."""
        deciding = self.session is not None and self.session.policy.refresh == "prompt"
        return 2 if deciding else 1

    def _forward(self, ids: Tensor, mask: Tensor, prompts: Tensor, keep: dict[str, int]) -> Tensor:
        """One cacheless forward of ids (B, T) with prompts of (B,) tokens."""
        device = self.device
        if self.session is not None:
            self.session.prompt_length = prompts.to(device)
        try:
            return self.model(
                input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **keep
            ).logits
        finally:
            if self.session is not None:
                self.session.prompt_length = None  # generate() tells the boundary by its cache


def _answer(logits: Tensor, continuation: Sequence[int]) -> Tensor:
    """Log-likelihood of n tokens under logits (n, V), and 1 if each is the likeliest: (2,)."""
    scores = logits.float().log_softmax(-1)
    goal = torch.tensor(continuation).to(logits.device, non_blocking=True)
    chosen = scores.gather(1, goal[:, None])
    return torch.stack([chosen.sum(), (scores.argmax(-1) == goal).all().float()])
