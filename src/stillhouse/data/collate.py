"""Collation: responses to right-padded tensors, with the mask of the positions that predict a response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

import torch

from stillhouse.core.alignment import TokenAlignment
from stillhouse.core.batch import Batch, TokenBatch
from stillhouse.core.requirements import MAIN
from stillhouse.core.types import Response


def collate(responses: Sequence[Response], pad_id: int, length: int | None = None) -> Batch:
    """Collate responses into one micro-batch.

    Args:
        responses: at least one; prompt and response of each have at least one token.
        pad_id: the padding; masked, and never a label.
        length: pad to at least this many tokens; by default to the longest sequence.

    Raises:
        ValueError: there are no responses, or one has no prompt, no tokens or a wrong number of logprobs.
    """
    if not responses:
        raise ValueError("collate needs at least one response")
    for response in responses:
        _check(response)
    tokens = TokenBatch.of(
        [(*response.prompt.token_ids, *response.token_ids) for response in responses],
        [len(response.prompt.token_ids) for response in responses],
        pad_id,
        length,
        [response.trained for response in responses],
        [response.all_images for response in responses],
    )
    logprobs = None
    if any(response.logprobs is not None for response in responses):
        logprobs = torch.zeros(tokens.input_ids.shape)
        for index, response in enumerate(responses):
            known, start = response.logprobs, len(response.prompt.token_ids)
            positions = slice(start - 1, start - 1 + len(response.token_ids))
            logprobs[index, positions] = torch.nan if known is None else torch.tensor(known)
    parts = {field.name: getattr(tokens, field.name) for field in fields(tokens)}
    return Batch(**parts, responses=tuple(responses), logprobs=logprobs)


def read_by_teacher(batch: Batch, pad_id: int, teacher: str = MAIN) -> TokenBatch:
    """What a teacher with the student's token ids reads: its own prompts, the same responses.

    Row for row its response tokens are those of `batch`, but for those in whose place it reads others; it is
    `batch` where nothing is its own.
    """
    own = [response.prompt.read_by(teacher) for response in batch.responses]
    others = [response.teacher_reads_instead if teacher == MAIN else None for response in batch.responses]
    if all(ids is None for ids in (*own, *others)):
        return batch
    prompts = [ids or response.prompt.token_ids for ids, response in zip(own, batch.responses, strict=True)]
    read = TokenBatch.of(
        [
            (*prompt, *(other or one.token_ids))
            for prompt, other, one in zip(prompts, others, batch.responses, strict=True)
        ],
        [len(prompt) for prompt in prompts],
        pad_id,
        trained=[None if other else one for other, one in zip(others, batch.trained, strict=True)],
        images=batch.images,
    )
    return read.to(batch.input_ids.device)


def alignment_with(batch: Batch, read: TokenBatch) -> TokenAlignment | None:
    """Which rows of a batch and of what a teacher with the same token ids reads belong together; None where
    they fall together one by one."""
    others = [response.teacher_reads_instead is not None for response in batch.responses]
    if not any(others):
        return None
    return TokenAlignment.with_other_texts(batch.row_counts, read.row_counts, others)


def _check(response: Response) -> None:
    name = response.prompt.id
    if not response.prompt.token_ids:
        raise ValueError(f"prompt {name}: has no tokens, so nothing predicts the first response token")
    if not response.token_ids:
        raise ValueError(f"prompt {name}: its {response.source} response has no tokens")
    if response.trained is not None and (
        len(response.trained) != len(response.token_ids) or not any(response.trained)
    ):
        raise ValueError(f"prompt {name}: its mask {response.trained} trains on none of its tokens")
    if response.logprobs is not None and len(response.logprobs) != len(response.token_ids):
        raise ValueError(
            f"prompt {name}: {len(response.logprobs)} log-probabilities for {len(response.token_ids)} tokens"
        )


def split(
    groups: Sequence[Sequence[Response]], num_micro: int, *, by_length: bool = False
) -> list[list[Response]]:
    """Split the responses of an optimiser step into micro-batches as even as possible, none empty.

    The gradient of the step does not depend on the split: the loss is normalised by the token count of
    the whole step.

    Args:
        groups: all responses of the step; a group is never split (for objectives that compare its responses).
        num_micro: number of micro-batches; fewer are returned if there are fewer groups.
        by_length: sort by length first, for less padding. Ties keep their order.
    """
    if num_micro < 1:
        raise ValueError(f"num_micro must be at least 1, got {num_micro}")
    ordered = sorted(groups, key=_longest) if by_length else list(groups)
    num_micro = min(num_micro, len(ordered))
    size, larger = divmod(len(ordered), max(1, num_micro))
    micro: list[list[Response]] = []
    start = 0
    for index in range(num_micro):
        end = start + size + (index < larger)
        micro.append([response for group in ordered[start:end] for response in group])
        start = end
    return micro


Groups = list[Sequence[Response]]


def split_by_tokens(
    groups: Sequence[Sequence[Response]],
    budget: int,
    *,
    packed: bool,
    agree: Callable[[int, int], int] = lambda needed, groups: needed,
) -> list[list[Response]]:
    """Split the responses of an optimiser step into the fewest micro-batches within a budget of tokens.

    Groups of similar length share a micro-batch, and the largest micro-batch is as small as their number
    allows. A group that is larger than the budget is a micro-batch of its own.

    Args:
        groups: all responses of the step; a group is never split.
        budget: tokens that one micro-batch may have, padding included.
        packed: whether there is no padding.
        agree: (micro-batches needed here, groups here) -> how many there are to be, where ranks must have the
            same number.
    """
    ordered = sorted(groups, key=_longest)
    wanted = min(len(ordered), agree(len(_filled(ordered, budget, packed)), len(ordered)))
    low, high = 1, max(budget, _tokens(ordered, packed))
    while low < high:
        middle = (low + high) // 2
        fits = len(_filled(ordered, middle, packed)) <= wanted
        low, high = (low, middle) if fits else (middle + 1, high)
    parts = _filled(ordered, low, packed)
    while len(parts) < wanted:
        index = max(range(len(parts)), key=lambda one: len(parts[one]))
        half = len(parts[index]) // 2
        parts[index : index + 1] = [parts[index][:half], parts[index][half:]]
    return [[response for group in part for response in group] for part in parts]


def _filled(ordered: Sequence[Sequence[Response]], limit: int, packed: bool) -> list[Groups]:
    """Each part takes groups in order until the next would go beyond the limit."""
    parts: list[Groups] = []
    for group in ordered:
        if parts and _tokens([*parts[-1], group], packed) <= limit:
            parts[-1].append(group)
        else:
            parts.append([group])
    return parts


def _tokens(groups: Sequence[Sequence[Response]], packed: bool) -> int:
    """Of one micro-batch of these groups, padding included."""
    lengths = [_length(response) for group in groups for response in group]
    return sum(lengths) if packed else max(lengths, default=0) * len(lengths)


def _longest(group: Sequence[Response]) -> int:
    return max(map(_length, group))


def _length(response: Response) -> int:
    return len(response.prompt.token_ids) + len(response.token_ids)
