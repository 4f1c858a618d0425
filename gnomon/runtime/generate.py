"""Sparse text generation through the public API: the decode engine, or the generic path."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase, StoppingCriteria
from transformers.modeling_utils import PreTrainedModel

from gnomon.engine.engine import Engine
from gnomon.engine.sampling import Sampling
from gnomon.engine.support import UnsupportedPolicyError
from gnomon.engine.text import Stream, Texts
from gnomon.host import UnsupportedHostError
from gnomon.policies.base import Policy
from gnomon.runtime.sparsify import sparsify

log = logging.getLogger(__name__)
BACKENDS = ("auto", "mask", "torch", "triton")
Stop = str | int | Sequence[str | int] | None
_told: set[str] = set()


@overload
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    policy: Policy,
    max_new_tokens: int = 128,
    backend: str = "auto",
    do_sample: bool = False,
    temperature: float = 1.0,
    seed: int | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    stream: Stream | None = None,
    stop: Stop = None,
) -> str: ...
@overload
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[str],
    policy: Policy,
    max_new_tokens: int = 128,
    backend: str = "auto",
    do_sample: bool = False,
    temperature: float = 1.0,
    seed: int | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    stream: Stream | None = None,
    stop: Stop = None,
) -> list[str]: ...
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[str],
    policy: Policy,
    max_new_tokens: int = 128,
    backend: str = "auto",
    do_sample: bool = False,
    temperature: float = 1.0,
    seed: int | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    stream: Stream | None = None,
    stop: Stop = None,
) -> str | list[str]:
    """Continues prompts with a sparse host; the prompt is dense but for its last token.

    Runs the decode engine. Hosts whose step it cannot express, and policies that exist under
    ``mask`` alone, take the generic path (:func:`gnomon.sparsify` around ``model.generate``), which
    is said once. Under a fixed policy with ``prefill=sparse`` the prompt is sparse too. Penalties
    of the host's generation config do not apply.

    Args:
        model: the host.
        tokenizer: the host's tokenizer; several prompts are padded on the left.
        prompt: one text or several.
        policy: decides the active units.
        max_new_tokens: tokens to generate at most.
        backend: ``auto``, ``torch`` or ``triton`` for the engine; ``mask`` for the reference.
        do_sample: sample instead of greedy decoding.
        temperature: of sampling.
        seed: of sampling; None draws anew each time.
        top_k: sample from the k likeliest tokens only.
        top_p: sample from the likeliest tokens that together hold this probability.
        stream: called with (row, piece) whenever text of a prompt's row is certain.
        stop: strings or token ids that end a continuation and are not part of it, beside the
            host's own end of text.

    Returns:
        The continuation of each prompt, without the prompt.

    Raises:
        ValueError: an empty prompt, a value out of its range, a policy that does not fit the host.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    _check(prompts, max_new_tokens, backend)
    sampling = Sampling(temperature if do_sample else 0.0, top_k, top_p)
    strings, ids = _stops(stop)
    ends = sorted({*_own_ends(model), *ids})
    batch = _pad_left(tokenizer, prompts).to(model.device)
    pad = int(tokenizer.pad_token_id or 0)
    texts = Texts(len(prompts), tokenizer, strings, ends, stream)
    run = _Run(model, policy, batch, max_new_tokens, sampling, seed, ends, pad, texts)
    if backend == "mask" or not run.engine(backend):
        run.generic("mask" if backend == "mask" else "auto")
    out = texts.close()
    return out[0] if isinstance(prompt, str) else out


class _Run:
    """One call of :func:`generate`, on either path."""

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        batch: BatchEncoding,
        tokens: int,
        sampling: Sampling,
        seed: int | None,
        ends: list[int],
        pad: int,
        texts: Texts,
    ) -> None:
        self.model, self.policy, self.batch, self.tokens = model, policy, batch, tokens
        self.sampling, self.seed, self.texts = sampling, seed, texts
        self.ends, self.pad = ends, pad

    def engine(self, backend: str) -> bool:
        """Runs the decode engine; False, and a message, where it cannot."""
        rows, length = self.batch["input_ids"].shape
        sizes = {"batch": rows, "context": length + self.tokens}
        try:
            engine = Engine(self.model, self.policy, backend=backend, **sizes)
        except (UnsupportedHostError, UnsupportedPolicyError) as reason:
            _tell(f"generate() takes the generic path: {reason}")
            return False
        with engine:
            engine.prefill(self.batch["input_ids"], self.batch["attention_mask"], self.tokens)
            if self.seed is not None:
                engine.seed(self.seed)
            chunks = engine.run(self.tokens, self.ends, sampling=self.sampling, pad=self.pad)
            for chunk in chunks:
                if bool(self.texts.add(chunk).all()):
                    break
        return True

    def generic(self, backend: str) -> None:
        """Runs the host's own ``generate()`` inside ``sparsify``."""
        how: dict[str, Any] = {"do_sample": not self.sampling.greedy}
        if not self.sampling.greedy:
            how |= {
                "temperature": self.sampling.temperature,
                "top_k": self.sampling.top_k or 0,
                "top_p": self.sampling.top_p or 1.0,
            }
        if self.seed is not None:
            torch.manual_seed(self.seed)
        with sparsify(self.model, self.policy, backend=backend):
            self.model.generate(  # type: ignore[operator]
                **self.batch,
                max_new_tokens=self.tokens,
                pad_token_id=self.pad,
                eos_token_id=self.ends or None,
                repetition_penalty=1.0,
                stopping_criteria=[_Watch(self.texts, self.batch["input_ids"].shape[1])],
                **how,
            )


class _Watch(StoppingCriteria):
    """Hands every new token of ``model.generate`` to the texts, and ends the rows that they end."""

    def __init__(self, texts: Texts, prompt: int) -> None:
        self._texts, self._seen = texts, prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        ended = self._texts.add(input_ids[:, self._seen :])
        self._seen = input_ids.shape[1]
        return ended.to(input_ids.device)


def _check(prompts: list[str], max_new_tokens: int, backend: str) -> None:
    if not prompts or not all(prompts):
        raise ValueError("prompt is empty: give at least one token of text for every sequence")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: generate at least 1 token")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not available: use {', '.join(BACKENDS)}")


def _stops(stop: Stop) -> tuple[list[str], list[int]]:
    given = [stop] if isinstance(stop, str | int) else list(stop or [])
    if any(s == "" for s in given):
        raise ValueError("stop holds an empty string: it would end every text at once")
    return [s for s in given if isinstance(s, str)], [s for s in given if isinstance(s, int)]


def _own_ends(model: PreTrainedModel) -> list[int]:
    """The host's end-of-text tokens."""
    config = getattr(model, "generation_config", None) or model.config
    ends = getattr(config, "eos_token_id", None)
    return [ends] if isinstance(ends, int) else list(ends or [])


def _tell(message: str) -> None:
    """Says it the first time."""
    if message not in _told:
        _told.add(message)
        log.warning("%s", message)


def _pad_left(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> BatchEncoding:
    side = tokenizer.padding_side
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    try:
        return tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1)
    finally:
        tokenizer.padding_side = side
