"""Sparse text generation through the public API."""

from __future__ import annotations

from typing import overload

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel

from gnomon.policies.base import Policy
from gnomon.runtime.sparsify import sparsify


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
) -> str | list[str]:
    """Continues prompts with a sparse host; the prompt itself is dense but for its last token.

    Args:
        model: the host.
        tokenizer: the host's tokenizer; several prompts are padded on the left.
        prompt: one text or several.
        policy: decides the active units.
        max_new_tokens: tokens to generate at most.
        backend: as in :func:`gnomon.sparsify`.
        do_sample: sample instead of greedy decoding.
        temperature: of sampling.
        seed: of sampling.

    Returns:
        The continuation of each prompt, without the prompt.

    Raises:
        ValueError: an empty prompt, or what :func:`gnomon.sparsify` refuses.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or not all(prompts):
        raise ValueError("prompt is empty: give at least one token of text for every sequence")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: generate at least 1 token")
    batch = _pad_left(tokenizer, prompts).to(model.device)
    if seed is not None:
        torch.manual_seed(seed)
    sampling = (
        {"do_sample": True, "temperature": temperature} if do_sample else {"do_sample": False}
    )
    with sparsify(model, policy, backend=backend):
        out = model.generate(  # type: ignore[operator]
            **batch, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling
        )
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts[0] if isinstance(prompt, str) else texts


def _pad_left(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> BatchEncoding:
    side = tokenizer.padding_side
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    try:
        return tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1)
    finally:
        tokenizer.padding_side = side
