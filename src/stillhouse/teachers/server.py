"""A teacher on an OpenAI-compatible server: its most probable tokens at every position of a text."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.config import FilePath, because
from stillhouse.core.batch import TokenBatch
from stillhouse.core.sparse import EXCLUDED, MIN_TAIL, SparseLogprobs, concat_sparse
from stillhouse.errors import RequestRejected, TeacherError
from stillhouse.remote import ServedModel, ServerConnection
from stillhouse.remote.answers import ZERO_PROBABILITY
from stillhouse.remote.completions import PromptLogprobs, parse_prompt_logprobs
from stillhouse.teachers.base import REGISTRY, AnyTeacher, MetricSums, TeacherConfig
from stillhouse.teachers.cached import CacheTeacherConfig


@REGISTRY.register
class ServerTeacherConfig(TeacherConfig, ServerConnection):
    """A model on an OpenAI-compatible server generates the teacher's text and gives log-probabilities.

    Text alone (recipe seqkd) works with any server. Losses that compare distributions need log-probabilities
    of given text, which vLLM has (`prompt_logprobs`); llama.cpp and most hosted servers have none. They see
    the `k` most probable tokens of each position and the mass of the rest as one outcome, so that a loss is
    at most the one over whole distributions (`core.sparse`); CSD, which compares all pairs of tokens, cannot
    be computed from that and is refused. With `k: 0` the server gives the log-probability of each token of
    the text and nothing else, which is enough for `policy_gradient` on the student's text, and takes servers
    that have no more than `echo` with `logprobs`.

    Every signal about given text is cached on disk, one sequence as soon as it arrives, and not asked for
    again by any run that shares the folder.

    Example: `teacher: {kind: server, url: "http://127.0.0.1:8000/v1", model: Qwen/Qwen2.5-7B, k: 20}`
    """

    kind: Literal["server"] = "server"
    k: Annotated[int, Field(ge=0)] = 20
    """How many of the most probable tokens to request at each position; vLLM gives at most its
    --max-logprobs, by default 20. 0: only the log-probability of the text's own token."""
    retokenise: bool = False
    """Exchange text instead of token ids when the teacher writes; see engine kind server."""
    cache: FilePath | None = Path("teacher-cache")
    """The folder of the store for its signal, as that of teacher kind cache; null caches nothing."""
    identity: str | None = None
    """What tells this teacher from others in the store, in place of url and model: give it where one model is
    served at changing places. A server cannot show that its weights are still the same."""
    in_process: ClassVar[bool] = False
    caches: ClassVar[bool] = True

    @property
    def provides(self) -> frozenset[str]:  # type: ignore[override]
        """Text; and the most probable tokens or those of the text, unless token ids are not the student's."""
        return frozenset({"text"} if self.retokenise else {"text", self._form})

    @property
    def _form(self) -> Literal["topk", "labels"]:
        return "topk" if self.k else "labels"

    @property
    def fills_cache(self) -> bool:
        """Whether it has a store."""
        return self.cache is not None

    def options_without_effect(self) -> dict[str, str]:
        return {} if self.cache is not None else because("cache is null", "identity")

    def server(self) -> ServerConnection:
        """Itself."""
        return self

    @property
    def addresses(self) -> tuple[str, ...]:
        """Its server's."""
        return (self.url,)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Compare the server's tokenisation with the student's; with `retokenise` nothing needs to agree.

        Raises:
            ModelError: they differ.
            ServerError: the server does not answer.
        """
        if not self.retokenise:
            with contextlib.closing(ServedModel(self, tokenizer)) as served:
                served.check_tokenizer()

    def check_signal(self, tokens: int) -> None:
        """Ask the server for log-probabilities of a few tokens, and for its context.

        Raises:
            ServerError: it does not answer.
            TeacherError: it gives none, or not `k` of them, or its context is too short.
        """
        with contextlib.closing(ServedModel(self, None)) as served:
            ServerTeacher(served, self.k).check(tokens)

    def fingerprint(self, memory: Path) -> str:
        """From `identity`, or from the address and the model's name."""
        with contextlib.closing(self.client()) as client:
            name = self.identity or f"{client.url} {self.model_name(client)}"
        return hashlib.sha256(f"server\n{name}".encode()).hexdigest()[:16]

    def cache_folders(self) -> dict[str, Path]:
        """Its own, if it has one."""
        return {} if self.cache is None else {"cache": self.cache}

    def without_cache(self) -> ServerTeacherConfig:
        """The same without `cache`."""
        return self.model_copy(update={"cache": None})

    def build(self, model: nn.Module | None, vocab: int) -> AnyTeacher:
        """The running teacher, over its store.

        Raises:
            ServerError: the server does not answer.
            TeacherError: it gives no log-probabilities of given text.
        """
        if self.cache is None:
            return ServerTeacher(ServedModel(self, None), self.k, vocab)
        options: dict[str, Any] = {"k": self.k, "logprobs": "float32"} if self.k else {}
        return CacheTeacherConfig(of=self, store=self._form, folder=self.cache, **options).build(model, vocab)


class ServerTeacher:
    """Requests the log-probabilities of whole sequences, one request for each, many at a time."""

    def __init__(self, served: ServedModel, k: int, vocab: int | None = None) -> None:
        """Nothing is sent yet.

        Args:
            served: the model on its server.
            k: how many of the most probable tokens to request at each position; 0: only the text's own.
            vocab: token ids are below it; None: unknown.

        Raises:
            TeacherError: the server gives no log-probabilities of given text, or not of other tokens.
        """
        self.served = served
        self.k = k
        self.vocab = vocab
        self.form: str = "topk" if k else "labels"
        given_as = served.capabilities.prompt_logprobs
        if k and given_as is not None and not served.capabilities.alternatives:
            raise TeacherError(
                f"{served.client.url}: gives the log-probability of each token of a text, but none of other "
                f"tokens with their ids, and teacher.k={k} asks for these. Set teacher.k: 0, with an "
                "objective that needs no more: policy_gradient (recipe on_policy_distillation)."
            )
        if given_as is None:
            raise TeacherError(
                f"{served.client.url}: gives no log-probabilities of given text (neither "
                "prompt_logprobs nor echo with token ids), so that no loss can compare the student with "
                "this teacher. Serve the model with vLLM, load it here (teacher: {kind: live, path: "
                "...}), or train on its text alone (recipe seqkd)."
            )
        self._given_as = given_as

    def check(self, tokens: int) -> None:
        """Request the log-probabilities of a few tokens.

        Raises:
            ServerError: the server does not answer, or does not give `k` log-probabilities for each.
            TeacherError: it refuses to, or does not take `tokens` at once.
        """
        context = self.served.capabilities.context
        if context is not None and tokens >= context:  # it writes one token after them
            raise TeacherError(
                f"{self.served.client.url}: takes {context} tokens at once, and the longest prompt and "
                f"response have {tokens}. Start the server with a longer context (vLLM: --max-model-len), or "
                "lower data.max_prompt or data.max_response."
            )
        probe = [5, 6, 7]
        try:
            list(self.served.client.exchange("completions", [self._body(probe)], self._read))
        except RequestRejected as error:
            raise TeacherError(
                f"{error} It was asked for teacher.k={self.k} log-probabilities of each token; vLLM "
                "gives as many as its --max-logprobs (20 by default). k: 0 asks for that of the text's own "
                "token only, which is enough for the recipe on_policy_distillation."
            ) from error

    def sparse_logprobs(self, batch: TokenBatch) -> SparseLogprobs:
        """N rows for the response positions of a batch; see `SparseTeacher`.

        Raises:
            ServerError: the server rejects a sequence or does not answer.
            TeacherError: the batch has images.
        """
        parts: list[SparseLogprobs | None] = [None] * len(batch)
        for row, part in self.stream(batch):
            parts[row] = part
        whole = concat_sparse([part for part in parts if part is not None])
        return whole.to(batch.input_ids.device)

    def stream(self, batch: TokenBatch) -> Iterator[tuple[int, SparseLogprobs]]:
        """(sequence, its rows) as the responses arrive."""
        if batch.images:
            raise TeacherError(
                f"{self.served.client.url}: is sent token ids, with which servers take no images. Load the "
                "teacher here (teacher: {kind: live, path: ...}), or read its cache, for rows with images."
            )
        rows: dict[tuple[int, ...], list[int]] = {}
        for row, sequence in enumerate(batch.token_ids):
            rows.setdefault(sequence, []).append(row)
        different = list(rows)
        bodies = [self._body(sequence) for sequence in different]
        for index, logprobs in self.served.client.exchange("completions", bodies, self._read):
            for row in rows[different[index]]:
                start, kept = batch.prompt_lengths[row], batch.trained[row]
                response = range(start, len(batch.token_ids[row]))
                wanted = [position for position in response if kept is None or kept[position - start]]
                rows_of = topk_rows if self.k else label_rows
                yield row, rows_of(logprobs, different[index], wanted, self.k)

    def pop_metrics(self) -> MetricSums:
        """Nothing for the metrics log; `close` says what was requested."""
        return {}

    def usage(self) -> dict[str, Any] | None:
        """URL and counts of its requests."""
        return {"url": self.served.client.url, **vars(self.served.client.usage)}

    def close(self) -> str | None:
        """Close the connections; a line that says what was requested."""
        self.served.close()
        usage = self.served.client.usage
        return (
            f"teacher {self.served.client.url}: {usage.requests:,} requests, {usage.retries:,} of them "
            f"repeated, {usage.prompt_tokens:,} tokens read"
        )

    def _read(self, reply: Mapping[str, Any], body: Mapping[str, Any]) -> PromptLogprobs:
        return parse_prompt_logprobs(reply, self._given_as, body["prompt"], self.k, self.vocab)

    def _body(self, sequence: Sequence[int]) -> dict[str, Any]:
        options: dict[str, Any] = {"prompt_logprobs": self.k}
        if self._given_as == "echo":
            # Some servers read logprobs: 0 as none at all.
            options = {"echo": True, "logprobs": max(1, self.k), "return_tokens_as_token_ids": True}
        return self.served.request_body(sequence, 1, temperature=0.0, **options)


def topk_rows(
    logprobs: PromptLogprobs, sequence: Sequence[int], wanted: Sequence[int], k: int
) -> SparseLogprobs:
    """The `k` most probable tokens, the tail and the label at some positions of a sequence.

    A token of probability 0 is no entry: it belongs to the tail, whose mass it does not change. As a label it
    has the log-probability `ZERO_PROBABILITY`, so that gradients stay numbers.

    Args:
        logprobs: of every position of the sequence.
        sequence: its token ids.
        wanted: positions.
        k: entries of a row.
    """
    rows = [logprobs[position] for position in wanted]
    labels = torch.tensor([row[sequence[position]] for position, row in zip(wanted, rows, strict=True)])
    best = [
        sorted((item for item in row.items() if item[1] > ZERO_PROBABILITY), key=lambda item: -item[1])[:k]
        for row in rows
    ]
    width = max(1, *map(len, best))
    ids = torch.tensor([[token for token, _ in row] + [-1] * (width - len(row)) for row in best])
    values = torch.tensor([[value for _, value in row] + [EXCLUDED] * (width - len(row)) for row in best])
    return SparseLogprobs(ids, values, tail=_tail(values), labels=labels.float().clamp_min(ZERO_PROBABILITY))


def label_rows(
    logprobs: PromptLogprobs, sequence: Sequence[int], wanted: Sequence[int], k: int
) -> SparseLogprobs:
    """The log-probability of the sequence's own token at some positions; see `topk_rows`."""
    labels = torch.tensor([logprobs[position][sequence[position]] for position in wanted])
    return SparseLogprobs.of_labels(labels.float().clamp_min(ZERO_PROBABILITY))


def _tail(logprobs: Tensor) -> Tensor:
    """The log of the mass that is left, from rounded numbers that may sum to a little more than 1."""
    left = 1.0 - logprobs.double().exp().sum(-1)
    return left.clamp_min(0.0).log().clamp_min(MIN_TAIL).float()
