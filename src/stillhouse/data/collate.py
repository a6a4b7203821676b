"""Responses to tensors: right padding, and the mask of exactly the positions that predict a response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from stillhouse.types import SOURCES, Response

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
    """[B] int64: index into `stillhouse.types.SOURCES`."""
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


def collate(responses: Sequence[Response], pad_id: int, length: int | None = None) -> Batch:
    """Put responses side by side.

    Args:
        responses: at least one; each with a prompt and a response of at least one token.
        pad_id: what fills the right side; never attended to and never a label.
        length: pad to at least this many tokens; by default to the longest sequence.

    Raises:
        ValueError: there are no responses, or one of them cannot be predicted.
    """
    if not responses:
        raise ValueError("collate needs at least one response")
    for response in responses:
        _check(response)
    width = max(len(r.prompt.token_ids) + len(r.token_ids) for r in responses)
    width = max(width, length or 0)
    shape = (len(responses), width)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    response_mask = torch.zeros(shape, dtype=torch.bool)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    logprobs = torch.zeros(shape) if any(r.logprobs is not None for r in responses) else None
    for index, response in enumerate(responses):
        start = len(response.prompt.token_ids)
        end = start + len(response.token_ids)
        answer = torch.tensor(response.token_ids, dtype=torch.int64)
        input_ids[index, :start] = torch.tensor(response.prompt.token_ids, dtype=torch.int64)
        input_ids[index, start:end] = answer
        attention_mask[index, :end] = 1
        response_mask[index, start - 1 : end - 1] = True
        labels[index, start - 1 : end - 1] = answer
        if logprobs is not None:
            known = response.logprobs
            logprobs[index, start - 1 : end - 1] = torch.nan if known is None else torch.tensor(known)
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=torch.arange(width).expand(shape).contiguous(),
        response_mask=response_mask,
        labels=labels,
        sources=torch.tensor([SOURCES.index(r.source) for r in responses]),
        student_versions=torch.tensor(
            [-1 if r.student_version is None else r.student_version for r in responses]
        ),
        finished=torch.tensor([r.finished for r in responses]),
        prompt_ids=tuple(r.prompt.id for r in responses),
        responses=tuple(responses),
        logprobs=logprobs,
    )


def _check(response: Response) -> None:
    name = response.prompt.id
    if not response.prompt.token_ids:
        raise ValueError(f"prompt {name}: has no tokens, so nothing predicts the first response token")
    if not response.token_ids:
        raise ValueError(f"prompt {name}: its {response.source} response has no tokens")
    if response.logprobs is not None and len(response.logprobs) != len(response.token_ids):
        raise ValueError(
            f"prompt {name}: {len(response.logprobs)} log-probabilities for {len(response.token_ids)} tokens"
        )


def split(
    groups: Sequence[Sequence[Response]], num_micro: int, *, by_length: bool = False
) -> list[list[Response]]:
    """Divide the responses of one optimiser step among micro-batches as evenly as possible, none empty.

    The gradient of the step does not depend on the division, because it is divided by the step's token count.

    Args:
        groups: all responses of the step; those of a group stay together (for objectives that compare them).
        num_micro: how many micro-batches; fewer come back if there are fewer groups.
        by_length: sort by length first, so that less is padded. Ties keep their order.
    """
    if num_micro < 1:
        raise ValueError(f"num_micro must be at least 1, got {num_micro}")
    ordered = list(groups)
    if by_length:
        ordered.sort(key=lambda group: max(len(r.prompt.token_ids) + len(r.token_ids) for r in group))
    num_micro = min(num_micro, len(ordered))
    size, larger = divmod(len(ordered), max(1, num_micro))
    micro: list[list[Response]] = []
    start = 0
    for index in range(num_micro):
        end = start + size + (index < larger)
        micro.append([response for group in ordered[start:end] for response in group])
        start = end
    return micro
