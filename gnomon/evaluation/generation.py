"""How far a sparse model's own continuations stray from the dense model: KL and top-1 agreement.

The *sparse* model continues prompts greedily; the dense model is then teacher-forced on what the
sparse one wrote. This measures compounding error, which perplexity on human text does not see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.modeling_utils import PreTrainedModel

import gnomon
from gnomon.evaluation.quality import Protocol, positions_per_chunk, tail_logits


@dataclass(frozen=True)
class Generation:
    """What was compared.

    Attributes:
        tokens: generated tokens per continuation.
        prompts: number of continuations.
        kl: mean KL(dense || sparse) per generated token, in nats; 0 is lossless.
        agreement: share of generated tokens that the dense model would also have put first.
    """

    tokens: int
    prompts: int
    kl: float
    agreement: float

    def as_result(self) -> dict[str, Any]:
        """The fields of ``quality.generation`` in results.json."""
        return {
            "tokens": self.tokens,
            "prompts": self.prompts,
            "kl": self.kl,
            "agreement": self.agreement,
        }


@torch.no_grad()
def compare_generation(
    model: PreTrainedModel,
    policy: Any,
    prompts: Tensor,
    *,
    tokens: int = 256,
    backend: str = "auto",
    protocol: Protocol | None = None,
    batch: int = 4,
) -> Generation:
    """Generates with the sparse model, then scores every step with the dense one.

    Args:
        model: the dense host.
        policy: what decides the active units.
        prompts: (n, P) tokens without padding.
        tokens: N, greedy tokens per prompt; ending early is not allowed, so every row has N.
        backend: of :func:`gnomon.sparsify`.
        protocol: positions that are sparse; ``decode`` by default.
        batch: prompts per ``generate()`` call.

    Raises:
        ValueError: prompt and continuation exceed the host's context.
    """
    check_context(model, prompts.shape[1] + tokens)
    device = next(model.parameters()).device
    kl, agree = 0.0, 0
    for rows in prompts.split(batch):
        name = protocol.name if protocol else "decode"
        written, sparse = _continue(model, policy, rows.to(device), tokens, backend, name)
        dense = tail_logits(model, written, tokens + 1)[:, :-1]
        step_kl, step_agree = _compare(dense, sparse)
        kl, agree = kl + step_kl, agree + step_agree
    count = len(prompts) * tokens
    return Generation(tokens, len(prompts), max(0.0, kl / count), agree / count)


def check_context(model: PreTrainedModel, length: int) -> None:
    """Raises ValueError when ``length`` tokens do not fit the host's context."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(
            f"{length} tokens of prompt and continuation exceed the host's context of {limit}: "
            "lower measure.quality.generation.tokens or measure.quality.generation.prompt"
        )


def greedy_config(model: PreTrainedModel, tokens: int, *, exactly: bool) -> GenerationConfig:
    """Plain greedy decoding, with the host's own sampling and penalty defaults switched off.

    Args:
        model: the host, for its special tokens.
        tokens: the most tokens to write.
        exactly: whether ending earlier is not allowed.
    """
    config = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    first = eos[0] if isinstance(eos, list) else eos
    pad = getattr(config, "pad_token_id", None)
    pad = first if pad is None else pad
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=tokens,
        min_new_tokens=tokens if exactly else 0,
        eos_token_id=eos,
        pad_token_id=0 if pad is None else pad,
        output_logits=True,
        return_dict_in_generate=True,
    )


def _continue(
    model: PreTrainedModel, policy: Any, rows: Tensor, tokens: int, backend: str, protocol: str
) -> tuple[Tensor, Tensor]:
    """Sequences (B, P + N) and the sparse logits (B, N, V) that each new token was taken from."""
    with gnomon.sparsify(model, policy, backend=backend, protocol=protocol):
        write: Any = model.generate
        out = write(
            rows,
            attention_mask=torch.ones_like(rows),
            generation_config=greedy_config(model, tokens, exactly=True),
        )
    return out.sequences, torch.stack(out.logits, dim=1)


def _compare(dense: Tensor, sparse: Tensor) -> tuple[float, int]:
    """Summed KL(dense || sparse) in nats and the number of equal top choices, over (B, N, V)."""
    kl, agree = 0.0, 0
    step = positions_per_chunk(dense)
    sparse = sparse.to(dense.device)
    for p, q in zip(dense.split(step, 1), sparse.split(step, 1), strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
    return kl, agree
