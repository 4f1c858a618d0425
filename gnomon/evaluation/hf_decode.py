"""Hugging Face's own dense decode, beside the engine's dense twin: ``generate()`` as users run it.

``compiled`` is the static cache with ``torch.compile``, ``eager`` the dynamic cache without. Timed
on the host in its own layout, so outside of any engine. What is timed is a whole step of
``generate()``: the host's forward, the choice of the token and the loop round it.
"""

from __future__ import annotations

import gc
import time
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import CompileConfig, StoppingCriteria, StoppingCriteriaList
from transformers.modeling_utils import PreTrainedModel

from gnomon.evaluation.generation import greedy_config
from gnomon.evaluation.stopwatch import Times

HF = Literal["auto", "compiled", "eager", "off"]


def hf_mode(asked: str, device: torch.device) -> str:
    """``auto`` is ``compiled`` on CUDA, where that is fastest, and ``eager`` elsewhere.

    Raises:
        ValueError: an unknown mode.
    """
    if asked not in get_args(HF):
        raise ValueError(f"speed.hf={asked!r} is unknown; use one of {', '.join(get_args(HF))}")
    if asked != "auto":
        return asked
    return "compiled" if device.type == "cuda" else "eager"


@torch.no_grad()
def hf_decode(model: PreTrainedModel, ids: Tensor, steps: int, warmup: int, mode: str) -> Times:
    """Times the steps of a greedy ``generate()``.

    Args:
        model: the host, in its own layout.
        ids: (B, P) prompt without padding.
        steps: timed steps.
        warmup: steps before them; under ``compiled`` a whole call is made before, too.
        mode: ``compiled`` or ``eager``.
    """
    compiled = mode == "compiled"
    config = greedy_config(model, warmup + steps + 1, exactly=True)
    config.output_logits = config.return_dict_in_generate = False
    config.disable_compile = not compiled
    if compiled:
        config.cache_implementation = "static"
        config.compile_config = CompileConfig(mode="reduce-overhead", fullgraph=False)
        config.compile_config._compile_all_devices = True
    marks = _Marks()
    write: Any = model.generate
    try:
        for _ in range(2 if compiled else 1):
            marks.times.clear()
            write(
                ids.to(model.device),
                attention_mask=torch.ones_like(ids, device=model.device),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([marks]),
            )
        return marks.steps(warmup)
    finally:
        if compiled:
            vars(model).pop("_compiled_call", None)
            torch._dynamo.reset()
        gc.collect()


class _Marks(StoppingCriteria):
    """Ends nothing; notes when each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        # The loop waits for its stopping criteria at every token in any case.
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def steps(self, warmup: int) -> Times:
        """Between tokens; the first one ends the prompt."""
        found = zip(self.times[warmup:-1], self.times[warmup + 1 :], strict=True)
        return Times(tuple(1000 * (b - a) for a, b in found))
