"""What launchers share: the scratch of split sums, and when a Triton kernel can run."""

from __future__ import annotations

import os

import torch
from torch import Tensor

TICKETS = 1 << 16
_tickets: dict[torch.device, Tensor] = {}


def tickets(device: torch.device) -> Tensor:
    """Zeroed counters (65536,) int32 of a device; every kernel leaves them zeroed.

    Launches that run one after another share them: use one stream per device at a time.
    """
    if device not in _tickets:
        _tickets[device] = torch.zeros(TICKETS, dtype=torch.int32, device=device)
    return _tickets[device]


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 4 in the interpreter, so that splits are exercised."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def interpreted() -> bool:
    """Whether Triton kernels run in the interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def debugging() -> bool:
    """Whether indices are checked against what they index: ``GNOMON_DEBUG=1``."""
    return os.environ.get("GNOMON_DEBUG") == "1"


def power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(0, n - 1).bit_length()


def pdl(device: torch.device) -> dict[str, bool]:
    """Launch options of programmatic dependent launch, where the device has it (compute >= 9.0).

    The next kernel of a stream is then set up while this one drains, and waits inside.
    """
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": able} | ({"launch_pdl": True} if able else {})
