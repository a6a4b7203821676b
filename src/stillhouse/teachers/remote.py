"""A teacher in another process or on another machine, asked for its hidden states."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from stillhouse.config import ListOf
from stillhouse.core.batch import TokenBatch
from stillhouse.core.head import ModelHead
from stillhouse.core.host import carried
from stillhouse.errors import EnvironmentFault, TeacherError
from stillhouse.models import local_device, vocab_digest
from stillhouse.remote import check_key_env, check_url
from stillhouse.teachers.base import REGISTRY, MetricSums, TeacherConfig
from stillhouse.teachers.hidden.protocol import KEY, ServedFacts
from stillhouse.teachers.read_through import content_keys
from stillhouse.teachers.store.codecs import DTYPES, HiddenCodec


@REGISTRY.register
class RemoteTeacherConfig(TeacherConfig):
    """A teacher that `stillhouse serve` runs elsewhere: exact, at D numbers a token instead of V.

    It sends the last hidden states of the response tokens, and its head once; the loss is the one of the live
    teacher. All micro-batches of a step are asked for ahead, from several servers of the same weights. It is
    cached by `teacher: {kind: cache, of: {kind: remote, ...}}`, in the store of the live teacher.

    Example: `teacher: {kind: remote, url: ["http://gpu1:8600", "http://gpu2:8600"], key_env: TEACHER_KEY}`
    """

    kind: Literal["remote"] = "remote"
    url: ListOf[str]
    """Where `stillhouse serve` answers, such as http://127.0.0.1:8600; or several of the same teacher."""
    key_env: str = KEY
    """Name of the environment variable that holds the servers' key."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """As what hidden states are sent; "auto" is the dtype of the teacher's weights, which loses nothing."""
    request_tokens: int = Field(4096, ge=1)
    """Most tokens of one request; a longer sequence goes alone."""
    concurrency: int = Field(2, ge=1, le=64)
    """Most requests under way at each server; it computes one at a time."""
    retries: int = Field(8, ge=0)
    """How often a request is sent again, to another server where there is one."""
    timeout: float = Field(120.0, gt=0)
    """Seconds without a byte after which a request has failed."""

    provides: ClassVar[frozenset[str]] = frozenset({"distribution"})
    in_process: ClassVar[bool] = False

    @field_validator("key_env")
    @classmethod
    def _is_a_name(cls, value: str) -> str | None:
        return check_key_env(value)

    @field_validator("url", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("url")
    @classmethod
    def _are_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len({one.rstrip("/") for one in value}) < len(value):
            raise ValueError("needs at least one server, and each once")
        return tuple(check_url(one, "http://HOST:PORT") for one in value)

    def key(self) -> str:
        """The key from the environment.

        Raises:
            EnvironmentFault: the variable is not set.
        """
        found = os.environ.get(self.key_env, "").strip()
        if not found:
            raise EnvironmentFault(
                f"teacher.key_env: the environment variable {self.key_env} is not set. `stillhouse serve` "
                "says which key it wants; `stillhouse check --no-servers` needs none."
            )
        return found

    def client(self) -> Any:
        """A client of the servers; nothing is sent yet.

        Raises:
            EnvironmentFault: a package or the key is missing.
        """
        try:
            from stillhouse.teachers.hidden.client import HiddenClient
        except ImportError as error:
            raise EnvironmentFault(
                "teacher kind remote needs the packages httpx and tenacity. Install them with: pip install "
                "'stillhouse[server]'"
            ) from error
        return HiddenClient(self, self.key())

    def facts(self) -> ServedFacts:
        """What the servers say about their teacher; asked for once in a run, by `check_tokenizer`.

        Raises:
            TeacherError: they do not answer, or are not of one teacher.
        """
        return _facts(self)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a student whose ids are not the teacher's.

        Raises:
            TeacherError: they are not, or a server does not answer.
        """
        _facts.cache_clear()  # another teacher may be served there since an earlier run of this process
        theirs = self.facts().tokenizer
        if theirs is not None and theirs != vocab_digest(tokenizer.get_vocab()):
            raise TeacherError(
                f"teacher.url: {self.url[0]} serves {self.facts().path}, whose tokenizer is not the "
                "student's, so its token ids mean other text. Choose a student of the teacher's family."
            )

    def check_signal(self, tokens: int) -> None:
        """See whether the servers answer, and take sequences as long as the longest.

        Raises:
            TeacherError: they do not.
        """
        context = self.facts().context
        if context is not None and tokens > context:
            raise TeacherError(
                f"teacher.url: the longest sequence has {tokens} tokens, and {self.facts().path} takes "
                f"{context}. Lower data.max_prompt or data.max_response."
            )

    @property
    def addresses(self) -> tuple[str, ...]:
        """Its servers'."""
        return tuple(self.url)

    def remote_head(self) -> tuple[int, int, int]:
        """As the servers say."""
        facts = self.facts()
        return facts.rows, facts.width, DTYPES[facts.dtype].itemsize

    def served_model(self) -> dict[str, str | None]:
        """As the servers say."""
        facts = self.facts()
        return {"path": facts.path, "digest": facts.fingerprint, "tokenizer": facts.tokenizer}

    def fingerprint(self, memory: Path) -> str:
        """That of the live teacher, where what is sent loses nothing."""
        facts = self.facts()
        if self.sent_as() == facts.dtype:
            return facts.fingerprint
        return hashlib.sha256(f"{facts.fingerprint} sent as {self.sent_as()}".encode()).hexdigest()[:16]

    def sent_as(self) -> str:
        """`dtype`, or that of the teacher's weights."""
        return self.facts().dtype if self.dtype == "auto" else self.dtype

    def build(self, model: nn.Module | None, vocab: int) -> RemoteTeacher:
        """The running teacher; its head is fetched.

        Raises:
            TeacherError: a server does not answer, or they are not of one teacher.
        """
        facts = self.facts()
        if facts.rows < vocab:
            raise TeacherError(
                f"teacher.url: {facts.path} has {facts.rows:,} ids, and the student {vocab:,}. Choose a "
                "student of the teacher's family."
            )
        client = self.client()
        if client.facts != facts:
            raise TeacherError(f"teacher.url: {self.url[0]} served {facts.path} a moment ago; start again.")
        return RemoteTeacher(client, HiddenCodec(self.sent_as()), vocab, self.request_tokens)


@functools.cache
def _facts(config: RemoteTeacherConfig) -> ServedFacts:
    with contextlib.closing(config.client()) as client:
        found: ServedFacts = client.facts
    return found


class RemoteTeacher:
    """Hidden states from servers, asked for ahead where the step says what comes."""

    def __init__(self, client: Any, codec: HiddenCodec, vocab: int, request_tokens: int) -> None:
        """Fetch the head.

        Args:
            client: a `HiddenClient`.
            codec: as what the states are sent.
            vocab: number of token ids that student and teacher share.
            request_tokens: most tokens of one request.
        """
        self.head: ModelHead = client.head(vocab)
        device = local_device()
        if device.type != "cpu":
            bias = None if self.head.bias is None else self.head.bias.to(device)
            head = self.head
            self.head = ModelHead(head.weight.to(device), bias, head.scale, head.softcap, head.vocab)
        self.tokens = 0
        """Tokens that were sent to be read, those of prompts included."""
        self._client = client
        self._codec = codec
        self._request_tokens = request_tokens
        self._ahead: dict[str, tuple[Future[list[Tensor]], int]] = {}
        """Key of a sequence -> its request, and its place in it."""

    def prefetch(self, batches: Sequence[TokenBatch]) -> None:
        """Ask for all sequences of a step's micro-batches."""
        self._ahead = {}
        for batch in batches:
            self._ask(batch)

    def _ask(self, batch: TokenBatch) -> list[str]:
        """Send for what of a batch has not been asked for yet; the keys of its sequences."""
        if batch.images and any(batch.images):
            raise TeacherError("teacher kind remote reads no images. Use kind live.")
        keys = content_keys(batch, in_process=False)
        missing = [row for row, key in enumerate(keys) if key not in self._ahead]
        for rows in _requests(batch, missing, self._request_tokens):
            answer = self._client.submit(batch, rows, self._codec)
            self.tokens += sum(len(batch.token_ids[row]) for row in rows)
            for place, row in enumerate(rows):
                self._ahead[keys[row]] = answer, place
        return keys

    def hidden(self, batch: TokenBatch) -> Tensor:
        """[N, Dt] last hidden states at the response rows, on the batch's device.

        Raises:
            TeacherError: no server answers, or one has another teacher by now.
        """
        keys = self._ask(batch)
        parts = []
        for key in keys:
            answer, place = self._ahead[key]
            parts.append(answer.result()[place])
        for key in keys:
            self._ahead.pop(key, None)
        return carried([torch.cat(parts)], batch.input_ids.device)[0]

    def pop_metrics(self) -> MetricSums:
        """Nothing is counted."""
        return {}

    def usage(self) -> dict[str, Any] | None:
        """None: no server counts tokens that are paid for."""
        return None

    def close(self) -> str | None:
        """Close the connections; a line on who answered."""
        counts, retries = self._client.counts(), self._client.retries
        self._client.close()
        if not any(counts.values()):
            return None
        told = ", ".join(f"{count:,} by {url}" for url, count in counts.items())
        return f"Remote teacher: sequences read {told}; {retries:,} requests were sent again"


def _requests(batch: TokenBatch, rows: Sequence[int], limit: int) -> list[list[int]]:
    """The sequences of each request: as they come, at most `limit` tokens together."""
    found: list[list[int]] = []
    tokens = 0
    for row in rows:
        length = len(batch.token_ids[row])
        if found and tokens + length <= limit:
            found[-1].append(row)
            tokens += length
        else:
            found.append([row])
            tokens = length
    return found
