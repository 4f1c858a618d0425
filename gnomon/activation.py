"""The activation function of a host's FFN, by the name in its spec."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gnomon.host import HostSpec, UnsupportedHostError

KERNEL_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""Hugging Face's activation names -> the kernels'."""


def kernel_name(spec: HostSpec) -> str:
    """The kernels' name of a host's activation.

    Raises:
        UnsupportedHostError: no kernel computes it.
    """
    if spec.activation not in KERNEL_NAMES:
        raise UnsupportedHostError(
            f"host {spec.name}: its activation {spec.activation!r} has no kernel; known are "
            f"{', '.join(KERNEL_NAMES)}"
        )
    return KERNEL_NAMES[spec.activation]


def activation(spec: HostSpec) -> Callable[[Tensor], Tensor]:
    """The function that the gate, or the up projection of a non-gated FFN, goes through.

    Raises:
        UnsupportedHostError: transformers knows none of that name.
    """
    from transformers.activations import ACT2FN

    if spec.activation not in ACT2FN:
        raise UnsupportedHostError(
            f"host {spec.name}: activation {spec.activation!r} is unknown to transformers"
        )
    return ACT2FN[spec.activation]
