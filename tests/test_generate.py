"""Position semantics around generate(): prompts, caches, padding, beams, multi-turn, chunks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import gnomon
from cases import BACKENDS, POLICIES, predictor
from gnomon.budget import Budget
from gnomon.policies import Dense, Shadow
from gnomon.runtime.positions import Step
from gnomon.tiny import tiny_host

HALF = Budget(density=0.5)
NAMES = ["random", "oracle", "static", "shadow", "dejavu", "shadow-prompt", "dejavu-prompt"]
GREEDY = {"do_sample": False, "pad_token_id": 256, "eos_token_id": None}


def ids_of(rows: int = 1, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


@contextmanager
def recording(model, policy, **how) -> Iterator[list[Step]]:
    steps: list[Step] = []

    def note(kind: str, layer: int, keep: Tensor, step: Step) -> None:
        if not steps or steps[-1] is not step:
            steps.append(step)

    with gnomon.sparsify(model, policy, **how) as session:
        session.on_decision = note
        yield steps


def logits_of(out) -> Tensor:
    return torch.stack(out.logits, dim=1)


RUNS = [
    (name, family, backend)
    for name in NAMES
    for backend in (BACKENDS[:1] if name == "oracle" else BACKENDS)
    for family in ["llama", "gemma3_text", "opt"][: 1 if backend == "triton" else None]
]


@pytest.mark.parametrize(("name", "family", "backend"), RUNS)
def test_generate_equals_one_teacher_forced_pass(name: str, family: str, backend: str) -> None:
    """Prefill + decode steps decide exactly as a single masked forward with the same boundary."""
    model, _ = tiny_host(family)
    ids = ids_of()
    new = 8 if backend != "triton" else 3
    with gnomon.sparsify(model, POLICIES[name](model, HALF), backend):
        out = model.generate(
            ids, max_new_tokens=new, output_logits=True, return_dict_in_generate=True, **GREEDY
        )
    whole = out.sequences[:, :-1]
    with (
        torch.no_grad(),
        gnomon.sparsify(model, POLICIES[name](model, HALF), "mask", prompt_length=ids.shape[1]),
    ):
        forced = model(whole).logits[:, ids.shape[1] - 1 :]
    torch.testing.assert_close(logits_of(out), forced, rtol=1e-4, atol=1e-4)
    dense = model(whole).logits[:, ids.shape[1] - 1 :]
    assert not torch.allclose(forced[:, 0], dense[:, 0], atol=1e-3), "the first answer is sparse"


def test_the_prompt_is_dense_but_for_its_last_token() -> None:
    model, _ = tiny_host("llama")
    with recording(model, POLICIES["shadow"](model, HALF)) as steps:
        model.generate(ids_of(), max_new_tokens=4, **GREEDY)
    assert steps[0].sparse.tolist() == [[False] * 8 + [True]]
    assert [s.sparse.tolist() for s in steps[1:]] == [[[True]]] * 3
    assert [int(s.positions[0, -1]) for s in steps] == [8, 9, 10, 11]


@pytest.mark.parametrize("name", NAMES)
def test_left_padding_changes_nothing(name: str) -> None:
    model, _ = tiny_host("llama")
    short, long = ids_of(length=5, seed=1), ids_of(length=9, seed=2)
    batch = torch.full((2, 9), 256)
    batch[0, 4:], batch[1] = short[0], long[0]
    mask = (batch != 256).long()
    with gnomon.sparsify(model, POLICIES[name](model, HALF)) as session:
        both = model.generate(batch, attention_mask=mask, max_new_tokens=6, **GREEDY)
    kept = session.density().neurons
    for row, alone in enumerate((short, long)):
        with gnomon.sparsify(model, POLICIES[name](model, HALF)):
            single = model.generate(alone, max_new_tokens=6, **GREEDY)
        assert both[row, 9:].tolist() == single[0, alone.shape[1] :].tolist()
    assert kept == pytest.approx(0.5, abs=0.18)  # layer 0 of shadow is dense and counts


@pytest.mark.parametrize("name", ["random", "shadow", "shadow-prompt"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
def test_static_cache_agrees_with_dynamic(name: str, padded: bool, family: str) -> None:
    model, _ = tiny_host(family)
    batch, mask = ids_of(rows=2), torch.ones(2, 9, dtype=torch.long)
    if padded:
        batch[0, :4], mask[0, :4] = 256, 0
    outs = []
    for cache in (None, "static"):
        with gnomon.sparsify(model, POLICIES[name](model, HALF)):
            outs.append(
                model.generate(
                    batch,
                    attention_mask=mask,
                    max_new_tokens=6,
                    cache_implementation=cache,
                    output_logits=True,
                    return_dict_in_generate=True,
                    **GREEDY,
                )
            )
    torch.testing.assert_close(logits_of(outs[0]), logits_of(outs[1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["shadow", "shadow-prompt", "static"])
def test_beam_search_and_sampling_run_sparse(name: str) -> None:
    model, _ = tiny_host("llama")
    ids = ids_of(rows=2)
    with gnomon.sparsify(model, POLICIES[name](model, HALF)) as session:
        beams = model.generate(ids, max_new_tokens=5, num_beams=3, **GREEDY)
    dense = model.generate(ids, max_new_tokens=5, num_beams=3, **GREEDY)
    assert beams.shape == dense.shape and not torch.equal(beams, dense)
    assert session.density().neurons < 0.7
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        with gnomon.sparsify(model, POLICIES[name](model, HALF)):
            drawn.append(
                model.generate(ids, max_new_tokens=5, **(GREEDY | {"do_sample": True}), top_k=20)
            )
    assert torch.equal(*drawn)


@pytest.mark.parametrize("name", ["random", "shadow", "dejavu", "shadow-prompt"])
def test_beams_keep_their_own_decisions(name: str) -> None:
    """The score of every returned beam is that of its text, run at once with the same boundary."""
    model, _ = tiny_host("llama")
    ids = ids_of(rows=2)
    with gnomon.sparsify(model, POLICIES[name](model, HALF)):
        out = model.generate(
            ids,
            max_new_tokens=6,
            num_beams=4,
            num_return_sequences=4,
            output_scores=True,
            return_dict_in_generate=True,
            **GREEDY,
        )
    with (
        torch.no_grad(),
        gnomon.sparsify(model, POLICIES[name](model, HALF), prompt_length=ids.shape[1]),
    ):
        logits = model(out.sequences[:, :-1]).logits[:, ids.shape[1] - 1 :]
    chosen = out.sequences[:, ids.shape[1] :, None]
    text = logits.log_softmax(-1).gather(-1, chosen).sum((1, 2)) / chosen.shape[1]
    torch.testing.assert_close(out.sequences_scores, text, rtol=1e-4, atol=1e-4)


def test_one_beam_is_greedy() -> None:
    """Beams share their prompt's decision: with identical beams nothing differs from greedy."""
    model, _ = tiny_host("llama")
    policy = POLICIES["shadow-prompt"]
    with gnomon.sparsify(model, policy(model, HALF)):
        greedy = model.generate(ids_of(rows=2), max_new_tokens=1, **GREEDY)
    with gnomon.sparsify(model, policy(model, HALF)):
        beams = model.generate(ids_of(rows=2), max_new_tokens=1, num_beams=4, **GREEDY)
    assert torch.equal(greedy, beams)


@pytest.mark.parametrize("name", ["shadow", "shadow-prompt"])
def test_multi_turn_is_sparse_everywhere_and_keeps_its_decision(name: str) -> None:
    model, _ = tiny_host("llama")
    ids = ids_of()
    with recording(model, POLICIES[name](model, HALF)) as steps:
        first = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True, **GREEDY)
        turn = torch.cat([first.sequences, ids_of(length=4, seed=7)], dim=1)
        second = model.generate(
            turn,
            past_key_values=first.past_key_values,
            max_new_tokens=2,
            output_logits=True,
            return_dict_in_generate=True,
            **GREEDY,
        )
    turn_step = steps[3]
    assert turn_step.sparse.shape[1] == 5 and bool(turn_step.sparse.all())
    with (
        torch.no_grad(),
        gnomon.sparsify(model, POLICIES[name](model, HALF), prompt_length=ids.shape[1]),
    ):
        forced = model(second.sequences[:, :-1]).logits[:, turn.shape[1] - 1 :]
    torch.testing.assert_close(logits_of(second), forced, rtol=1e-4, atol=1e-4)


def test_a_fresh_cache_is_a_fresh_prompt() -> None:
    model, _ = tiny_host("llama")
    policy = POLICIES["shadow-prompt"](model, HALF)
    with gnomon.sparsify(model, policy):
        model.generate(ids_of(seed=1), max_new_tokens=3, **GREEDY)
        second = model.generate(ids_of(seed=2), max_new_tokens=3, **GREEDY)
    with gnomon.sparsify(model, POLICIES["shadow-prompt"](model, HALF)):
        alone = model.generate(ids_of(seed=2), max_new_tokens=3, **GREEDY)
    assert torch.equal(second, alone)


def test_chunked_prefill_follows() -> None:
    """After the first chunk the cache is not empty: later chunks are sparse at every position."""
    model, _ = tiny_host("llama")
    ids = ids_of(length=8)
    with recording(model, POLICIES["shadow"](model, HALF)) as steps, torch.no_grad():
        out = model(ids[:, :4], use_cache=True)
        model(ids[:, 4:], past_key_values=out.past_key_values)
    assert steps[0].sparse.tolist() == [[False, False, False, True]]
    assert steps[1].sparse.tolist() == [[True] * 4]


def test_finished_and_padded_rows_do_not_vote_when_shared() -> None:
    model, _ = tiny_host("llama")
    alone = ids_of(seed=4)
    batch = torch.cat([alone, ids_of(seed=5)])
    votes: dict[int, list[Tensor]] = {}
    for rows, ids in ((1, alone), (2, batch)):
        votes[rows] = []
        with (
            gnomon.sparsify(model, POLICIES["shadow-shared"](model, HALF)) as session,
            torch.no_grad(),
        ):
            cache = model(ids, use_cache=True).past_key_values

            def note(kind, layer, keep, step, rows=rows) -> None:
                if kind == "neurons" and layer == 1:
                    votes[rows].append(keep[0, 0].clone())

            session.on_decision = note
            stop = torch.tensor([[65], [257]])[:rows]  # the second row ends
            model(stop, past_key_values=cache)
            model(torch.tensor([[66], [256]])[:rows], past_key_values=cache)
    assert torch.equal(torch.stack(votes[1]), torch.stack(votes[2]))


def test_plain_forwards_need_a_boundary() -> None:
    model, _ = tiny_host("llama")
    policy = POLICIES["shadow"](model, HALF)
    with pytest.raises(ValueError, match="no prompt boundary"), gnomon.sparsify(model, policy):
        model(ids_of())
    with gnomon.sparsify(model, policy), torch.no_grad():
        model(ids_of(length=1))  # a single token is its own boundary
    with (
        pytest.raises(ValueError, match="exceeds the rows' lengths"),
        gnomon.sparsify(model, policy, prompt_length=20),
    ):
        model(ids_of())
    with (
        pytest.raises(ValueError, match="at least one token"),
        gnomon.sparsify(model, policy, prompt_length=0),
    ):
        model(ids_of())


def test_prompt_lengths_per_row_and_right_padding() -> None:
    model, _ = tiny_host("llama")
    ids, mask = ids_of(rows=2), torch.ones(2, 9, dtype=torch.long)
    ids[1, 6:], mask[1, 6:] = 256, 0
    lengths = torch.tensor([4, 3])
    with recording(model, POLICIES["shadow-prompt"](model, HALF), prompt_length=lengths) as steps:
        model(ids, attention_mask=mask)
    assert steps[0].sparse[0].tolist() == [False] * 3 + [True] * 6
    assert steps[0].sparse[1].tolist() == [False] * 2 + [True] * 4 + [False] * 3
    assert steps[0].decide_at is not None and steps[0].decide_at.tolist() == [2, 1]


def test_prompt_refresh_needs_two_prompt_tokens_and_its_own_cache() -> None:
    model, _ = tiny_host("llama")
    with (
        pytest.raises(ValueError, match="at least 2 tokens"),
        gnomon.sparsify(model, POLICIES["shadow-prompt"](model, HALF)),
    ):
        model.generate(ids_of(length=1), max_new_tokens=2, **GREEDY)
    cache = model(ids_of(), use_cache=True).past_key_values
    with (
        pytest.raises(ValueError, match="start the sequence inside"),
        gnomon.sparsify(model, POLICIES["shadow-prompt"](model, HALF)),
    ):
        model(ids_of(length=2), past_key_values=cache)


def test_public_generate() -> None:
    model, tokenizer = tiny_host("llama")
    policy = Shadow(predictor(model), HALF)
    one = gnomon.generate(model, tokenizer, "hello there", policy=policy, max_new_tokens=5)
    assert isinstance(one, str)
    both = gnomon.generate(model, tokenizer, ["hi", "hello there"], policy=policy, max_new_tokens=5)
    assert both[1] == one
    dense = gnomon.generate(model, tokenizer, "hello there", policy=Dense(), max_new_tokens=5)
    assert dense != one
    with pytest.raises(ValueError, match="prompt is empty"):
        gnomon.generate(model, tokenizer, "", policy=policy)
