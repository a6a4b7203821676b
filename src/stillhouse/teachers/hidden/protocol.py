"""What a server of hidden states and its clients send each other: safetensors bodies, and facts as JSON.

`GET /v1/teacher` gives `ServedFacts`, `GET /v1/head` the head's tensors, `POST /v1/hidden` the hidden states
of some sequences. Every answer names the fingerprint of the teacher that gave it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from stillhouse.core.batch import TokenBatch
from stillhouse.teachers.store.codecs import DTYPES

VERSION = 1
BIAS = "bias"
"""The tensor of a head that not all have."""
FINGERPRINT = "x-stillhouse-teacher"
"""The header that names the teacher of an answer, and in a request the one that is meant."""
DTYPE = "x-stillhouse-dtype"
"""The header of a request that says as what the states are sent: a name of `HiddenCodec`."""
MAX_PADDED = 1 << 24
"""Most tokens of a request, padding included."""
CLIENT = "x-stillhouse-client"
"""The header that tells clients apart, so that each is answered in turn."""
KEY = "STILLHOUSE_TEACHER_KEY"
"""The environment variable that holds the key on both sides, unless a configuration names another."""


@dataclass(frozen=True, slots=True)
class ServedFacts:
    """What a server says about its teacher.

    Example: `ServedFacts(1, "9f2c...", "teacher", "bfloat16", 32000, 4096, 2048, None, 1.0, None)`
    """

    version: int
    """Of the protocol."""
    fingerprint: str
    """As that of the live teacher, so that both fill one store."""
    path: str
    dtype: str
    """Of the weights, and so of the hidden states."""
    rows: int
    """V, the rows of the head."""
    width: int
    """D, of the hidden states."""
    context: int | None
    """The most tokens of a sequence; None: unknown."""
    tokenizer: str | None
    """`vocab_digest` of its tokenizer."""
    scale: float
    softcap: float | None

    def as_json(self) -> dict[str, Any]:
        """By the names of the fields."""
        return asdict(self)

    @classmethod
    def of_json(cls, found: Any) -> ServedFacts:
        """What `as_json` gave.

        Raises:
            ValueError: it is something else, or of another version.
        """
        names = {one.name for one in fields(cls)}
        if not isinstance(found, dict) or found.keys() != names:
            raise ValueError("it is no description of a teacher")
        if found["version"] != VERSION:
            raise ValueError(f"it speaks version {found['version']} of the protocol, this is {VERSION}")
        for name, value in found.items():
            if not _may_be(name, value):
                raise ValueError(f"its description has {str(value)[:40]!r} for {name}")
        return cls(**found)


def _may_be(name: str, value: Any) -> bool:
    """Whether a field of `ServedFacts` can have such a value."""
    if value is None:
        return name in ("context", "tokenizer", "softcap")
    if name in ("rows", "width", "context", "version"):
        return type(value) is int and value > 0
    if name in ("scale", "softcap"):
        return type(value) in (int, float) and math.isfinite(value) and value > 0
    return isinstance(value, str) and (name != "dtype" or value in DTYPES)


class BadBody(ValueError):
    """A body is not what the protocol has. Example: `BadBody("lengths do not add up")`"""


def pack_request(batch: TokenBatch, sequences: Sequence[int]) -> bytes:
    """Some sequences of a batch: `ids` [S], `lengths` [B] and `prompt_lengths` [B] int32, and where only some
    tokens of a response have rows `trained` [S], 0 or 1."""
    chosen = [batch.token_ids[row] for row in sequences]
    starts = [batch.prompt_lengths[row] for row in sequences]
    kept = [batch.trained[row] for row in sequences]
    tensors = {
        "ids": torch.tensor([one for ids in chosen for one in ids], dtype=torch.int32),
        "lengths": torch.tensor(list(map(len, chosen)), dtype=torch.int32),
        "prompt_lengths": torch.tensor(starts, dtype=torch.int32),
    }
    if any(one is not None for one in kept):
        flags = [
            (*([0] * start), *(one or [1] * (len(ids) - start)))
            for ids, start, one in zip(chosen, starts, kept, strict=True)
        ]
        tensors["trained"] = torch.tensor([flag for one in flags for flag in one], dtype=torch.uint8)
    return bytes(save(tensors))


def unpack_request(body: bytes, rows: int, context: int | None) -> TokenBatch:
    """The batch of a request.

    Args:
        body: what `pack_request` gave.
        rows: ids are below it.
        context: the most tokens of a sequence.

    Raises:
        BadBody: it is anything else.
    """
    tensors = _tensors(body)
    if (
        not {"ids", "lengths", "prompt_lengths"}
        <= tensors.keys()
        <= {"ids", "lengths", "prompt_lengths", "trained"}
    ):
        raise BadBody(f"it has the tensors {', '.join(sorted(tensors)) or 'none'}")
    ids, lengths, starts = (tensors[name] for name in ("ids", "lengths", "prompt_lengths"))
    if any(one.dtype != torch.int32 or one.dim() != 1 for one in (ids, lengths, starts)):
        raise BadBody("ids, lengths and prompt_lengths must be int32 in one dimension")
    if not len(lengths) or len(lengths) != len(starts) or int(lengths.sum()) != len(ids):
        raise BadBody("lengths do not add up to the ids")
    if bool((starts < 1).any()) or bool((starts > lengths).any()):
        raise BadBody("each prompt needs a token, and is no longer than its sequence")
    if bool((ids < 0).any()) or bool((ids >= rows).any()):
        raise BadBody(f"an id is not below {rows}: the student has another tokenizer than this teacher")
    if len(lengths) * int(lengths.max()) > MAX_PADDED:
        raise BadBody(
            f"{len(lengths):,} sequences of up to {int(lengths.max()):,} tokens are more than {MAX_PADDED:,} "
            "with padding: lower teacher.request_tokens"
        )
    if context is not None and int(lengths.max()) > context:
        raise BadBody(f"a sequence has {int(lengths.max())} tokens, and the teacher takes {context}")
    bounds = [0, *accumulate(lengths.tolist())]
    pieces = list(zip(bounds, bounds[1:], starts.tolist(), strict=False))
    flags = tensors.get("trained")
    if flags is not None and (
        flags.dtype != torch.uint8 or flags.shape != ids.shape or bool((flags > 1).any())
    ):
        raise BadBody("trained must have a byte for each id, 0 or 1")
    listed, marked = ids.tolist(), None if flags is None else flags.tolist()
    return TokenBatch.of(
        [listed[start:end] for start, end, _ in pieces],
        [prompt for *_, prompt in pieces],
        pad_id=0,
        trained=None
        if marked is None
        else [tuple(marked[start + prompt : end]) for start, end, prompt in pieces],
    )


def pack_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors of an answer."""
    return bytes(save({name: one.contiguous() for name, one in tensors.items()}))


def _tensors(body: bytes) -> dict[str, Tensor]:
    try:
        return dict(load(body))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BadBody(f"it is not in the safetensors format ({error})") from None


def unpack_tensors(
    body: bytes, forms: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], optional: Collection[str] = ()
) -> dict[str, Tensor]:
    """The tensors of an answer.

    Args:
        body: what `pack_tensors` gave.
        forms: dtype and shape of each tensor.
        optional: those that may be missing.

    Raises:
        BadBody: there are others.
    """
    tensors = _tensors(body)
    found = {name: (one.dtype, tuple(one.shape)) for name, one in tensors.items()}
    wanted = {name: form for name, form in forms.items() if name in tensors or name not in optional}
    if found != wanted:
        raise BadBody(f"it holds {found}, and not {wanted}")
    return tensors
