"""How a teacher's signal about the R response tokens of one text becomes named tensors, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from stillhouse.core.sparse import EXCLUDED, SparseLogprobs
from stillhouse.errors import TeacherError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LogprobDtype = Literal["float32", "float16", "uint8"]
"""How a log-probability is stored: as it is, in 2 bytes (error below 0.0005 of its size), or in 1 byte (error
at most 1 / 510 of the range of its row)."""

RECORD_OVERHEAD = 300
"""Bytes of a record besides its tensors, about, for estimates."""

NO_TOKEN = 2**16 - 1
"""The id of an absent entry in 2 bytes; in 4 bytes it is -1."""


class Codec(ABC):
    """How one kind of signal is stored."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Part of the store's folder name: everything on which the tensors depend."""

    @abstractmethod
    def row_bytes(self, width: int) -> float:
        """Bytes of one row, for estimates; `width` is the teacher's hidden width."""


@dataclass(frozen=True)
class HiddenCodec(Codec):
    """Last hidden states, `hidden` [R, D]: the exact distribution, with the teacher's head.

    In int8 they are `codes` [R, D] times `scale` [R], the largest absolute value of each row / 127.
    """

    dtype: str

    @property
    def name(self) -> str:
        return f"hidden-{self.dtype}"

    def row_bytes(self, width: int) -> float:
        return width + 4 if self.dtype == "int8" else width * DTYPES[self.dtype].itemsize

    def encode(self, hidden: Tensor) -> dict[str, Tensor]:
        """The tensors of [R, D].

        Raises:
            TeacherError: a number is too large for float16.
        """
        hidden = hidden.detach().cpu()
        if self.dtype == "int8":
            scale = (hidden.float().abs().amax(-1) / 127).clamp_min(1e-30)
            return {"scale": scale, "codes": (hidden.float() / scale[:, None]).round().to(torch.int8)}
        stored = hidden.to(DTYPES[self.dtype])
        if self.dtype == "float16" and stored.isinf().any() and not hidden.isinf().any():
            raise TeacherError(
                f"teacher.dtype: float16 ends at 65504, and a hidden state of the teacher is "
                f"{hidden.abs().max():.4g}. Set bfloat16, or auto."
            )
        return {"hidden": stored}

    def forms(self, rows: int, width: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor that `encode` makes of [rows, width]."""
        if self.dtype == "int8":
            return {"codes": (torch.int8, (rows, width)), "scale": (torch.float32, (rows,))}
        return {"hidden": (DTYPES[self.dtype], (rows, width))}

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """[R, D] on the CPU, in fp32 where int8 is stored."""
        if self.dtype == "int8":
            return tensors["codes"].float() * tensors["scale"][:, None]
        return tensors["hidden"]


class SparseCodec(Codec):
    """A few tokens of each row."""

    form: ClassVar[Literal["topk", "sampled", "labels"]]
    logprobs: LogprobDtype
    vocab: int

    @abstractmethod
    def encode(self, sparse: SparseLogprobs) -> dict[str, Tensor]:
        """The tensors of the rows of one text."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor]) -> SparseLogprobs:
        """The rows of a record, on the CPU in fp32."""

    @property
    def _id_dtype(self) -> torch.dtype:
        return torch.uint16 if self.vocab < 2**16 else torch.int32

    def _ids(self, stored: Tensor) -> Tensor:
        ids = stored.long()
        return torch.where(ids == NO_TOKEN, -1, ids) if self._id_dtype == torch.uint16 else ids


@dataclass(frozen=True)
class TopkCodec(SparseCodec):
    """The `k` most probable tokens: `ids` and `logprobs` [R, K], `tail` and `labels` [R].

    A label of which nothing is known is NaN; a record with one gives no labels.

    In uint8 `logprobs` are codes from 0 to 255 that lie evenly between `low` and `high` [R] of each row.
    """

    form = "topk"
    k: int
    logprobs: LogprobDtype
    vocab: int

    @property
    def name(self) -> str:
        return f"topk{self.k}-{self.logprobs}-v{self.vocab}"

    def row_bytes(self, width: int) -> float:
        each = self._id_dtype.itemsize + getattr(torch, self.logprobs).itemsize
        return 8 + each * min(self.k, self.vocab) + (8 if self.logprobs == "uint8" else 0)

    def encode(self, sparse: SparseLogprobs) -> dict[str, Tensor]:
        assert sparse.tail is not None
        assert sparse.labels is not None
        ids, values = sparse.ids.cpu(), _float32(sparse.logprobs)
        tensors = {"tail": _float32(sparse.tail), "labels": _float32(sparse.labels)}
        tensors["ids"] = ids.to(self._id_dtype)
        if self.logprobs != "uint8":
            return {**tensors, "logprobs": values.clamp(-6e4, 0.0).to(DTYPES[self.logprobs])}
        low = values.masked_fill(ids < 0, torch.inf).amin(-1)
        high = values.masked_fill(ids < 0, -torch.inf).amax(-1)
        span = (high - low).clamp_min(1e-30)[:, None]
        codes = ((values - low[:, None]) / span * 255).round().clamp(0, 255).to(torch.uint8)
        return {**tensors, "low": low, "high": high, "logprobs": codes}

    def decode(self, tensors: Mapping[str, Tensor]) -> SparseLogprobs:
        ids, values = self._ids(tensors["ids"]), tensors["logprobs"].float()
        if self.logprobs == "uint8":
            low, high = tensors["low"][:, None], tensors["high"][:, None]
            values = low + (high - low) * (values / 255)
        values = values.masked_fill(ids < 0, EXCLUDED)
        labels = tensors["labels"]
        known = None if labels.isnan().any() else labels
        return SparseLogprobs(ids, values, tail=tensors["tail"], labels=known)


@dataclass(frozen=True)
class SampledCodec(SparseCodec):
    """Weighted samples: `labels` [R]; `sizes` [R], the number of different tokens of each row; and for all
    rows one after the other `ids`, `logprobs` and `weights` [sum of sizes].
    """

    form = "sampled"
    samples: int
    temperature: float
    logprobs: Literal["float32", "float16"]
    vocab: int

    @property
    def name(self) -> str:
        return f"sampled{self.samples}-t{self.temperature:g}-{self.logprobs}-v{self.vocab}"

    def row_bytes(self, width: int) -> float:
        each = self._id_dtype.itemsize + DTYPES[self.logprobs].itemsize + 4
        return 6 + each * self.samples / 4  # about a quarter of many samples are new tokens

    def encode(self, sparse: SparseLogprobs) -> dict[str, Tensor]:
        assert sparse.weights is not None
        assert sparse.labels is not None
        ids = sparse.ids.cpu()
        present = ids >= 0
        return {
            "labels": _float32(sparse.labels),
            "sizes": present.sum(-1).to(torch.uint16),
            "ids": ids[present].to(self._id_dtype),
            "logprobs": _float32(sparse.logprobs)[present].to(DTYPES[self.logprobs]),
            "weights": _float32(sparse.weights)[present],
        }

    def decode(self, tensors: Mapping[str, Tensor]) -> SparseLogprobs:
        sizes = tensors["sizes"].long()
        width = int(sizes.max()) if len(sizes) else 1
        present = torch.arange(width) < sizes[:, None]

        def padded(flat: Tensor, filler: float) -> Tensor:
            return flat.new_full(present.shape, filler).masked_scatter(present, flat)

        return SparseLogprobs(
            padded(tensors["ids"].long(), -1),
            padded(tensors["logprobs"].float(), EXCLUDED),
            weights=padded(tensors["weights"], 0.0),
            labels=tensors["labels"],
        )


@dataclass(frozen=True)
class LabelsCodec(SparseCodec):
    """The log-probability of each label alone: `labels` [R] fp32."""

    form = "labels"
    vocab: int = 0
    logprobs: LogprobDtype = "float32"

    @property
    def name(self) -> str:
        return "labels-float32"

    def row_bytes(self, width: int) -> float:
        return 4

    def encode(self, sparse: SparseLogprobs) -> dict[str, Tensor]:
        assert sparse.labels is not None
        return {"labels": _float32(sparse.labels)}

    def decode(self, tensors: Mapping[str, Tensor]) -> SparseLogprobs:
        return SparseLogprobs.of_labels(tensors["labels"])


def _float32(values: Tensor) -> Tensor:
    return values.detach().float().cpu()
