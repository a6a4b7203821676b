"""One micro-batch as tensors, with the mask of exactly the positions that predict a response token."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from stillhouse.core.types import Response

IGNORED = -100
"""The label of positions that predict nothing we train on."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch. B sequences padded on the right to T tokens; N response tokens in all.

    A prompt of L tokens and a response of R tokens (end of sequence included where it was written) give R
    marked positions, L-1 to L+R-2: the hidden state at each of them predicts the response token that follows.
    N is the number of marked positions; "rows" below are those N positions, sequence after sequence.

    Example:
        >>> batch = collate(responses, pad_id=0)
        >>> hidden[batch.response_mask].shape  # [N, D]
    """

    input_ids: Tensor
    """[B, T] int64: prompt, response, padding."""
    attention_mask: Tensor
    """[B, T] int64: 1 on prompt and response, 0 on padding."""
    position_ids: Tensor
    """[B, T] int64: 0 to T-1."""
    response_mask: Tensor
    """[B, T] bool: True where the next token is a response token."""
    labels: Tensor
    """[B, T] int64: the next token where `response_mask` is True, else -100. Already shifted."""
    sources: Tensor
    """[B] int64: index into `stillhouse.core.types.SOURCES`."""
    student_versions: Tensor
    """[B] int64: the optimiser step whose weights wrote the response; -1 where no student did."""
    finished: Tensor
    """[B] bool: True where the response ends with the end-of-sequence token."""
    prompt_ids: tuple[str, ...]
    """[B] the prompts' ids."""
    responses: tuple[Response, ...]
    """[B] what was collated."""
    logprobs: Tensor | None = None
    """[B, T] float32 aligned with `labels`: nats under the distribution that the token was sampled from.
    NaN at marked positions of responses that came without, 0 at unmarked ones; None if all came without."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_tokens(self) -> int:
        """N, the number of response tokens."""
        return sum(len(response.token_ids) for response in self.responses)

    def row_sequences(self) -> Tensor:
        """[N] int64: the sequence (0 to B-1) that each row belongs to."""
        return self.response_mask.nonzero()[:, 0]

    def row_sources(self) -> Tensor:
        """[N] int64: the source code of the sequence that each row belongs to."""
        return self.sources[self.row_sequences()]

    def row_labels(self) -> Tensor:
        """[N] int64: the response token that each row predicts."""
        return self.labels[self.response_mask]

    def row_logprobs(self) -> Tensor | None:
        """[N] float32: `logprobs` of the rows."""
        return None if self.logprobs is None else self.logprobs[self.response_mask]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)
