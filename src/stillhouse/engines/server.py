"""Generation by a model on an OpenAI-compatible server."""

from __future__ import annotations

import contextlib
import glob
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from stillhouse.core.images import ImageRef
from stillhouse.core.journal import Journal, content_digest
from stillhouse.core.types import Completion
from stillhouse.data.text_tokens import TextTokenizer
from stillhouse.engines.base import (
    REGISTRY,
    CompletionCollector,
    EngineConfig,
    ProgressCallback,
    Sampling,
    TokenizerInfo,
)
from stillhouse.engines.transformers import TransformersConfig
from stillhouse.errors import ConfigError, EngineError, Fault
from stillhouse.remote import Capabilities, CompletionChoice, ServedModel, ServerConnection
from stillhouse.remote.answers import InvalidAnswer, checked_ids, checked_sampled_logprobs
from stillhouse.remote.completions import vocab_size

OPTION_NAMES: dict[str, dict[str, str]] = {
    "vllm": {
        "top_k": "top_k",
        "min_p": "min_p",
        "min_tokens": "min_tokens",
        "repetition_penalty": "repetition_penalty",
    },
    "llama.cpp": {"top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repeat_penalty"},
    "other": {},
}
"""By kind of server the names of the sampling settings that are not in OpenAI's API."""

FIXED_OPTIONS: dict[str, dict[str, Any]] = {
    "vllm": {},
    # By default temperature applies after the other settings, and the penalty to the last 64 tokens only.
    "llama.cpp": {
        "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
        "repeat_last_n": 65536,
    },
    "other": {},
}
"""By kind of server the options that make its sampling follow the order of `Sampling`."""


@REGISTRY.register
class ServerConfig(EngineConfig, ServerConnection):
    """A model on an OpenAI-compatible server generates for the teacher, and the student in this process.

    Prompts and responses are exchanged as token ids, so that training sees the sampled tokens. vLLM (0.10.2
    or newer) and llama.cpp's server support that.

    Example: `engine: {kind: server, url: "http://127.0.0.1:8000/v1", sampling: {temperature: 0.8}}`
    """

    kind: Literal["server"] = "server"
    retokenise: bool = False
    """Exchange text instead of token ids, and tokenise responses with the student's tokenizer: for servers
    without token ids and for teachers with another tokenizer. The tokens may then differ from the sampled
    ones; the run folder counts how many responses were retokenised."""
    student: TransformersConfig = TransformersConfig()
    """The engine of the student, whose weights change in this process and not on the server."""

    @classmethod
    def of_teacher(cls, teacher: Any) -> ServerConfig:
        """The engine that generates on the server of a `kind: server` teacher."""
        return cls(
            **{name: getattr(teacher, name) for name in (*ServerConnection.model_fields, "retokenise")}
        )

    def build(self, model: Any, tokenizer_info: TokenizerInfo) -> ServerEngine:
        """Connect to the server and check its capabilities; `model` is not used.

        Raises:
            ServerError: the server does not answer.
            EngineError: it does not exchange token ids and `retokenise` is off.
            ModelError: its token ids are not the student's.
        """
        served = connect(self, tokenizer_info.tokenizer, self.retokenise)
        return ServerEngine(served, tokenizer_info, self.retokenise)

    def for_student(self) -> EngineConfig:
        """`student` with the sampling of this engine."""
        return self.student.model_copy(update={"sampling": self.sampling})


def connect(server: ServerConnection, tokenizer: Any, retokenise: bool) -> ServedModel:
    """A served model that exchanges token ids, or text with `retokenise`.

    Raises:
        ServerError: the server does not answer.
        EngineError: it does not exchange token ids.
        ModelError: its token ids are not the student's.
    """
    served = ServedModel(server, tokenizer)
    if retokenise:
        return served
    missing = [
        what
        for what, there in (
            ("takes no token ids as prompts", served.capabilities.token_prompts),
            ("does not return the ids of the tokens it generates", served.capabilities.token_ids),
        )
        if not there
    ]
    if missing:
        raise EngineError(
            f"{served.client.url}: {' and '.join(missing)}, so that training could not see the tokens "
            "that were sampled. Use vLLM 0.10.2 or newer or llama.cpp's server, or set retokenise: true to "
            "exchange text."
        )
    served.check_tokenizer()
    return served


class ServerEngine:
    """Generates with one request for each prompt, many concurrently.

    The seed of a request depends on the seed of the call and the sample id, so that the same call sends the
    same requests; a server batches requests as they arrive, so that rounding may still change the text.
    Completions in `journal`, if there is one, are not requested again.

    Example:
        >>> config = ServerConfig(url="http://127.0.0.1:8000/v1")
        >>> engine = config.build(None, TokenizerInfo.from_tokenizer(tokenizer))
        >>> engine.generate([[5, 9, 12]], Sampling(max_tokens=20), seed=0)
    """

    def __init__(self, served: ServedModel, tokenizer_info: TokenizerInfo, retokenise: bool = False) -> None:
        self.served = served
        self.tokenizer_info = tokenizer_info
        self.retokenise = retokenise
        self._vocab = vocab_size(tokenizer_info.tokenizer)
        self.journal: Journal | None = None
        self.retokenised = 0
        """Number of completions that came as text and were tokenised here."""
        self.reused = 0
        """Number of completions found in the journal."""

    def use_journal(self, path: Path, share: int = 0) -> None:
        """Keep completions in a file, of every other share than the first in one beside it, as processes that
        append to one file may tear each other's lines; completions that any of them has are not requested.
        """
        own = path.with_stem(f"{path.stem}-{share}") if share else path
        beside = {path, *path.parent.glob(f"{glob.escape(path.stem)}-*{path.suffix}")}
        self.journal = Journal(own, others=sorted(beside - {own}))

    def fingerprint(self) -> str:
        """A digest of the URL and the model's name; the weights on a server cannot be read."""
        name = f"server\n{self.served.client.url}\n{self.served.name}"
        return hashlib.sha256(name.encode()).hexdigest()[:32]

    def counts(self) -> dict[str, int]:
        """Usage counts so far, for the run folder."""
        counts = dict(vars(self.served.client.usage), reused=self.reused)
        return counts | ({"retokenised": self.retokenised} if self.retokenise else {})

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seed: int,
        *,
        sample_ids: Sequence[int] | None = None,
        progress: ProgressCallback | None = None,
        images: Sequence[tuple[ImageRef, ...]] = (),
    ) -> list[Completion]:
        """One completion for each prompt, in the order of the prompts; see `Engine.generate`.

        Raises:
            ConfigError: the server does not support a sampling setting, or its context is too short.
            ServerError: it rejected a prompt, or did not answer within the retries. Completions that came
                before are in the journal.
            EngineError: it stopped a completion for another reason than its end or `max_tokens`, or the
                prompts have images.
        """
        if any(images):
            raise EngineError(
                "engine: kind server sends token ids, with which servers take no images. Use engine: {kind: "
                "transformers} or {kind: vllm} for rows with images."
            )
        options = sampling_options(sampling, self.served.capabilities, self.tokenizer_info)
        self._check_context(max(map(len, prompts), default=0), sampling)
        completions = CompletionCollector(len(prompts), progress)
        bodies = [
            self._body(prompt, options, request_seed(seed, sample_id))
            for prompt, sample_id in zip(prompts, sample_ids or range(len(prompts)), strict=True)
        ]
        for index, completion in self._complete(bodies, sampling):
            completions(index, completion)
        return completions.in_order()

    def _check_context(self, longest: int, sampling: Sampling) -> None:
        context = self.served.capabilities.context
        if context is None or self.retokenise or longest + sampling.max_tokens <= context:
            return
        raise ConfigError(
            Fault(
                "engine.sampling.max_tokens",
                f"the longest prompt has {longest} tokens; the server at {self.served.client.url} "
                f"takes {context} for prompt and response together",
                got=str(sampling.max_tokens),
                allowed=f"at most {context - longest}",
                hint="Or start the server with a longer context (vLLM: --max-model-len, llama.cpp: "
                "--ctx-size, which its slots share).",
            )
        )

    def _body(self, prompt: Sequence[int], options: Mapping[str, Any], seed: int) -> dict[str, Any]:
        if not self.retokenise:
            return self.served.request_body(prompt, seed=seed, **options)
        text = self.tokenizer_info.tokenizer.decode(list(prompt), skip_special_tokens=False)
        return self.served.request_body(text, seed=seed, **options)

    def _complete(
        self, bodies: Sequence[dict[str, Any]], sampling: Sampling
    ) -> Iterator[tuple[int, Completion]]:
        missing = []
        for index, body in enumerate(bodies):
            known = self._known(body, sampling)
            if known is None:
                missing.append(index)
            else:
                self.reused += 1
                yield index, known
        parse = self._parser(sampling)
        for position, completion in self.served.complete([bodies[index] for index in missing], parse):
            index = missing[position]
            if self.journal is not None:
                self.journal.put(content_digest(bodies[index]), _to_json(completion))
            self.retokenised += self.retokenise
            yield index, completion

    def _known(self, body: Mapping[str, Any], sampling: Sampling) -> Completion | None:
        """The completion that the journal has; None where it has none, or none that could have been kept."""
        found = None if self.journal is None else self.journal.get(content_digest(body))
        with contextlib.suppress(InvalidAnswer, TypeError, ValueError):
            return None if found is None else _from_json(found, self._vocab, sampling.max_tokens)
        return None

    def _parser(self, sampling: Sampling) -> Callable[[CompletionChoice], Completion]:
        parse = from_text if self.retokenise else from_ids
        return lambda choice: parse(choice, sampling, self.tokenizer_info)


def request_seed(seed: int, sample_id: int) -> int:
    """The seed of one request: 31 bits, which every server accepts."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{sample_id}".encode()).digest()[:4], "big") >> 1


def sampling_options(
    sampling: Sampling, server: Capabilities, tokenizer_info: TokenizerInfo
) -> dict[str, Any]:
    """The sampling settings as options of a request. All are sent, because servers have their own defaults.

    Raises:
        ConfigError: the server does not support a setting.
    """
    names = OPTION_NAMES[server.kind]
    if faults := unsupported(sampling, names, f"a server of kind {server.kind}"):
        raise ConfigError(*faults)
    options: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        **{option: getattr(sampling, name) for name, option in names.items()},
        **FIXED_OPTIONS[server.kind],
    }
    if server.kind == "llama.cpp":
        return options | {"return_tokens": True, **({"n_probs": 1} if sampling.logprobs else {})}
    if server.kind == "vllm":
        options["stop_token_ids"] = list(tokenizer_info.eos_ids)
    if server.token_ids:
        options["return_token_ids"] = True
    return options | ({"logprobs": 1} if sampling.logprobs else {})


def unsupported(sampling: Sampling, names: Mapping[str, str], backend: str) -> list[Fault]:
    """A fault for each setting that a backend does not support.

    Args:
        sampling: the requested settings.
        names: the settings beyond temperature, top_p and max_tokens that it supports.
        backend: its name in messages.
    """
    default = Sampling()
    faults = [
        Fault(
            f"engine.sampling.{name}",
            f"is not supported by {backend}",
            got=str(getattr(sampling, name)),
            allowed=str(getattr(default, name)),
            hint="Use engine: {kind: transformers}, or leave it out.",
        )
        for name in ("top_k", "min_p", "min_tokens", "repetition_penalty", "no_repeat_ngram_size")
        if name not in names and getattr(sampling, name) != getattr(default, name)
    ]
    changed = [
        name
        for name in ("top_k", "top_p", "min_p", "repetition_penalty")
        if getattr(sampling, name) != getattr(default, name)
    ]
    if sampling.logprobs and (changed or sampling.temperature not in (0.0, 1.0)):
        faults.append(
            Fault(
                "engine.sampling.logprobs",
                f"{backend} returns the log-probabilities of the model, not of the sampling distribution",
                allowed="temperature 1 (or 0), and no top_k, top_p, min_p or repetition_penalty",
                got=", ".join(f"{name} {getattr(sampling, name)}" for name in ("temperature", *changed)),
            )
        )
    return faults


def from_ids(choice: CompletionChoice, sampling: Sampling, tokenizer_info: TokenizerInfo) -> Completion:
    """The sampled tokens up to and including the end-of-sequence token.

    A server may stop at an end-of-sequence token of its own; it is replaced by the student's.

    Raises:
        ValueError: the completion is empty.
        EngineError: the server stopped it early, or returned no log-probabilities.
    """
    ids, logprobs = choice.token_ids, choice.logprobs
    if not ids:
        raise ValueError("a completion without tokens")
    if sampling.logprobs and (logprobs is None or len(logprobs) != len(ids)):
        raise EngineError(
            f"the server returned {len(logprobs or ())} log-probabilities for {len(ids)} tokens (llama.cpp "
            "has none for tokens that are part of a character). Set sampling.logprobs: false, or use vLLM."
        )
    end = next((at for at, token in enumerate(ids) if token in tokenizer_info.eos_ids), None)
    if end is not None:
        ids = ids[: end + 1]
    elif _finished(choice):
        ids = (*ids[:-1], tokenizer_info.eos_ids[0])
    elif len(ids) < sampling.max_tokens:
        raise EngineError(
            f"the server stopped after {len(ids)} of max_tokens={sampling.max_tokens} tokens: with its "
            "prompt the response fills the server's context. Start the server with a longer one "
            "(--max-model-len of vLLM, --ctx-size of llama.cpp, which its slots share), or lower "
            "data.max_prompt or max_tokens."
        )
    finished = ids[-1] in tokenizer_info.eos_ids
    return Completion(ids, finished, logprobs[: len(ids)] if sampling.logprobs and logprobs else None)


def from_text(choice: CompletionChoice, sampling: Sampling, tokenizer_info: TokenizerInfo) -> Completion:
    """The text tokenised with the student's tokenizer, truncated to `max_tokens`.

    Raises:
        ValueError: the completion is empty.
        EngineError: the server stopped it early.
    """
    finished = _finished(choice)
    texts = TextTokenizer(tokenizer_info.tokenizer)
    ids = texts.continuation(texts.guard(choice.text))
    if finished:
        ids.append(tokenizer_info.eos_ids[0])
    if not ids:
        raise ValueError("a completion without text")
    fits = len(ids) <= sampling.max_tokens
    return Completion(tuple(ids[: sampling.max_tokens]), finished and fits)


def _finished(choice: CompletionChoice) -> bool:
    if choice.finish_reason not in ("stop", "length"):
        raise EngineError(
            f"the server stopped a response because of {choice.finish_reason!r}, not at its end or at "
            "max_tokens. It may filter content or have been shut down."
        )
    return choice.finish_reason == "stop"


def _to_json(completion: Completion) -> list[Any]:
    return [list(completion.token_ids), completion.finished, completion.logprobs]


def _from_json(row: Sequence[Any], vocab: int | None, max_tokens: int) -> Completion:
    """What `_to_json` was given.

    Raises:
        InvalidAnswer, TypeError, ValueError: it was given something else, or damaged since.
    """
    ids, finished, logprobs = row
    token_ids = checked_ids(ids, "token_ids", vocab, max_tokens)
    if not token_ids or type(finished) is not bool:
        raise ValueError("no completion")
    if logprobs is not None:
        logprobs = checked_sampled_logprobs(logprobs, "logprobs", len(token_ids))
    return Completion(token_ids, finished, logprobs)
