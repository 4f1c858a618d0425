"""Tiny random hosts built from configs, with a byte-level tokenizer, for tests and smoke jobs."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_utils import PreTrainedModel

VOCAB = 258  # 256 bytes, padding, end of text

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "pad_token_id": 256,
    "eos_token_id": 257,
    "bos_token_id": None,
}
_GATED = {"intermediate_size": 48, "num_key_value_heads": 2}
_LONG = {"intermediate_size": 48}
_HEADS = _GATED | {"head_dim": 8}
_GEMMA = _HEADS | {"query_pre_attn_scalar": 8, "sliding_window": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GATED,
    "mistral": _GATED | {"sliding_window": None},
    "qwen2": _GATED,
    "qwen3": _HEADS,
    "gemma": _HEADS,
    # SDPA, which transformers 5.17 takes, has no soft cap.
    "gemma2": _GEMMA | {"attn_implementation": "eager"},
    "gemma3_text": _GEMMA,
    "phi3": _GATED,  # fused qkv, fused gate and up
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_inner": 48},  # Conv1D
    "gpt_neox": _LONG | {"rotary_pct": 0.5},  # fused qkv by head, parallel residual
    "falcon": {"ffn_hidden_size": 48},  # multi-query
    "bloom": {},  # ALiBi; F is 4 D
    "stablelm": _GATED | {"partial_rotary_factor": 0.5},
    "olmo2": _GATED,  # norms after the sublayers, q and k norms over all heads
    "granite": _GATED | {"residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "cohere": _GATED,  # parallel residual, scaled logits
    "smollm3": _GATED | {"no_rope_layers": [1, 0, 1]},
    "phi": _LONG,
    "starcoder2": _GATED,
    "glm4": _HEADS,  # separate q, k, v, fused gate and up
}


def tiny_host(
    family: str = "llama", seed: int = 0, **overrides: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Builds a random host of a few thousand parameters and its byte tokenizer.

    Args:
        family: one of ``FAMILIES``.
        seed: of the random weights; the global random state is left as it was.
        **overrides: fields of the family's Hugging Face config.

    Raises:
        ValueError: unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"host.family={family!r} is unknown; use one of {', '.join(FAMILIES)}")
    config = CONFIG_MAPPING[family](**(_SHAPE | FAMILIES[family] | overrides))
    config._name_or_path = f"tiny-{family}-{seed}"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for p in model.parameters():  # larger than the usual 0.02, so that masks are felt
                p.add_(torch.randn_like(p) * 0.1)
    return model, byte_tokenizer()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the 256 bytes, ``<pad>`` and ``<eos>``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"<pad>": 256, "<eos>": 257}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
