"""Which hosts have a fused decode step: anything that the step would not compute is refused.

A step that leaves something out gives wrong text without an error, so every parameter of the
decoder must be one that the step reads, and every scaling in the config neutral or known.
"""

from __future__ import annotations

from torch import nn

from gnomon.host import ROLES, HostSpec, UnsupportedHostError, module

NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "self_attn_layer_norm",
    "final_layer_norm",
    "norm",
    "q_norm",
    "k_norm",
)
EMBEDDINGS = ("embed_tokens", "embed_positions", "project_in", "project_out")
_LEAVES = (name.rpartition(".")[2] for names in ROLES.values() for name in names)
_READ = frozenset((*NORMS, *EMBEDDINGS, *_LEAVES))
# Factors in a forward that no module owns: Granite, MiniCPM, Cohere, OLMo, Llama 4. Neutral: 1.
_FACTORS = (
    "residual_multiplier",
    "embedding_multiplier",
    "logits_scaling",
    "logit_scale",
    "scale_emb",
    "scale_depth",
)
# What a forward does if they are set at all: OLMo, Llama 4, StableLM and NeoX, Falcon, Gemma 3.
_SWITCHES = (
    "clip_qkv",
    "attn_temperature_tuning",
    "use_parallel_residual",
    "parallel_attn",
    "alibi",
    "use_bidirectional_attention",
)


def unsupported(model: nn.Module, reason: str) -> UnsupportedHostError:
    """The error for a host that only the generic path runs."""
    return UnsupportedHostError(
        f"{type(model).__name__} has no fused decode step: {reason}. The generic path runs it "
        "(gnomon.sparsify with generate())"
    )


def decoder_of(model: nn.Module, spec: HostSpec) -> nn.Module:
    """The module that owns the list of decoder layers, its embeddings and its last norm."""
    return module(model, spec.layers[0].path.rpartition(".")[0].rpartition(".")[0])


def require_expressible(model: nn.Module, spec: HostSpec) -> None:
    """Raises UnsupportedHostError where the host computes what a step does not."""
    if spec.qkv != "separate" or spec.gate_up != "separate":
        fused = "q, k and v" if spec.qkv != "separate" else "gate and up"
        raise unsupported(model, f"its {fused} are one linear")
    for path in (path for layer in spec.layers for path in layer.linears):
        linear = module(model, path)
        if type(linear) is not nn.Linear:
            raise unsupported(model, f"{path} is a {type(linear).__name__}, not a plain linear")
    unread = [
        name
        for name, _ in decoder_of(model, spec).named_parameters()
        if name.rpartition(".")[0].rpartition(".")[2] not in _READ
    ]
    if unread:
        raise unsupported(model, f"it would not read {len(unread)} parameters such as {unread[0]}")
    config = model.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]
    for field in _FACTORS:
        value = getattr(config, field, None)
        if value is not None and value is not False and value != 1:
            raise unsupported(model, f"{field}={value!r} in its config is not part of a step")
    for field in _SWITCHES:
        value = getattr(config, field, None)
        if value:
            raise unsupported(model, f"{field}={value!r} in its config is not part of a step")
