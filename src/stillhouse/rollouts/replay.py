"""A bounded first-in-first-out buffer of student-generated responses."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from stillhouse.core.types import Prompt, Response
from stillhouse.errors import DataError
from stillhouse.rollouts.hidden_cache import TeacherHiddenCache


class Entry:
    """A response in the buffer, its tokens and log-probabilities as arrays: 4 and 8 bytes a token."""

    __slots__ = ("_logprobs", "_rest", "_tokens", "uses")

    def __init__(self, response: Response, uses: int = 0) -> None:
        """An entry that has been sampled so often."""
        self._rest = replace(response, token_ids=(), logprobs=None)
        self._tokens = np.array(response.token_ids, dtype=np.int32)
        self._logprobs = None if response.logprobs is None else np.array(response.logprobs, dtype=np.float64)
        self.uses = uses

    @property
    def response(self) -> Response:
        """The response as it was written."""
        known = None if self._logprobs is None else tuple(self._logprobs.tolist())
        return replace(self._rest, token_ids=tuple(self._tokens.tolist()), logprobs=known)

    @property
    def version(self) -> int:
        """The optimiser step whose weights wrote it."""
        return self._rest.student_version or 0


class ReplayBuffer:
    """Holds the newest `capacity` responses. Samples depend on a seed alone, not on a generator's state.

    An entry takes some 400 bytes, 4 more for each token and 8 for each log-probability beside its prompt.

    Example:
        >>> buffer = ReplayBuffer(1000)
        >>> buffer.add(responses)
        >>> buffer.sample(8, seed=derived_seed(seed, "replay", step))
    """

    def __init__(self, capacity: int, hidden_cache: TeacherHiddenCache | None = None) -> None:
        """Make an empty one.

        Args:
            capacity: most responses it holds.
            hidden_cache: where the teacher's hidden states of its responses are cached; None caches none.
        """
        self._capacity = capacity
        self._hidden_cache = hidden_cache
        self._entries: deque[Entry] = deque()

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, responses: Sequence[Response]) -> None:
        """Append responses; a full buffer evicts the oldest."""
        for response in responses:
            self._append(Entry(response))

    def sample(self, count: int, seed: int) -> list[Response]:
        """`count` different entries, uniformly, in random order.

        Raises:
            ValueError: there are fewer than `count`.
        """
        chosen = random.Random(seed).sample(range(len(self._entries)), count)
        entries = [self._entries[index] for index in chosen]
        for entry in entries:
            entry.uses += 1
        return [entry.response for entry in entries]

    def total_uses(self) -> int:
        """How often entries have been sampled so far, sum over the entries."""
        return sum(entry.uses for entry in self._entries)

    def total_age(self, step: int) -> int:
        """Optimiser steps since the entries were generated, sum over the entries."""
        return sum(step - entry.version for entry in self._entries)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain values: `torch.load(weights_only=True)` reads it."""
        cache, hidden = self._hidden_cache, None
        if cache is not None:
            hidden = [cache.get(cache.slot(entry.response)) for entry in self._entries]
        return _state(self._entries, hidden)

    def load_state_dict(self, state: Mapping[str, Any], prompts: Mapping[str, Prompt]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            DataError: the responses belong to prompts that the training data does not have.
        """
        while self._entries:
            self._evict_oldest()
        for response, uses in zip(unpack(state, prompts), state["uses"].tolist(), strict=True):
            self._append(Entry(response, uses))
        if self._hidden_cache is not None:
            for entry, hidden in zip(self._entries, state.get("teacher_hidden", ()), strict=False):
                if hidden is not None:
                    self._hidden_cache.put(self._hidden_cache.slot(entry.response), hidden)

    def _append(self, entry: Entry) -> None:
        while len(self._entries) >= self._capacity:
            self._evict_oldest()
        self._entries.append(entry)
        if self._hidden_cache is not None:
            self._hidden_cache.retain(entry.response)

    def _evict_oldest(self) -> None:
        entry = self._entries.popleft()
        if self._hidden_cache is not None:
            self._hidden_cache.release(entry.response)


def dealt_out(
    states: Sequence[Mapping[str, Any]], prompts: Mapping[str, Prompt], rank: int, size: int
) -> dict[str, Any]:
    """The state of one of `size` buffers that share the entries of any number of buffers.

    The oldest entry goes to the first buffer, the next to the second and so on: all shares have entries of
    all ages, and none is longer than another by more than one.

    Args:
        states: of all buffers that there were.
        prompts: those of the training set, by id.
        rank: which share.
        size: how many there are.

    Raises:
        DataError: the responses belong to prompts that the training data does not have.
    """
    found: list[tuple[Entry, torch.Tensor | None]] = []
    for state in states:
        responses, uses = unpack(state, prompts), state["uses"].tolist()
        hidden = state.get("teacher_hidden") or [None] * len(responses)
        entries = [Entry(response, used) for response, used in zip(responses, uses, strict=True)]
        found += zip(entries, hidden, strict=True)
    found.sort(key=lambda one: one[0].version)
    mine = found[rank::size]
    with_hidden = any("teacher_hidden" in state for state in states)
    return _state([entry for entry, _ in mine], [one for _, one in mine] if with_hidden else None)


def _state(entries: Collection[Entry], hidden: list[torch.Tensor | None] | None) -> dict[str, Any]:
    """Entries, and the teacher's hidden states of each where these are cached."""
    state = pack([entry.response for entry in entries])
    state["uses"] = torch.tensor([entry.uses for entry in entries], dtype=torch.int64)
    return state if hidden is None else {**state, "teacher_hidden": hidden}


def pack(responses: Sequence[Response]) -> dict[str, Any]:
    """Student-generated responses as a few tensors; of images the digests."""
    flat = [token for response in responses for token in response.token_ids]
    known = [response.logprobs for response in responses]
    return {
        "prompts": [response.prompt.id for response in responses],
        "prompt_lengths": torch.tensor([len(r.prompt.token_ids) for r in responses], dtype=torch.int64),
        "prompt_tokens": torch.tensor([t for r in responses for t in r.prompt.token_ids], dtype=torch.int32),
        "images": [r.prompt.image_digests for r in responses],
        "lengths": torch.tensor([len(r.token_ids) for r in responses], dtype=torch.int64),
        "tokens": torch.tensor(flat, dtype=torch.int32),
        "finished": torch.tensor([r.finished for r in responses], dtype=torch.bool),
        "versions": torch.tensor([r.student_version or 0 for r in responses], dtype=torch.int64),
        "logprobs": [None if one is None else torch.tensor(one, dtype=torch.float64) for one in known],
        "rewards": [response.reward for response in responses],
    }


def unpack(state: Mapping[str, Any], prompts: Mapping[str, Prompt]) -> list[Response]:
    """The responses that `pack` was given.

    Raises:
        DataError: a prompt no longer exists or has changed.
    """
    prompt_tokens = state["prompt_tokens"].split(state["prompt_lengths"].tolist())
    response_tokens = state["tokens"].split(state["lengths"].tolist())
    facts = zip(
        state["prompts"], prompt_tokens, state["images"], response_tokens, state["finished"].tolist(),
        state["versions"].tolist(), state["logprobs"], state["rewards"], strict=True,
    )  # fmt: skip
    responses = []
    for name, question, images, tokens, finished, version, logprobs, reward in facts:
        prompt, ids = prompts.get(name), tuple(question.tolist())
        if (changed := _changed(prompt, ids, images)) is not None:
            raise DataError(
                f"the checkpoint holds responses to prompt {name}, which the training data {changed}. Resume "
                "with the data, the template and the tokenizer of the run that was interrupted."
            )
        assert prompt is not None
        if prompt.token_ids != ids:  # see `without_first_token`
            prompt = replace(prompt, token_ids=ids)
        known = None if logprobs is None else tuple(logprobs.tolist())
        written = tuple(tokens.tolist())
        responses.append(Response(prompt, written, "student", finished, version, known, reward=reward))
    return responses


def _changed(prompt: Prompt | None, ids: tuple[int, ...], images: Sequence[str]) -> str | None:
    """How a prompt is no longer the one that was responded to; None if it is."""
    if prompt is None:
        return "lacks"
    if prompt.token_ids != ids[: len(prompt.token_ids)]:
        return "has with other tokens"
    return None if prompt.image_digests == tuple(images) else "has with other images"
