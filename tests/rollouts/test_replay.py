"""The replay buffer: bounded, first in first out, without replacement, and exact when it is saved."""

from __future__ import annotations

import io
import tracemalloc
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny

from stillhouse.core.types import Response
from stillhouse.errors import DataError
from stillhouse.rollouts.adaptive import without_first_token
from stillhouse.rollouts.hidden_cache import TeacherHiddenCache
from stillhouse.rollouts.replay import ReplayBuffer

PROMPTS = {prompt.id: prompt for prompt in tiny.prompts(30)}


def written(count: int, version: int = 0) -> list[Response]:
    return [
        replace(response, source="student", student_version=version + index)
        for index, response in enumerate(tiny.responses(count))
    ]


def saved(state: object) -> dict:  # type: ignore[type-arg]
    """Through the file, as a checkpoint has it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.lists(st.integers(1, 9), max_size=6))
def test_it_holds_the_newest_and_never_more_than_its_capacity(capacity: int, rounds: list[int]) -> None:
    buffer, everything = ReplayBuffer(capacity), []
    for version, count in enumerate(rounds):
        fresh = written(count, version * 100)
        buffer.add(fresh)
        everything += fresh
        assert len(buffer) == min(capacity, len(everything))
    held = buffer.sample(len(buffer), seed=1)
    assert sorted(r.student_version or 0 for r in held) == [
        r.student_version for r in everything[len(everything) - len(held) :]
    ]


def test_a_draw_has_no_entry_twice_and_every_entry_as_often() -> None:
    buffer = ReplayBuffer(10)
    buffer.add(written(10))
    counts: Counter[int | None] = Counter()
    for seed in range(2000):
        drawn = [response.student_version for response in buffer.sample(4, seed)]
        assert len(set(drawn)) == 4
        counts.update(drawn)
    expected = 2000 * 4 / 10
    assert (
        sum((counts[v] - expected) ** 2 / expected for v in range(10)) < 27.9
    )  # chi-square, 9 df, p = 0.001
    assert buffer.total_uses() == 8000
    with pytest.raises(ValueError, match="larger than population"):
        buffer.sample(11, seed=0)


def test_saved_and_loaded_it_is_the_same_and_goes_on_the_same() -> None:
    cache = TeacherHiddenCache()
    buffer = ReplayBuffer(6, cache)
    entries = [
        replace(r, logprobs=tuple(-0.1 * (i + 1) for i in range(len(r.token_ids)))) for r in written(8, 3)
    ]
    buffer.add([without_first_token(entries[0]), *entries[1:]])
    buffer.sample(3, seed=4)
    for index, response in enumerate(buffer.sample(6, seed=0)[:4]):
        cache.put(cache.slot(response), torch.full((len(response.token_ids), 5), float(index)))
    other_cache = TeacherHiddenCache()
    other = ReplayBuffer(6, other_cache)
    other.add(written(2, 90))
    other.load_state_dict(saved(buffer.state_dict()), PROMPTS)
    assert other.sample(6, seed=9) == buffer.sample(6, seed=9)
    for response in buffer.sample(6, seed=2):
        kept, same = cache.get(cache.slot(response)), other_cache.get(other_cache.slot(response))
        assert (kept is None) == (same is None)
        assert kept is None or torch.equal(kept, same)
    buffer.add(written(3, 50))
    other.add(written(3, 50))
    assert other.sample(6, seed=3) == buffer.sample(6, seed=3)
    assert (other.total_uses(), other.total_age(60)) == (buffer.total_uses() - 3, buffer.total_age(60))


def test_prompts_that_are_gone_or_changed_are_named() -> None:
    buffer = ReplayBuffer(4)
    buffer.add(written(2))
    state = buffer.state_dict()
    with pytest.raises(DataError, match="train:0, which the training data lacks"):
        ReplayBuffer(4).load_state_dict(state, {})
    changed = {name: replace(prompt, token_ids=(3, *prompt.token_ids)) for name, prompt in PROMPTS.items()}
    with pytest.raises(DataError, match="has with other tokens"):
        ReplayBuffer(4).load_state_dict(state, changed)


def test_what_leaves_the_buffer_is_forgotten_unless_it_is_there_twice() -> None:
    cache = TeacherHiddenCache()
    buffer = ReplayBuffer(3, cache)
    first, second, third, fourth = written(4)
    buffer.add([first, first, second])
    cache.put(cache.slot(first), torch.ones(len(first.token_ids), 2))
    buffer.add([third])
    assert cache.get(cache.slot(first)) is not None
    buffer.add([fourth])
    assert cache.slot(first) == -1
    assert cache.slot(second) >= 0


def test_without_its_first_token_a_response_predicts_the_rest() -> None:
    response = next(r for r in written(9) if len(r.token_ids) > 2)
    moved = without_first_token(response)
    assert moved.prompt.token_ids + moved.token_ids == response.prompt.token_ids + response.token_ids
    assert moved.token_ids == response.token_ids[1:]
    assert without_first_token(replace(response, token_ids=(1,))).token_ids == (1,)


def test_an_entry_takes_four_bytes_a_token_and_eight_a_logprob() -> None:
    """Beside a fixed part; as Python's own numbers they took 36 and 32."""

    def held(tokens: int, known: bool) -> float:
        numbers = range(1000, 1000 + tokens)
        buffer, count, one = ReplayBuffer(10_000), 200, written(1)[0]
        tracemalloc.start()
        for _ in range(count):
            logprobs = tuple(-number / 7 for number in numbers) if known else None
            token_ids = tuple(number + 1 - 1 for number in numbers)
            buffer.add([replace(one, token_ids=token_ids, logprobs=logprobs)])
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert buffer.sample(1, seed=0)[0].token_ids == tuple(numbers)
        return size / count

    fixed = held(0, False)
    assert fixed < 500
    assert held(1000, False) - fixed < 4.5 * 1000
    assert held(1000, True) - fixed < 13 * 1000
