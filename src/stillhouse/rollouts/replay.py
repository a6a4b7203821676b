"""A bounded first-in-first-out buffer of student-generated responses."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from stillhouse.core.types import Prompt, Response
from stillhouse.errors import DataError
from stillhouse.rollouts.hidden_cache import TeacherHiddenCache


@dataclass
class Entry:
    """A response in the buffer."""

    response: Response
    uses: int = 0
    """How often it has been sampled."""


class ReplayBuffer:
    """Holds the newest `capacity` responses. Samples depend on a seed alone, not on a generator's state.

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

    def uses(self) -> float:
        """How often an entry has been sampled so far, mean over the entries."""
        return sum(entry.uses for entry in self._entries) / max(1, len(self._entries))

    def age(self, step: int) -> float:
        """Optimiser steps since the entries were generated, mean over the entries."""
        ages = [step - (entry.response.student_version or 0) for entry in self._entries]
        return sum(ages) / max(1, len(ages))

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain values: `torch.load(weights_only=True)` reads it."""
        state = {**pack([entry.response for entry in self._entries])}
        state["uses"] = torch.tensor([entry.uses for entry in self._entries], dtype=torch.int64)
        if self._hidden_cache is not None:
            cache = self._hidden_cache
            state["teacher_hidden"] = [cache.get(cache.slot(entry.response)) for entry in self._entries]
        return state

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
