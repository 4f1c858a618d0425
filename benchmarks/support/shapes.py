"""Hosts of published shapes with random weights, built on the device: for speed alone.

Time and bytes of a decode step do not depend on the values of the weights, quality does: nothing
but speed may be read off these hosts. Parameters are made on the device and in the dtype that they
stay in, one after another, so that OPT-30B's 60 GB are there once.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel

_LLAMA_2 = {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}


def _gated(D: int, F: int, L: int, H: int, G: int, **rest: Any) -> dict[str, Any]:
    sizes = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": L}
    return sizes | {"num_attention_heads": H, "num_key_value_heads": G} | rest


def _opt(D: int, L: int, H: int) -> dict[str, Any]:
    sizes = {"hidden_size": D, "ffn_dim": 4 * D, "num_hidden_layers": L, "num_attention_heads": H}
    return sizes | {"vocab_size": 50272, "word_embed_proj_dim": D, "max_position_embeddings": 2048}


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2-7b": ("llama", _gated(4096, 11008, 32, 32, 32, **_LLAMA_2)),
    "llama-2-13b": ("llama", _gated(5120, 13824, 40, 40, 40, **_LLAMA_2)),
    "llama-3-8b": (
        "llama",
        _gated(4096, 14336, 32, 32, 8, vocab_size=128256)
        | {"max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5},
    ),
    "qwen2.5-1.5b": (
        "qwen2",
        _gated(1536, 8960, 28, 12, 2, vocab_size=151936, tie_word_embeddings=True)
        | {"max_position_embeddings": 32768, "rope_theta": 1000000.0},
    ),
    "smollm2-135m": (
        "llama",
        _gated(576, 1536, 30, 9, 3, vocab_size=49152, tie_word_embeddings=True)
        | {"max_position_embeddings": 8192, "rope_theta": 100000.0},
    ),
    "opt-6.7b": ("opt", _opt(4096, 32, 32)),
    "opt-13b": ("opt", _opt(5120, 40, 40)),
    "opt-30b": ("opt", _opt(7168, 48, 56)),
    "tiny": ("llama", _gated(32, 48, 3, 4, 2, vocab_size=258)),  # for tests of the benchmarks
}


def random_host(
    shape: str, *, dtype: str = "bfloat16", device: str | torch.device = "cuda", seed: int = 0
) -> PreTrainedModel:
    """A host of one of :data:`SHAPES`, in evaluation mode.

    Args:
        shape: its name.
        dtype: ``bfloat16``, ``float16`` or ``float32``.
        device: where it is built.
        seed: of the weights.

    Raises:
        ValueError: unknown shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r} is unknown; use one of {', '.join(SHAPES)}")
    family, sizes = SHAPES[shape]
    config = CONFIG_MAPPING[family](**sizes)
    config._name_or_path = f"{shape}-random"
    cuda = torch.device(device).type == "cuda"
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if cuda else []):
        torch.manual_seed(seed)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.eval().requires_grad_(False)
