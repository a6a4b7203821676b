"""The mask covers exactly the response tokens, whatever the padding, the order and the division."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.core.batch import IGNORED, TokenBatch
from stillhouse.core.types import SOURCES, Prompt, Response
from stillhouse.data.collate import collate, split, split_by_tokens

PAD = 0
tokens = st.lists(st.integers(1, 50), min_size=1, max_size=9).map(tuple)


@st.composite
def response_lists(draw: st.DrawFn) -> list[Response]:
    made = []
    for index in range(draw(st.integers(1, 6))):
        source = draw(st.sampled_from(SOURCES))
        answer = draw(tokens)
        logprobs = draw(st.none() | st.just(tuple(-0.5 * k for k in range(len(answer)))))
        version = draw(st.integers(0, 99)) if source == "student" else None
        prompt = Prompt(f"p:{index}", draw(tokens), "text")
        made.append(
            Response(
                prompt,
                answer,
                source,
                finished=draw(st.booleans()),
                student_version=version,
                logprobs=logprobs,
            )
        )
    return made


@settings(max_examples=60, deadline=None)
@given(response_lists(), st.integers(0, 30))
def test_marked_positions_predict_exactly_the_response_tokens(responses: list[Response], extra: int) -> None:
    batch = collate(responses, PAD, length=extra)
    assert batch.num_rows == int(batch.response_mask.sum())
    assert batch.num_tokens == int(batch.attention_mask.sum())
    for index, response in enumerate(responses):
        start = len(response.prompt.token_ids)
        marked = batch.response_mask[index].nonzero()[:, 0].tolist()
        assert marked == list(range(start - 1, start + len(response.token_ids) - 1))
        after = [batch.input_ids[index, position + 1].item() for position in marked]
        assert tuple(after) == response.token_ids
        assert batch.labels[index][batch.response_mask[index]].tolist() == after
        assert int(batch.attention_mask[index].sum()) == start + len(response.token_ids)
    sources = [SOURCES[code] for code in batch.rows().sources]
    assert sources == [response.source for response in responses for _ in response.token_ids]
    assert (batch.labels[~batch.response_mask] == IGNORED).all()
    assert (batch.input_ids[batch.attention_mask == 0] == PAD).all()


@settings(max_examples=40, deadline=None)
@given(response_lists(), st.integers(0, 30), st.randoms(use_true_random=False))
def test_rows_do_not_depend_on_padding_and_follow_the_order(
    responses: list[Response], extra: int, random
) -> None:  # type: ignore[no-untyped-def]
    plain, padded = collate(responses, PAD), collate(responses, PAD, length=extra)
    assert torch.equal(plain.row_labels(), padded.row_labels())
    for name in ("sources", "sequence_ids", "pair_ids"):
        assert (getattr(plain.rows(), name) == getattr(padded.rows(), name)).all()
    order = list(range(len(responses)))
    random.shuffle(order)
    shuffled = collate([responses[index] for index in order], PAD)
    for new, old in enumerate(order):
        assert torch.equal(shuffled.input_ids[new], plain.input_ids[old])
        assert torch.equal(shuffled.response_mask[new], plain.response_mask[old])
        assert shuffled.responses[new] is plain.responses[old]


@settings(max_examples=40, deadline=None)
@given(response_lists())
def test_logprobs_sit_at_the_position_that_predicts_their_token(responses: list[Response]) -> None:
    rows = collate(responses, PAD).rows().sampled_logprobs
    if all(response.logprobs is None for response in responses):
        assert rows is None
        return
    assert rows is not None
    flat = [p for r in responses for p in (r.logprobs or (math.nan,) * len(r.token_ids))]
    assert torch.equal(rows.nan_to_num(7.0), torch.tensor(flat).nan_to_num(7.0))


@settings(max_examples=60, deadline=None)
@given(response_lists(), st.integers(1, 9), st.booleans(), st.booleans())
def test_a_division_loses_and_doubles_nothing(
    responses: list[Response], num_micro: int, by_length: bool, keep: bool
) -> None:
    doubled = [*responses, *responses[: len(responses) // 2]]
    groups = (
        [doubled[start : start + 2] for start in range(0, len(doubled), 2)]
        if keep
        else [[r] for r in doubled]
    )
    parts = split(groups, num_micro, by_length=by_length)
    assert sorted((r for part in parts for r in part), key=id) == sorted(doubled, key=id)
    assert all(parts)
    assert len(parts) == min(num_micro, len(groups))
    whole = [any(part[at : at + len(g)] == g for part in parts for at in range(len(part))) for g in groups]
    assert all(whole)
    if not keep:
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1


@settings(max_examples=60, deadline=None)
@given(response_lists(), st.integers(1, 60), st.booleans(), st.integers(1, 4))
def test_a_budget_of_tokens_is_kept_with_as_few_parts_as_it_takes(
    responses: list[Response], budget: int, packed: bool, size: int
) -> None:
    groups = [responses[start : start + size] for start in range(0, len(responses), size)]
    parts = split_by_tokens(groups, budget, packed=packed)
    assert sorted((r for part in parts for r in part), key=id) == sorted(responses, key=id)
    for part in parts:
        batch = collate(part, PAD)
        tokens = batch.num_tokens if packed else batch.input_ids.numel()
        assert tokens <= budget or part in groups
    total = sum(len(r.prompt.token_ids) + len(r.token_ids) for r in responses)
    assert len(parts) >= total / budget or any(part in groups for part in parts)
    assert len(split_by_tokens(groups, 10**6, packed=packed)) == 1
    for wanted in (1, 3, 9):  # what all ranks agree on, whatever is needed here
        agreed = split_by_tokens(groups, budget, packed=packed, agree=lambda needed, own, n=wanted: n)
        assert len(agreed) == min(wanted, len(groups))
        assert all(agreed)
        assert sorted((r for part in agreed for r in part), key=id) == sorted(responses, key=id)


def test_what_cannot_be_predicted_is_refused() -> None:
    prompt = Prompt("p:1", (5,), "x")
    with pytest.raises(ValueError, match="at least one response"):
        collate([], PAD)
    with pytest.raises(ValueError, match="p:1: its teacher response has no tokens"):
        collate([Response(prompt, (), "teacher")], PAD)
    with pytest.raises(ValueError, match="has no tokens"):
        collate([Response(Prompt("p:2", (), ""), (3,), "fixed")], PAD)
    with pytest.raises(ValueError, match="1 log-probabilities for 2 tokens"):
        collate([Response(prompt, (3, 4), "student", logprobs=(-1.0,))], PAD)


def test_moving_keeps_everything_else() -> None:
    batch = collate([Response(Prompt("p:1", (5,), "x"), (3, 4), "student", student_version=2)], PAD)
    moved = batch.to("meta")
    assert moved.input_ids.device.type == "meta"
    assert moved.responses == batch.responses
    assert moved.logprobs is None


def test_sequences_are_selected_in_the_order_that_is_asked_for() -> None:
    whole = TokenBatch.of([(5, 9, 41, 0), (7, 0), (3, 4, 0)], [2, 1, 1], pad_id=0)
    turned = whole.select([2, 0, 1])
    assert turned.token_ids == ((3, 4, 0), (5, 9, 41, 0), (7, 0))
    assert turned.prompt_lengths == (1, 2, 1)
    assert whole.select([0, 1, 2]) is whole
