"""Running teachers that answer from a store: hidden states, or log-probabilities of a few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.core.batch import TokenBatch
from stillhouse.core.head import ModelHead
from stillhouse.core.host import carried
from stillhouse.core.sparse import SparseLogprobs, concat_sparse, sampled_of, topk_of
from stillhouse.teachers.base import (
    AnyTeacher,
    MetricSums,
    PrefetchingTeacher,
    RunningTeacher,
    SparseTeacher,
    StreamingTeacher,
    Teacher,
)
from stillhouse.teachers.read_through import ReadThroughCache
from stillhouse.teachers.store import (
    Record,
    Store,
)
from stillhouse.teachers.store.codecs import (
    HiddenCodec,
    LabelsCodec,
    SampledCodec,
    SparseCodec,
    TopkCodec,
)

MAX_LOGITS = 2**25
"""Entries of logits that exist at a time while hidden states become sparse log-probabilities."""


class CachedTeacher:
    """The exact distribution: hidden states from a store, with the teacher's head."""

    def __init__(self, store: Store, codec: HiddenCodec, head: ModelHead, teacher: Teacher | None) -> None:
        self.head = head
        self.teacher = teacher
        """The teacher behind it; None if it is not available."""
        self._codec = codec
        self._cache = ReadThroughCache(store, None if teacher is None else self._compute)

    def knows(self, batch: TokenBatch) -> list[bool]:
        """See `ReadThroughCache.knows`."""
        return self._cache.knows(batch)

    def prefetch(self, batches: Sequence[TokenBatch]) -> None:
        """Ask a teacher that is elsewhere about all sequences of a step that are not there."""
        teacher: RunningTeacher | None = self.teacher
        if not isinstance(teacher, PrefetchingTeacher):
            return
        missing = [[row for row, known in enumerate(self.knows(batch)) if not known] for batch in batches]
        teacher.prefetch([batch.select(rows) for batch, rows in zip(batches, missing, strict=True) if rows])

    def hidden(self, batch: TokenBatch) -> Tensor:
        """[N, Dt]: the teacher's last hidden states at the response rows, as they are stored."""
        parts = [self._codec.decode(record.tensors) for record in self._cache.records(batch)]
        return carried([torch.cat(parts)], batch.input_ids.device)[0]

    def _compute(self, batch: TokenBatch, _keys: Sequence[str]) -> list[Record]:
        assert self.teacher is not None
        counts = list(batch.row_counts)
        hidden = self.teacher.hidden(batch).cpu().split(counts)
        return [Record(count, self._codec.encode(part)) for count, part in zip(counts, hidden, strict=True)]

    def pop_metrics(self) -> MetricSums:
        """See `ReadThroughCache.pop_metrics`."""
        return self._cache.pop_metrics()

    def usage(self) -> dict[str, Any] | None:
        """That of the teacher behind it."""
        return None if self.teacher is None else self.teacher.usage()

    def close(self) -> str | None:
        """See `ReadThroughCache.close`."""
        return self._cache.close()


class CachedSparseTeacher:
    """Log-probabilities of a few tokens of each row, from a store."""

    def __init__(
        self,
        store: Store,
        codec: SparseCodec,
        teacher: AnyTeacher | None,
        seed: int = 0,
        in_process: bool = True,
    ) -> None:
        """Answer from a store.

        Args:
            store: where records are.
            codec: how they are encoded.
            teacher: computes those that are missing; None if it is not available.
            seed: decides what is sampled, together with the text.
            in_process: whether the teacher computes in this process; see `TeacherConfig`.
        """
        self.form: str = codec.form
        self.teacher = teacher
        """The teacher behind it; None if it is not available."""
        self._codec = codec
        self._seed = seed
        self._cache = ReadThroughCache(store, None if teacher is None else self._compute, in_process)

    def prefetch(self, batches: Sequence[TokenBatch]) -> None:
        """Ask a streaming teacher about all micro-batches of a step at once."""
        if batches and isinstance(self.teacher, StreamingTeacher):
            self._cache.prefetch(concatenated(batches))

    def knows(self, batch: TokenBatch) -> list[bool]:
        """See `ReadThroughCache.knows`."""
        return self._cache.knows(batch)

    def sparse_logprobs(self, batch: TokenBatch) -> SparseLogprobs:
        """N rows, as they are stored."""
        parts = [self._codec.decode(record.tensors) for record in self._cache.records(batch)]
        return concat_sparse(parts).to(batch.input_ids.device)

    def _compute(self, batch: TokenBatch, keys: Sequence[str]) -> list[Record]:
        counts = list(batch.row_counts)
        if isinstance(self.teacher, StreamingTeacher):
            records: dict[str, Record] = {}
            for row, part in self.teacher.stream(batch):
                records[keys[row]] = Record(counts[row], self._codec.encode(part))
                # At once, so that an interruption loses nothing that was paid for.
                self._cache.store.put({keys[row]: records[keys[row]]})
            return [records[key] for key in keys]
        if isinstance(self.teacher, Teacher):
            labels = batch.row_labels().split(counts)
            hidden = self.teacher.hidden(batch).split(counts)
            parts = [
                sparsified(self._codec, self.teacher.head, states, ids, self._seed_of(key))
                for states, ids, key in zip(hidden, labels, keys, strict=True)
            ]
        else:
            assert isinstance(self.teacher, SparseTeacher)
            whole = self.teacher.sparse_logprobs(batch)
            ends = torch.tensor(counts).cumsum(0).tolist()
            parts = [whole[end - count : end] for end, count in zip(ends, counts, strict=True)]
        return [Record(count, self._codec.encode(part)) for count, part in zip(counts, parts, strict=True)]

    def _seed_of(self, key: str) -> int:
        """The same text always has the same samples."""
        return int(key[:14], 16) ^ self._seed

    def pop_metrics(self) -> MetricSums:
        """See `ReadThroughCache.pop_metrics`."""
        return self._cache.pop_metrics()

    def usage(self) -> dict[str, Any] | None:
        """That of the teacher behind it."""
        return None if self.teacher is None else self.teacher.usage()

    def close(self) -> str | None:
        """See `ReadThroughCache.close`."""
        line = self._cache.close()
        if self.teacher is not None:
            self.teacher.close()
        return line


def concatenated(batches: Sequence[TokenBatch]) -> TokenBatch:
    """The sequences of several batches in one, padded on the right to the longest."""
    whole = TokenBatch.of(
        [ids for batch in batches for ids in batch.token_ids],
        [length for batch in batches for length in batch.prompt_lengths],
        pad_id=0,
        trained=[kept for batch in batches for kept in batch.trained],
        images=[shown for batch in batches for shown in batch.images or ((),) * len(batch)],
    )
    return whole.to(batches[0].input_ids.device)


def sparsified(
    codec: SparseCodec, head: ModelHead, hidden: Tensor, labels: Tensor, seed: int
) -> SparseLogprobs:
    """A few tokens of exact distributions, in blocks of rows.

    Args:
        codec: decides which tokens.
        head: the teacher's.
        hidden: [R, Dt] of one sequence.
        labels: [R], the tokens that follow.
        seed: decides what is sampled.
    """
    generator = torch.Generator().manual_seed(seed)
    size = max(1, MAX_LOGITS // head.height)
    parts = []
    for start in range(0, hidden.shape[0], size):
        rows = slice(start, start + size)
        logprobs = torch.log_softmax(head.logits(hidden[rows]), -1)
        if isinstance(codec, LabelsCodec):
            part = SparseLogprobs.of_labels(logprobs.gather(-1, labels[rows, None]).squeeze(-1))
        elif isinstance(codec, SampledCodec):
            part = sampled_of(logprobs.cpu(), codec.samples, generator, codec.temperature, labels[rows].cpu())
        else:
            assert isinstance(codec, TopkCodec)
            part = topk_of(logprobs, codec.k, labels[rows])
        parts.append(part)
    return concat_sparse(parts)
