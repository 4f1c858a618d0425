"""What the decode engine can run: hosts, policies, backends, sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gnomon.engine.ops import Ops, ops
from gnomon.engine.passing import Passing, thresholds_of
from gnomon.engine.split import READ, readable
from gnomon.host import HostSpec, UnsupportedHostError, weight
from gnomon.kernels.launch import interpreted
from gnomon.kernels.select import triton
from gnomon.policies.base import Policy
from gnomon.policies.ffsplit import FFSplit

SMALLEST = 512  # tokens of the smallest context bucket


class UnsupportedPolicyError(ValueError):
    """The decode engine cannot run the policy; the generic path can."""


def bucket(tokens: int, context: int) -> int:
    """Places of the buffers for so many tokens: 512, 1024, 2048, …, ``context`` at most."""
    size = SMALLEST
    while size < tokens:
        size *= 2
    return min(size, context)


def choose_ops(backend: str, device: torch.device) -> Ops:
    """The operators of a backend; ``auto`` is Triton on a CUDA device, else PyTorch.

    Raises:
        ValueError: unknown, or Triton where it cannot run.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend={backend!r} has no decode engine: use auto, torch or triton")
    able = triton is not None and (device.type == "cuda" or interpreted())
    if backend == "triton" and not able:
        raise ValueError(
            f"backend='triton' needs Triton and a CUDA device, the host is on {device}: use "
            "backend=torch or auto"
        )
    fast = able and device.type == "cuda"
    return ops(("triton" if fast else "torch") if backend == "auto" else backend)


@contextmanager
def named_memory(batch: int, context: int) -> Iterator[None]:
    """Raises ValueError naming what to lower where the GPU's memory does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"out of GPU memory with batch={batch} and context={context}: lower either "
            "(speed.batch, speed.context), or load the host in a smaller dtype"
        ) from error


def one_device(model: nn.Module) -> torch.device:
    """The device that holds all of the host.

    Raises:
        UnsupportedHostError: it is spread over several, or offloaded.
    """
    devices = {p.device for p in model.parameters()}
    device = next(iter(devices))
    if len(devices) > 1 or device.type == "meta":
        raise UnsupportedHostError(
            f"{type(model).__name__} is spread over {', '.join(sorted(map(str, devices)))}: the "
            "decode engine runs hosts that one device holds"
        )
    return device


def require_fit(rows: int, batch: int, prompt: int, tokens: int | None, context: int) -> None:
    """Raises ValueError for prompts that an engine of this batch and context cannot continue."""
    if rows != batch:
        raise ValueError(
            f"{rows} prompts for an engine of batch={batch}: give as many, or open an engine of "
            "that batch (speed.batch)"
        )
    if prompt - 1 + (1 if tokens is None else tokens) > context:
        raise ValueError(
            f"a prompt of {prompt} tokens with max_new_tokens={tokens} exceeds context={context}: "
            "raise it (speed.context)"
        )


def require_plain_weights(model: nn.Module, spec: HostSpec) -> None:
    """Raises UnsupportedHostError for weights that are not floating point (quantised hosts)."""
    for path in (path for layer in spec.layers for path in layer.linears):
        found = weight(model, path)
        if not found.is_floating_point():
            raise UnsupportedHostError(
                f"{path} holds {found.dtype} weights: the decode engine reads fp32, fp16 and bf16"
            )


def require_policy(policy: Policy) -> None:
    """Raises UnsupportedPolicyError for a policy that only the generic path can run."""
    if policy.needs_units:
        raise UnsupportedPolicyError(
            f"policy={policy.name} looks at the values that it decides about: it exists under "
            "backend=mask alone and has no decode engine"
        )
    if policy.channels and thresholds_of(policy) is None:
        raise UnsupportedPolicyError(
            f"policy={policy.name} skips input channels by a rule of its own, and the decode "
            "engine compares them with thresholds alone: use gnomon.sparsify with generate()"
        )
    require_weights(policy)


def require_weights(policy: Policy) -> None:
    """Raises UnsupportedPolicyError for a change of weights that a step does not read."""
    if not readable(policy):
        raise UnsupportedPolicyError(
            f"policy={policy.name} changes the host's weights in a way that the decode engine does "
            f"not read (it reads ffsplit with rest={' or '.join(READ)}, without a policy inside or "
            "round it): use gnomon.sparsify with generate()"
        )


def require_bound(policy: Policy, int8: bool | None) -> None:
    """Raises UnsupportedPolicyError for a bound policy that the weights do not serve.

    ``int8`` says what shared weights are; None for the policy's own.
    """
    int8 = policy.weight_dtype == "int8" if int8 is None else int8
    require_weights(policy)  # a stored split says only now what it holds
    if int8 and policy.transforms and policy.weight_dtype != "int8":
        raise UnsupportedPolicyError(
            f"policy={policy.name} keeps neurons whole, which int8 weights are not: share those of "
            "a host in floating point"
        )
    require_prefill(policy, int8)
    require_channels(policy, int8)


def require_channels(policy: Policy, int8: bool) -> None:
    """Raises UnsupportedPolicyError for a bound policy's choice of linears, or int8 weights.

    A scale of int8 weights belongs to an output of q, k, v, gate and up, and a threshold's kernel
    applies those of input channels.
    """
    thresholds = thresholds_of(policy)
    if thresholds is None or not thresholds.thresholded:
        return
    own = thresholds.thresholded
    attention, ffn = own & {"q", "k", "v"}, own - {"q", "k", "v", "out"}
    whole = {"up", "down"} | ({"gate"} if policy.spec.gated else set())
    served = attention in ({"q"}, {"q", "k", "v"}, set()) and ffn in (whole, set())
    if not (served and Passing.fits(thresholds)) or (ffn and thresholds.table is not None):
        raise UnsupportedPolicyError(
            f"policy={policy.name} skips input channels of {', '.join(sorted(own))}, which the "
            "fused decode step does not do together: use gnomon.sparsify with generate()"
        )
    if int8 and own - {"out", "down"}:
        raise UnsupportedPolicyError(
            f"policy={policy.name} skips input channels, which the decode engine does not read of "
            "int8 weights: load the host in a floating-point dtype"
        )


def require_fast(policy: Policy) -> None:
    """Raises UnsupportedPolicyError for what PyTorch operators would widen anew at every step."""
    if isinstance(policy, FFSplit) and policy.rest == "int4":
        raise UnsupportedPolicyError(
            f"policy={policy.name} with rest=int4 has kernels in Triton alone, and PyTorch's "
            "operators widen all of it at every step: use rest=int8, gnomon.sparsify with "
            "generate(), or backend=torch all the same"
        )


def require_prefill(policy: Policy, int8: bool) -> None:
    """Raises UnsupportedPolicyError for a bound policy's sparse prompt on int8 weights.

    The prompt runs through the host's own forward, on compacted weights in the host's dtype.
    """
    if int8 and policy.prefill == "sparse" and not policy.skips_nothing:
        raise UnsupportedPolicyError(
            f"policy.prefill='sparse': policy={policy.name} would skip units of the prompt on the "
            "decode engine's int8 weights, which the host's own forward does not read: use "
            "policy.prefill=dense, or gnomon.sparsify with generate()"
        )


def require_sizes(batch: int, context: int) -> None:
    """Raises ValueError for a batch or context below 1."""
    for field, value in (("batch", batch), ("context", context)):
        if value < 1:
            raise ValueError(f"{field}={value}: use 1 or more (speed.{field})")
