"""What a record of a teacher's signal holds: the bytes of a sequence's response rows, and back.

Each form keeps R rows, one for each response token. Numbers are little-endian and lie one array after
another, without gaps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from stillhouse.core.sparse import EXCLUDED, SparseLogprobs
from stillhouse.errors import TeacherError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Number = Literal["float32", "float16", "uint8"]
"""How a log-probability is kept: as it is, in 2 bytes (error below 0.0005 of its size), or in 1 byte (error
at most 1 / 510 of the range of its row)."""


class Form(ABC):
    """How one kind of signal is kept."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Part of the store's folder name: everything on which the bytes depend."""

    @property
    def facts(self) -> dict[str, Any]:
        """What `info` shows and shards must agree on."""
        return {"form": self.name}

    @abstractmethod
    def row_bytes(self, width: int) -> float:
        """Bytes of one row, for estimates; `width` is the teacher's hidden width."""


@dataclass(frozen=True)
class HiddenForm(Form):
    """Last hidden states [R, D]: the exact distribution, with the teacher's head.

    `int8` keeps a scale for each row (float32 [R], the largest absolute value / 127), then int8 [R, D].
    """

    dtype: str

    @property
    def name(self) -> str:
        return f"hidden-{self.dtype}"

    def row_bytes(self, width: int) -> float:
        return width + 4 if self.dtype == "int8" else width * DTYPES[self.dtype].itemsize

    def encode(self, hidden: Tensor) -> bytes:
        """The bytes of [R, D].

        Raises:
            TeacherError: a number is too large for float16.
        """
        hidden = hidden.detach().cpu()
        if self.dtype != "int8":
            kept = hidden.to(DTYPES[self.dtype])
            if self.dtype == "float16" and kept.isinf().any() and not hidden.isinf().any():
                raise TeacherError(
                    f"teacher.dtype: float16 ends at 65504, and a hidden state of the teacher is "
                    f"{hidden.abs().max():.4g}. Set bfloat16, or auto."
                )
            return _raw(kept)
        scale = (hidden.float().abs().amax(-1) / 127).clamp_min(1e-30)
        codes = (hidden.float() / scale[:, None]).round().to(torch.int8)
        return _raw(scale) + _raw(codes)

    def decode_into(self, out: Tensor, payload: memoryview | bytes) -> None:
        """Write the rows of a record to `out` [R, D], which has the format `out_dtype`, on the CPU."""
        if self.dtype != "int8":
            flat = out.view(torch.uint8).numpy().reshape(-1)
            flat[:] = np.frombuffer(payload, np.uint8)
            return
        rows = out.shape[0]
        scale = torch.from_numpy(np.frombuffer(payload, "<f4", rows).copy())
        codes = np.frombuffer(payload, np.int8, offset=4 * rows).reshape(out.shape)
        out.copy_(torch.from_numpy(codes.astype(np.float32)) * scale[:, None])

    @property
    def out_dtype(self) -> torch.dtype:
        """The number format that records are read in."""
        return torch.float32 if self.dtype == "int8" else DTYPES[self.dtype]


class CompactForm(Form):
    """A few tokens of each row."""

    kind: Literal["topk", "sampled"]

    @abstractmethod
    def encode(self, compact: SparseLogprobs) -> bytes:
        """The bytes of the rows of one sequence."""

    @abstractmethod
    def decode(self, payload: memoryview | bytes, rows: int) -> SparseLogprobs:
        """The rows of a record, on the CPU in fp32."""


@dataclass(frozen=True)
class TopForm(CompactForm):
    """The `count` most probable tokens: u32 K; tail and label log-probability (float32 [R] each); ids (u16 or
    u32 [R, K]); log-probabilities [R, K]. In `uint8` the smallest and the largest of each row come first
    (float32 [R] each) and the codes 0 to 255 lie evenly between them.
    """

    count: int
    number: Number
    vocab: int
    kind: Literal["topk", "sampled"] = "topk"

    @property
    def name(self) -> str:
        return f"top{self.count}-{self.number}-v{self.vocab}"

    def row_bytes(self, width: int) -> float:
        each = _id_type(self.vocab).itemsize + {"float32": 4, "float16": 2, "uint8": 1}[self.number]
        return 8 + each * min(self.count, self.vocab) + (8 if self.number == "uint8" else 0)

    def encode(self, compact: SparseLogprobs) -> bytes:
        assert compact.tail is not None
        assert compact.labels is not None
        ids = compact.ids.cpu().numpy()
        parts = [np.array([ids.shape[1]], "<u4"), _f4(compact.tail), _f4(compact.labels)]
        parts.append(np.where(ids < 0, _none(self.vocab), ids).astype(_id_type(self.vocab)))
        values = _f4(compact.logprobs)
        if self.number != "uint8":
            parts.append(np.clip(values, -6e4, 0.0).astype("<f4" if self.number == "float32" else "<f2"))
        else:
            there = np.where(ids < 0, np.nan, values)
            low, high = np.nanmin(there, -1), np.nanmax(there, -1)
            span = np.maximum(high - low, 1e-30)[:, None]
            parts += [low, high]
            parts.append(np.clip(np.rint((values - low[:, None]) / span * 255), 0, 255).astype(np.uint8))
        return b"".join(part.tobytes() for part in parts)

    def decode(self, payload: memoryview | bytes, rows: int) -> SparseLogprobs:
        take = _Reader(payload)
        width = int(take("<u4", 1)[0])
        tail, labels = take("<f4", rows), take("<f4", rows)
        ids = take(_id_type(self.vocab), rows * width).reshape(rows, width).astype(np.int64)
        there = ids != _none(self.vocab)
        if self.number == "uint8":
            low, high = take("<f4", rows)[:, None], take("<f4", rows)[:, None]
            values = low + (high - low) * (
                take(np.uint8, rows * width).reshape(rows, width) / np.float32(255)
            )
        else:
            kind = "<f4" if self.number == "float32" else "<f2"
            values = take(kind, rows * width).reshape(rows, width).astype(np.float32)
        return SparseLogprobs(
            torch.from_numpy(np.where(there, ids, -1)),
            torch.from_numpy(np.where(there, values, np.float32(EXCLUDED)).astype(np.float32)),
            tail=torch.from_numpy(tail.copy()),
            labels=torch.from_numpy(labels.copy()),
        )


@dataclass(frozen=True)
class DrawsForm(CompactForm):
    """Weighted draws: label log-probability (float32 [R]); the number of different tokens of each row
    (u16 [R]); then for all rows together ids (u16 or u32), log-probabilities (float32 or float16) and weights
    (float32).
    """

    count: int
    temperature: float
    number: Literal["float32", "float16"]
    vocab: int
    kind: Literal["topk", "sampled"] = "sampled"

    @property
    def name(self) -> str:
        return f"draws{self.count}-t{self.temperature:g}-{self.number}-v{self.vocab}"

    def row_bytes(self, width: int) -> float:
        each = _id_type(self.vocab).itemsize + (4 if self.number == "float32" else 2) + 4
        return 6 + each * self.count / 4  # about a quarter of many draws are new tokens

    def encode(self, compact: SparseLogprobs) -> bytes:
        assert compact.weights is not None
        assert compact.labels is not None
        ids = compact.ids.cpu().numpy()
        there = ids >= 0
        values = _f4(compact.logprobs)[there].astype("<f4" if self.number == "float32" else "<f2")
        parts = [_f4(compact.labels), there.sum(-1).astype("<u2")]
        parts += [ids[there].astype(_id_type(self.vocab)), values, _f4(compact.weights)[there]]
        return b"".join(part.tobytes() for part in parts)

    def decode(self, payload: memoryview | bytes, rows: int) -> SparseLogprobs:
        take = _Reader(payload)
        labels, sizes = take("<f4", rows), take("<u2", rows).astype(np.int64)
        total, width = int(sizes.sum()), int(sizes.max(initial=1))
        there = np.arange(width)[None] < sizes[:, None]

        def table(kind: Any, filler: float, dtype: Any) -> Tensor:
            whole = np.full((rows, width), filler, dtype)
            whole[there] = take(kind, total)
            return torch.from_numpy(whole)

        ids = table(_id_type(self.vocab), -1, np.int64)
        logprobs = table("<f4" if self.number == "float32" else "<f2", EXCLUDED, np.float32)
        weights = table("<f4", 0.0, np.float32)
        return SparseLogprobs(ids, logprobs, weights=weights, labels=torch.from_numpy(labels.copy()))


class _Reader:
    """Takes arrays off the front of a payload."""

    def __init__(self, payload: memoryview | bytes) -> None:
        self._payload, self._at = payload, 0

    def __call__(self, kind: Any, count: int) -> Any:
        found = np.frombuffer(self._payload, kind, count, self._at)
        self._at += found.nbytes
        return found


def _id_type(vocab: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab < 2**16 else "<u4")


def _none(vocab: int) -> int:
    """The id of an entry that is not there: the largest of its type."""
    return int(np.iinfo(_id_type(vocab)).max)


def _f4(values: Tensor) -> Any:
    return values.detach().float().cpu().numpy().astype("<f4")


def _raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
