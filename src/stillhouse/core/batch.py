"""One micro-batch as tensors, with the mask of exactly the positions that predict a response token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from stillhouse.core.host import Ints, carried
from stillhouse.core.images import ImageRef
from stillhouse.core.rows import Rows
from stillhouse.core.types import SOURCES, Response

IGNORED = -100
"""The label of positions that predict nothing we train on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """What a model reads: B sequences padded on the right to T tokens; N response tokens in all.

    A prompt of L tokens and a response of R tokens (end of sequence included where it was generated) give R
    marked positions, L-1 to L+R-2: the hidden state at each of them predicts the response token that follows.
    Tokens of a response that are not trained on, such as what a tool said, are marked at no position.
    N is the number of marked positions; "rows" below are those N positions, sequence after sequence.

    Example:
        >>> batch = TokenBatch.of([(5, 9, 41, 0)], prompt_lengths=[2], pad_id=0)
        >>> hidden.flatten(0, 1)[batch.row_positions].shape  # [N, D]
    """

    input_ids: Tensor
    """[B, T] int64: prompt, response, padding."""
    attention_mask: Tensor
    """[B, T] int64: 1 on prompt and response, 0 on padding."""
    response_mask: Tensor
    """[B, T] bool: True where the next token is a response token."""
    row_positions: Tensor
    """[N] int64: where in the flattened [B T] the rows stand, the true entries of `response_mask`. Made with
    the batch, because finding them on a GPU would make the program wait for it."""
    labels: Tensor
    """[B, T] int64: the next token where `response_mask` is True, else -100. Already shifted."""
    token_positions: Tensor
    """[S] int64: where in the flattened [B T] the S tokens stand that are no padding."""
    boundaries: Tensor
    """[B+1] int32: 0 and the running sum of the lengths: where each sequence begins among the S tokens."""
    token_ids: tuple[tuple[int, ...], ...]
    """Host. [B] the sequences without padding."""
    prompt_lengths: tuple[int, ...]
    """Host. [B] how many tokens of each are its prompt."""
    trained: tuple[tuple[int, ...] | None, ...]
    """Host. [B] 1 for each token of the response that is trained on and so has a row; None: all are."""
    images: tuple[tuple[ImageRef, ...], ...] = ()
    """Host. [B] the images of each sequence, in the order of their tokens; empty if none has any."""

    @classmethod
    def of(
        cls,
        token_ids: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int],
        pad_id: int,
        length: int | None = None,
        trained: Sequence[tuple[int, ...] | None] | None = None,
        images: Sequence[tuple[ImageRef, ...]] = (),
    ) -> TokenBatch:
        """Sequences side by side.

        Args:
            token_ids: prompt and response of each.
            prompt_lengths: at least 1 each; a sequence that is all prompt has no rows.
            pad_id: what fills the right side; never attended to and never a label.
            length: pad to at least this many tokens; by default to the longest sequence.
            trained: for each sequence 1 or 0 for each token of its response, or None: all have rows.
            images: of each sequence; empty: none has any.
        """
        trained = trained or [None] * len(token_ids)
        width = max(length or 0, *map(len, token_ids))
        shape = (len(token_ids), width)
        input_ids = torch.full(shape, pad_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        response_mask = torch.zeros(shape, dtype=torch.bool)
        labels = torch.full(shape, IGNORED, dtype=torch.int64)
        sequences = zip(token_ids, prompt_lengths, trained, strict=True)
        for index, (ids, start, kept) in enumerate(sequences):
            known, end = torch.tensor(ids, dtype=torch.int64), len(ids)
            input_ids[index, :end] = known
            attention_mask[index, :end] = 1
            mask = True if kept is None else torch.tensor(kept, dtype=torch.bool)
            response_mask[index, start - 1 : end - 1] = mask
            labels[index, start - 1 : end - 1] = known[start:]
            if kept is not None:
                labels[index].masked_fill_(~response_mask[index], IGNORED)
        return TokenBatch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            response_mask=response_mask,
            row_positions=_true_positions(response_mask),
            labels=labels,
            token_positions=_true_positions(attention_mask),
            boundaries=torch.tensor([0, *accumulate(map(len, token_ids))], dtype=torch.int32),
            token_ids=tuple(tuple(ids) for ids in token_ids),
            prompt_lengths=tuple(prompt_lengths),
            trained=tuple(trained),
            images=tuple(images) if any(images) else (),
        )

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def row_counts(self) -> tuple[int, ...]:
        """Host. [B] the response tokens of each sequence that are trained on."""
        sequences = zip(self.token_ids, self.prompt_lengths, self.trained, strict=True)
        return tuple(len(ids) - start if kept is None else sum(kept) for ids, start, kept in sequences)

    @property
    def num_rows(self) -> int:
        """N, the number of response tokens."""
        return sum(self.row_counts)

    @property
    def num_tokens(self) -> int:
        """Tokens that a model reads, those of prompts included and padding left out."""
        return sum(map(len, self.token_ids))

    @property
    def row_sequences(self) -> Ints:
        """Host. [N] the sequence (0 to B-1) that each row belongs to."""
        return np.repeat(np.arange(len(self)), self.row_counts)

    def row_labels(self) -> Tensor:
        """[N] int64: the response token that each row predicts."""
        return self.labels.flatten()[self.row_positions]

    @property
    def padded(self) -> bool:
        """Whether a sequence is shorter than the others, so that there is padding."""
        return self.num_tokens < self.input_ids.numel()

    def packed(self) -> PackedTokens:
        """The same sequences one after the other, without padding; nothing waits for the device."""
        width = self.input_ids.shape[1]
        rows = self.row_positions
        return PackedTokens(
            input_ids=self.input_ids.flatten()[self.token_positions][None],
            position_ids=(self.token_positions % width)[None],
            sequence_ids=(self.token_positions // width)[None],
            boundaries=self.boundaries,
            row_positions=rows % width + self.boundaries[rows // width],
            lengths=tuple(map(len, self.token_ids)),
        )

    def select(self, sequences: Sequence[int]) -> TokenBatch:
        """Some of the sequences in this order, cut to the longest of them."""
        if list(sequences) == list(range(len(self))):
            return self
        device = self.input_ids.device
        part = TokenBatch.of(
            [self.token_ids[row] for row in sequences],
            [self.prompt_lengths[row] for row in sequences],
            pad_id=0,
            trained=[self.trained[row] for row in sequences],
            images=[self.images[row] for row in sequences] if self.images else (),
        )
        return part.to(device)

    def to(self, device: torch.device | str) -> Self:
        """The same batch with its tensors on `device`; a GPU is not waited for."""
        tensors = self.tensors()
        return self.with_tensors(dict(zip(tensors, carried(list(tensors.values()), device), strict=True)))

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the name of their field."""
        return {
            field.name: value
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }

    def with_tensors(self, changed: Mapping[str, Tensor]) -> Self:
        """With other tensors in some of its fields."""
        values: dict[str, Any] = dict(changed)
        return replace(self, **values)


def _true_positions(mask: Tensor) -> Tensor:
    """Where the true entries of a mask on the host stand once it is flattened."""
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTokens:
    """The S tokens of B sequences in one row without padding; the N rows are those of the `TokenBatch`.

    Example: `TokenBatch.of([(5, 9, 0), (7, 0)], [1, 1], pad_id=0).packed().input_ids  # [[5, 9, 0, 7, 0]]`
    """

    input_ids: Tensor
    """[1, S] int64."""
    position_ids: Tensor
    """[1, S] int64: from 0 on in each sequence."""
    sequence_ids: Tensor
    """[1, S] int64: which sequence each token belongs to, 0 to B-1."""
    boundaries: Tensor
    """[B+1] int32: where each sequence begins, and S."""
    row_positions: Tensor
    """[N] int64: where among the S tokens the rows stand."""
    lengths: tuple[int, ...]
    """Host. [B] tokens of each sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(TokenBatch):
    """One micro-batch of responses, with who wrote each.

    Example: `collate(responses, pad_id=0)`
    """

    responses: tuple[Response, ...]
    """Host. [B] what was collated."""
    logprobs: Tensor | None = None
    """[B, T] float32 aligned with `labels`: nats under the distribution that the token was sampled from.
    NaN at marked positions of responses that came without, 0 at unmarked ones; None if all came without."""

    def rows(self) -> Rows:
        """What objectives may ask about the N rows."""
        counts = self.row_counts
        logprobs = None if self.logprobs is None else self.logprobs.flatten()[self.row_positions]
        teachers = [str(response.prompt.facts.get("teacher") or "") for response in self.responses]
        return Rows(
            labels=self.row_labels(),
            sources=np.repeat([SOURCES.index(response.source) for response in self.responses], counts),
            sequence_ids=self.row_sequences,
            pair_ids=np.repeat(pair_numbers(self.responses), counts),
            sampled_logprobs=logprobs,
            rewards=self._rewards(),
            teacher_names=np.repeat(teachers, counts) if any(teachers) else None,
        )

    def _rewards(self) -> Tensor | None:
        """[N] fp32: the reward of each row's response; None where no response has one."""
        found = [response.reward for response in self.responses]
        if all(one is None for one in found):
            return None
        known = np.array([np.nan if one is None else one for one in found], dtype=np.float32)
        return torch.from_numpy(known[self.row_sequences]).to(self.labels.device)


def pair_numbers(responses: Sequence[Response]) -> list[int]:
    """[B] the same number for the responses of a pair; a prompt that comes twice makes two pairs."""
    seen: Counter[tuple[str, str]] = Counter()
    numbers: dict[tuple[str, int], int] = {}
    found = []
    for response in responses:
        name = response.prompt.id
        pair = name, seen[name, response.source]
        seen[name, response.source] += 1
        found.append(numbers.setdefault(pair, len(numbers)))
    return found
