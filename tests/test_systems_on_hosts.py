"""Prior systems on hosts whose linears are fused, turned or parallel: served alike, or refused."""

from __future__ import annotations

import pytest
import torch

import gnomon
from cases import GATED_ONLY, POLICIES
from gnomon.budget import Budget
from gnomon.host import describe
from gnomon.runtime.backends import choose_backend
from gnomon.tiny import tiny_host
from hosts import PLAIN_FFN, decoded
from tolerances import TOLERANCE, relative_rms

FUSED = ("phi3", "glm4", "gpt_neox", "gpt2", "falcon", "bloom", "olmo2", "cohere")
SYSTEMS = (
    "griffin-prompt",
    "griffin-magnitude",
    "glass-prompt",
    "prior-prompt",
    "cats",
    "chess",
    "chess-ffn",
    "teal",
    "skip-attention",
    "skip-ffn",
    "core-of-shadow",
    "ffsplit-of-shadow",
    "skip-layers-of-griffin-prompt",
)
REFUSED = {
    **{(name, f): "has no gate" for name in GATED_ONLY for f in PLAIN_FFN},
    ("chess", "phi3"): "one linear makes q, k and v",
    ("ffsplit-of-shadow", "phi3"): "one linear for gate and up",
    ("ffsplit-of-shadow", "glm4"): "one linear for gate and up",
    ("ffsplit-of-shadow", "gpt2"): "Conv1D",
}
HALF, WHOLE = Budget(density=0.5), Budget(density=1.0)


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_on_every_kind_of_host(name: str, family: str) -> None:
    model, _ = tiny_host(family)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if (name, family) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, family]):
            decoded(model, POLICIES[name](model, HALF), "mask")
        return
    dense = decoded(model, gnomon.policies.Dense(), "mask")
    assert torch.equal(decoded(model, POLICIES[name](model, WHOLE), "mask"), dense)
    policy = POLICIES[name](model, HALF)
    masked = decoded(model, policy, "mask")
    assert relative_rms(masked, dense) > 1e-3  # something is skipped
    if choose_backend("auto", model, policy) == "torch":
        gathered = decoded(model, POLICIES[name](model, HALF), "torch")
        assert relative_rms(gathered, masked) < TOLERANCE[torch.float32]
    else:
        assert family in ("gpt2", "falcon") or name == "ffsplit-of-shadow"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_bytes_of_a_host_with_a_norm_over_all_heads() -> None:
    """OLMo-2's q, k and v are read in full, whatever is kept; the rest follows densities."""
    model, _ = tiny_host("olmo2")
    spec = describe(model)
    policy = POLICIES["static"](model, HALF)
    policy.bind(model)
    roles = ("q", "k", "v", "out", "gate", "up", "down")
    everything, half = (policy.bytes.weights(dict.fromkeys(roles, x)) for x in (1.0, 0.5))
    q_kv = spec.L * (spec.H + 2 * spec.G) * spec.d * spec.D
    outside = policy.bytes.head + policy.bytes.other
    assert everything - half == pytest.approx((everything - outside - q_kv) / 2)
