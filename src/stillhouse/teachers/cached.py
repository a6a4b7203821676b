"""A teacher that answers from a store, and asks the model behind it only about what is not there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from stillhouse.core.head import ModelHead
from stillhouse.core.sparse import SparseLogprobs, joined, sampled_of, topk_of
from stillhouse.errors import TeacherError
from stillhouse.teachers.base import AnyTeacher, CompactTeacher, Counting, Counts, Streaming, Teacher
from stillhouse.teachers.forms import CompactForm, DrawsForm, HiddenForm, TopForm
from stillhouse.teachers.live import sequences
from stillhouse.teachers.store import Store

LOGITS = 2**25
"""Entries of logits that are there at a time while a compact form is made."""

Encode = Callable[[Mapping[str, Any], Sequence[bytes]], list[bytes]]
"""Sequences of a batch and their keys -> the payload of each, from the teacher itself."""


def content_keys(batch: Mapping[str, Any], local: bool = True) -> list[bytes]:
    """For each sequence of a batch 16 bytes that change with its token ids, with where the response begins,
    and, for a teacher that is local, with the number format of autocast, but not with padding, order or
    step."""
    device = batch["input_ids"].device.type
    cast = local and torch.is_autocast_enabled(device)
    format_ = str(torch.get_autocast_dtype(device)) if cast else ""
    ids, lengths = batch["input_ids"].cpu(), batch["attention_mask"].sum(1).tolist()
    starts = batch["response_mask"].int().argmax(1).tolist()
    keys = []
    for row, length, start in zip(ids, lengths, starts, strict=True):
        content = f"{start} {format_}\n".encode() + row[:length].numpy().astype("<i8").tobytes()
        keys.append(hashlib.blake2b(content, digest_size=16).digest())
    return keys


class Kept:
    """The payloads of a batch's sequences: from a store, or made now and kept."""

    def __init__(self, store: Store, encode: Encode | None, local: bool = True) -> None:
        """Answer from a store.

        Args:
            store: where payloads are.
            encode: makes those that are missing; None where the teacher is not at hand.
            local: whether the teacher computes in this process; see `TeacherConfig`.
        """
        self.store = store
        self._local = local
        self._encode = encode
        self._asked = self._hits = 0
        self._told = (0, 0)
        self._ready: dict[bytes, memoryview | bytes] = {}

    def prepare(self, batch: Mapping[str, Any]) -> None:
        """Have the payloads of these sequences at hand, and no others, also where the store has no room."""
        self._ready.clear()
        keys = content_keys(batch, self._local)
        self._ready = dict(zip(keys, self.payloads(batch), strict=True))

    def payloads(self, batch: Mapping[str, Any]) -> list[memoryview | bytes]:
        """One for each sequence of the batch.

        Raises:
            TeacherError: some are missing, and there is no teacher to make them.
        """
        keys = content_keys(batch, self._local)
        if all(key in self._ready for key in keys):
            return [self._ready[key] for key in keys]
        found: list[memoryview | bytes | None] = [self.store.get(key) for key in keys]
        if any(one is None for one in found):
            self.store.refresh()  # another process may have written them
            found = [
                self.store.get(key) if one is None else one for key, one in zip(keys, found, strict=True)
            ]
        missing = [row for row, one in enumerate(found) if one is None]
        self._asked += len(keys)
        self._hits += len(keys) - len(missing)
        if missing:
            made = self._make(batch, missing, [keys[row] for row in missing])
            for row, payload in zip(missing, made, strict=True):
                found[row] = payload
        return [one for one in found if one is not None]

    def _make(self, batch: Mapping[str, Any], rows: list[int], keys: list[bytes]) -> list[bytes]:
        if self._encode is None:
            raise TeacherError(
                f"{self.store.folder}: {len(rows)} of the {len(batch['input_ids'])} sequences of a batch are "
                f"not in the teacher cache, which holds {len(self.store):,}, and teacher.on_miss is error. "
                "Build the cache for this run where the teacher is (stillhouse cache build), with the same "
                "data, template and limits; or set teacher.on_miss: fill."
            )
        part = batch if len(rows) == len(batch["input_ids"]) else sequences(batch, rows)
        made = self._encode(part, keys)
        counts = part["response_mask"].sum(1).tolist()
        self.store.put(zip(keys, counts, made, strict=True))
        return made

    def counts(self) -> Counts:
        """The share of sequences that were there since this was last asked, and the size of the store."""
        asked, hits = self._asked - self._told[0], self._hits - self._told[1]
        self._told = (self._asked, self._hits)
        return {"cache/hits": (hits, asked), "cache/megabytes": (self.store.size / 1e6, 1)} if asked else {}

    def close(self) -> str | None:
        """Let go of the files; a line on what the cache was good for."""
        self.store.close()
        if not self._asked:
            return None
        line = (
            f"Teacher cache: {self._hits / self._asked:.1%} of {self._asked:,} sequences were there; "
            f"{self.store.size / 1e6:,.1f} MB in {self.store.folder}"
        )
        if self.store.refused:
            line += f"; {self.store.refused:,} were not kept (teacher.limit)"
        return f"{line}; {self.store.damaged:,} damaged" if self.store.damaged else line


class CachedTeacher:
    """The exact distribution: hidden states from a store, with the teacher's head."""

    def __init__(self, store: Store, form: HiddenForm, head: ModelHead, teacher: Teacher | None) -> None:
        self.head = head
        self._form = form
        self._teacher = teacher
        self._kept = Kept(store, None if teacher is None else self._encode)

    def hidden(self, batch: Mapping[str, Any]) -> Tensor:
        """[N, Dt]: the teacher's last hidden states at the response rows, as they are kept."""
        counts = batch["response_mask"].sum(1).tolist()
        payloads = self._kept.payloads(batch)
        out = torch.empty(sum(counts), self.head.weight.shape[1], dtype=self._form.out_dtype)
        for part, payload in zip(out.split(counts), payloads, strict=True):
            self._form.decode_into(part, payload)
        return out.to(batch["input_ids"].device)

    def _encode(self, batch: Mapping[str, Any], _keys: Sequence[bytes]) -> list[bytes]:
        assert self._teacher is not None
        hidden = self._teacher.hidden(batch).cpu()
        return [self._form.encode(part) for part in hidden.split(batch["response_mask"].sum(1).tolist())]

    def counts(self) -> Counts:
        """See `Kept.counts`."""
        return self._kept.counts()

    def close(self) -> str | None:
        """See `Kept.close`."""
        return self._kept.close()


class CachedCompact:
    """A few tokens of each row, from a store."""

    def __init__(
        self, store: Store, form: CompactForm, teacher: AnyTeacher | None, seed: int = 0, local: bool = True
    ) -> None:
        """Answer from a store.

        Args:
            store: where records are.
            form: how they look.
            teacher: says what is not there; None if it is not at hand.
            seed: decides the draws, together with the text.
            local: whether the teacher computes in this process; see `TeacherConfig`.
        """
        self._seed = seed
        self.form: str = form.kind
        self.inner: object = teacher
        """The teacher behind it."""
        self._form = form
        self._kept = Kept(store, None if teacher is None else self._encode, local)

    def ahead(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Ask a teacher that streams about the micro-batches of a step together."""
        if batches and isinstance(self.inner, Streaming):
            self._kept.prepare(together(batches))

    def compact(self, batch: Mapping[str, Any]) -> SparseLogprobs:
        """N rows, as they are kept."""
        counts = batch["response_mask"].sum(1).tolist()
        payloads = self._kept.payloads(batch)
        parts = [self._form.decode(one, rows) for one, rows in zip(payloads, counts, strict=True)]
        return joined(parts).to(batch["input_ids"].device)

    def _encode(self, batch: Mapping[str, Any], keys: Sequence[bytes]) -> list[bytes]:
        counts = batch["response_mask"].sum(1).tolist()
        if isinstance(self.inner, Streaming):
            made = [b""] * len(keys)
            for row, part in self.inner.each(batch):
                made[row] = self._form.encode(part)
                # At once, so that an interruption loses nothing that was paid for.
                self._kept.store.put([(keys[row], counts[row], made[row])])
            return made
        if isinstance(self.inner, Teacher):
            labels = batch["labels"][batch["response_mask"]].split(counts)
            hidden = self.inner.hidden(batch).split(counts)
            said = [
                compacted(self._form, self.inner.head, states, ids, self._seed_of(key))
                for states, ids, key in zip(hidden, labels, keys, strict=True)
            ]
        else:
            assert isinstance(self.inner, CompactTeacher)
            whole = self.inner.compact(batch)
            starts = torch.tensor([0, *counts]).cumsum(0).tolist()
            said = [whole[start : start + size] for start, size in zip(starts, counts, strict=False)]
        return [self._form.encode(part) for part in said]

    def _seed_of(self, key: bytes) -> int:
        """The same text always has the same draws."""
        return int.from_bytes(key[:7], "big") ^ self._seed

    def counts(self) -> Counts:
        """See `Kept.counts`."""
        return self._kept.counts()

    def close(self) -> str | None:
        """See `Kept.close`."""
        line = self._kept.close()
        if isinstance(self.inner, Counting):
            self.inner.close()
        return line


def together(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sequences of several batches in one, padded on the right to the longest."""
    width = max(batch["input_ids"].shape[1] for batch in batches)
    names = [
        name for name in ("input_ids", "attention_mask", "response_mask", "labels") if name in batches[0]
    ]
    return {
        name: torch.cat([pad(batch[name], (0, width - batch[name].shape[1])) for batch in batches])
        for name in names
    }


def compacted(
    form: CompactForm, head: ModelHead, hidden: Tensor, labels: Tensor, seed: int
) -> SparseLogprobs:
    """A compact form of exact distributions, in blocks of rows.

    Args:
        form: which one.
        head: the teacher's.
        hidden: [R, Dt] of one sequence.
        labels: [R], the tokens that follow.
        seed: decides the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    size = max(1, LOGITS // head.height)
    parts = []
    for start in range(0, hidden.shape[0], size):
        rows = slice(start, start + size)
        logprobs = torch.log_softmax(head.logits(hidden[rows]), -1)
        if isinstance(form, DrawsForm):
            part = sampled_of(logprobs.cpu(), form.count, generator, form.temperature, labels[rows].cpu())
        else:
            assert isinstance(form, TopForm)
            part = topk_of(logprobs, form.count, labels[rows])
        parts.append(part)
    return joined(parts)
