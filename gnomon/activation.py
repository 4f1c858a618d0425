"""The activation function of a host's FFN, by the name in its spec."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gnomon.host import HostSpec, UnsupportedHostError


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
