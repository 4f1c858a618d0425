"""The model card written into every predictor folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gnomon.host import KINDS

if TYPE_CHECKING:
    from gnomon.predictors.base import Predictor

_CARD = """---
library_name: gnomon
tags:
- gnomon
- contextual-sparsity
- {name}
---
# {name} predictor for {host}

Scores {subject} of `{host}` ({L} layers, {H} heads, {F} neurons) from
{taps}, so that Gnomon runs the host without the units that score low. {contents}

```python
import gnomon

model, tokenizer = gnomon.load_host("{host}")
predictor = gnomon.load_predictor("<this folder>")
policy = gnomon.policies.{cls}(predictor, gnomon.Budget(density=0.5{spread}){choose})
with gnomon.sparsify(model, policy):
    model.generate(**tokenizer("The shadow of", return_tensors="pt"), max_new_tokens=32)
```

| trained on | |
|---|---|
| host | {host}, revision {revision}, spec {spec_hash} |
| text | {text} ({text_digest}){text_split} |
| criterion, granularity, objective | {criterion}, {granularity}, {objective} |
| traces | {trace_hash} |
| seed | {seed} |
| size | {nbytes:,} bytes ({stored}) |

## Held-out metrics
{metrics}
"""


def model_card(predictor: Predictor) -> str:
    """README.md of a predictor folder."""
    info = predictor.info
    return _CARD.format(
        name=predictor.name,
        cls=type(predictor).__name__,
        host=info.host or "an unnamed host",
        L=predictor.L,
        H=predictor.H,
        F=predictor.F,
        subject=predictor.subject,
        taps=predictor.reads or _taps(predictor),
        revision=info.revision or "unknown",
        spec_hash=info.spec_hash or "unknown",
        text=info.text or "unknown text",
        text_digest=info.text_digest[:16] or "no digest",
        text_split=_split(info.text_split),
        criterion=info.criterion or "?",
        granularity=info.granularity or "?",
        objective=info.objective or "?",
        trace_hash=info.trace_hash or "none: trained online",
        seed=info.seed,
        nbytes=predictor.nbytes,
        contents=predictor.contents,
        stored=_stored(predictor),
        spread=', spread="learned"' if predictor.has_tilt else "",
        choose=', choose="threshold"' if _choice(predictor) == "threshold" else "",
        metrics=_metrics(predictor),
    )


def _split(facts: Mapping[str, Any]) -> str:
    known = [f"text.{key}={facts[key]}" for key in ("heldout", "seed") if key in facts]
    return f", {', '.join(known)}" if known else ""


def _choice(predictor: Predictor) -> str:
    student = predictor.info.metrics.get("student", {})
    return str(student.get("choose", "topk"))


def _stored(predictor: Predictor) -> str:
    return predictor.stored + ("" if predictor.stored == "fp32" else ", scaled by row")


def _taps(predictor: Predictor) -> str:
    first = predictor.taps[0]
    if len(predictor.taps) == 1:
        return f"the {first.site} of layer {first.layer}"
    return f"{len(predictor.taps)} hidden states, the first the {first.site} of layer {first.layer}"


def _metrics(predictor: Predictor) -> str:
    metrics = predictor.info.metrics
    if not metrics:
        return "Not measured."
    rows = ["| units | density | | recall | mass | spearman |", "|---|---|---|---|---|---|"]
    for kind in KINDS:
        density = metrics["density"][kind]
        for label, values in (("predictor", metrics[kind]), ("static", metrics[kind]["static"])):
            numbers = " | ".join(f"{values[m]:.3f}" for m in ("recall", "mass", "spearman"))
            rows.append(f"| {kind} | {density:g} | {label} | {numbers} |")
    if "student" in metrics:
        found = metrics["student"]
        placed = ", thresholds that the held-out batch itself places"
        by = placed if _choice(predictor) == "threshold" else ""
        rows.append(
            f"\nThe sparse host at these densities (refresh {found['refresh']}, protocol "
            f"{found['protocol']}, spread {found['spread']}{by}): KL to the dense host "
            f"{found['kl']:.4f}, perplexity ratio {found['ppl_ratio']:.3f}, over "
            f"{found['positions']} held-out positions."
        )
    return "\n".join(rows)
