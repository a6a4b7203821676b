"""Generation by a model on an OpenAI-compatible server."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from stillhouse.core.types import Completion
from stillhouse.engines.base import (
    REGISTRY,
    EngineConfig,
    Finished,
    ProgressCall,
    Sampling,
    TokenizerFacts,
)
from stillhouse.engines.transformers import TransformersConfig
from stillhouse.errors import ConfigError, EngineError, Fault
from stillhouse.remote import Capabilities, CompletionChoice, ServedModel, ServerConnection
from stillhouse.remote.journal import Journal

OPTIONS: dict[str, dict[str, str]] = {
    "vllm": {
        "top_k": "top_k",
        "min_p": "min_p",
        "min_tokens": "min_tokens",
        "repetition_penalty": "repetition_penalty",
    },
    "llama.cpp": {"top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repeat_penalty"},
    "other": {},
}
"""What servers call the settings that are not in OpenAI's interface."""

ALWAYS: dict[str, dict[str, Any]] = {
    "vllm": {},
    # By default it draws at temperature 0.8 after the other limits, and looks back 64 tokens for repetitions.
    "llama.cpp": {
        "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
        "repeat_last_n": 65536,
    },
    "other": {},
}


@REGISTRY.register
class ServerConfig(EngineConfig, ServerConnection):
    """A model on an OpenAI-compatible server writes the teacher's text; the student's is written here.

    Prompts go out and responses come back as token ids, so that training sees what was sampled. vLLM (0.10.2
    or newer) and llama.cpp's server do that.

    Example: `engine: {kind: server, url: "http://127.0.0.1:8000/v1", sampling: {temperature: 0.8}}`
    """

    kind: Literal["server"] = "server"
    retokenise: bool = False
    """Exchange text instead of token ids, and tokenise the answers with the student's tokenizer: for servers
    that know no ids, and for teachers with another tokenizer. The tokens are then not quite those that were
    sampled; how many answers were made so is counted in the run folder."""
    student: TransformersConfig = TransformersConfig()
    """What writes the student's text, whose weights change here and not on the server."""

    @classmethod
    def of_teacher(cls, teacher: Any) -> ServerConfig:
        """The engine for a teacher on a server: the same server."""
        return cls(
            **{name: getattr(teacher, name) for name in (*ServerConnection.model_fields, "retokenise")}
        )

    def build(self, model: Any, facts: TokenizerFacts) -> ServerEngine:
        """The engine; what the server can do is found out now.

        Raises:
            ServerError: the server does not answer.
            EngineError: it gives no token ids and `retokenise` is off.
            ModelError: its token ids are not the student's.
        """
        return ServerEngine(connect(self, facts.tokenizer, self.retokenise), facts, self.retokenise)

    def for_student(self) -> EngineConfig:
        """`student`, with the sampling of this engine."""
        return self.student.model_copy(update={"sampling": self.sampling})


def connect(server: ServerConnection, tokenizer: Any, retokenise: bool) -> ServedModel:
    """A model on a server that generates responses as token ids, or as text with `retokenise`.

    Raises:
        ServerError: the server does not answer.
        EngineError: it gives no token ids.
        ModelError: its token ids are not the student's.
    """
    served = ServedModel(server, tokenizer)
    if retokenise:
        return served
    missing = [
        what
        for what, there in (
            ("takes no token ids as prompts", served.capabilities.token_prompts),
            ("does not return the ids of the tokens it writes", served.capabilities.token_ids),
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
    """Generates with one request for each prompt, many at a time.

    The seed of a request depends on the seed of the call and the prompt's number, so that the same call sends
    the same requests; servers batch requests as they come, so that their text may still differ in the last
    bits of rounding. Completions are kept in `journal`, if there is one, and never requested again.

    Example:
        >>> engine = ServerConfig(url="http://127.0.0.1:8000/v1").build(None, TokenizerFacts.of(tokenizer))
        >>> engine.generate([[5, 9, 12]], Sampling(max_tokens=20), seed=0)
    """

    def __init__(self, served: ServedModel, facts: TokenizerFacts, retokenise: bool = False) -> None:
        self.served = served
        self.facts = facts
        self.retokenise = retokenise
        self.journal: Journal | None = None
        self.retokenised = 0
        """Completions that came as text and were tokenised here."""
        self.reused = 0
        """Completions that were in the journal."""

    def keep(self, path: Path) -> None:
        """Keep completions in a file and look there first."""
        self.journal = Journal(path)

    def fingerprint(self) -> str:
        """A digest of the address and the model's name; weights on a server cannot be read."""
        name = f"server\n{self.served.client.url}\n{self.served.name}"
        return hashlib.sha256(name.encode()).hexdigest()[:32]

    def counts(self) -> dict[str, int]:
        """What was requested so far, for the run folder."""
        counts = dict(vars(self.served.client.usage), reused=self.reused)
        return counts | ({"retokenised": self.retokenised} if self.retokenise else {})

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seed: int,
        *,
        numbers: Sequence[int] | None = None,
        progress: ProgressCall | None = None,
    ) -> list[Completion]:
        """One completion for each prompt, in the order of the prompts; see `Engine.generate`.

        Raises:
            ConfigError: the server cannot sample so; the message names the setting.
            ServerError: it rejected a prompt, or did not answer within the retries. Completions that came
                before are in the journal.
            EngineError: it cut a completion for a reason of its own.
        """
        options = sampling_options(sampling, self.served.capabilities, self.facts)
        self._check_room(max(map(len, prompts), default=0), sampling)
        finish = Finished(len(prompts), progress)
        bodies = [
            self._body(prompt, options, seed_of(seed, index if numbers is None else numbers[index]))
            for index, prompt in enumerate(prompts)
        ]
        for index, completion in self._complete(bodies, sampling):
            finish(index, completion)
        return finish.in_order()

    def _check_room(self, longest: int, sampling: Sampling) -> None:
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
        text = (
            self.facts.tokenizer.decode(list(prompt), skip_special_tokens=False) if self.retokenise else None
        )
        return self.served.request_body(prompt if text is None else text, seed=seed, **options)

    def _complete(
        self, bodies: Sequence[dict[str, Any]], sampling: Sampling
    ) -> Iterator[tuple[int, Completion]]:
        missing = []
        for index, body in enumerate(bodies):
            known = None if self.journal is None else self.journal.get(body)
            if known is None:
                missing.append(index)
            else:
                self.reused += 1
                yield index, _unpacked(known)
        parse = self._parser(sampling)
        for place, completion in self.served.complete([bodies[index] for index in missing], parse):
            index = missing[place]
            if self.journal is not None:
                self.journal.put(bodies[index], _packed(completion))
            self.retokenised += self.retokenise
            yield index, completion

    def _parser(self, sampling: Sampling) -> Callable[[CompletionChoice], Completion]:
        parse = from_text if self.retokenise else from_ids
        return lambda choice: parse(choice, sampling, self.facts)


def seed_of(seed: int, number: int) -> int:
    """The seed of one request: 31 bits, which every server takes."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4], "big") >> 1


def sampling_options(sampling: Sampling, server: Capabilities, facts: TokenizerFacts) -> dict[str, Any]:
    """The settings as a server takes them. All are named, because servers have defaults of their own.

    Raises:
        ConfigError: the server has no such setting.
    """
    names = OPTIONS[server.kind]
    if faults := unsupported(sampling, names, f"a server of kind {server.kind}"):
        raise ConfigError(*faults)
    options: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        **{theirs: getattr(sampling, ours) for ours, theirs in names.items()},
        **ALWAYS[server.kind],
    }
    if server.kind == "llama.cpp":
        return options | {"return_tokens": True, **({"n_probs": 1} if sampling.logprobs else {})}
    if server.kind == "vllm":
        options["stop_token_ids"] = list(facts.eos_ids)
    if server.token_ids:
        options["return_token_ids"] = True
    return options | ({"logprobs": 1} if sampling.logprobs else {})


def unsupported(sampling: Sampling, names: Mapping[str, str], who: str) -> list[Fault]:
    """The settings that an engine cannot follow.

    Args:
        sampling: what is asked for.
        names: the settings beyond temperature, top_p and max_tokens that it knows.
        who: the engine, for people.
    """
    neutral = Sampling()
    faults = [
        Fault(
            f"engine.sampling.{name}",
            f"is nothing that {who} can do",
            got=str(getattr(sampling, name)),
            allowed=str(getattr(neutral, name)),
            hint="Let engine: {kind: transformers} write, or leave it out.",
        )
        for name in ("top_k", "min_p", "min_tokens", "repetition_penalty", "no_repeat_ngram_size")
        if name not in names and getattr(sampling, name) != getattr(neutral, name)
    ]
    bent = [
        name
        for name in ("top_k", "top_p", "min_p", "repetition_penalty")
        if getattr(sampling, name) != getattr(neutral, name)
    ]
    if sampling.logprobs and (bent or sampling.temperature not in (0.0, 1.0)):
        faults.append(
            Fault(
                "engine.sampling.logprobs",
                f"{who} gives the model's own log-probabilities, not those of the distribution drawn from",
                allowed="temperature 1 (or 0), and nothing that bends the distribution",
                got=", ".join(f"{name} {getattr(sampling, name)}" for name in ("temperature", *bent)),
            )
        )
    return faults


def from_ids(choice: CompletionChoice, sampling: Sampling, facts: TokenizerFacts) -> Completion:
    """The tokens that were sampled, up to and with the end token.

    A server may end a text with an end token of its own; the student's stands in its place.

    Raises:
        ValueError: the completion is empty.
        EngineError: the server cut it for a reason of its own, or gives no log-probabilities.
    """
    ids, logprobs = choice.token_ids, choice.logprobs
    if not ids:
        raise ValueError("a completion without tokens")
    if sampling.logprobs and (logprobs is None or len(logprobs) != len(ids)):
        raise EngineError(
            f"the server gave {len(logprobs or ())} log-probabilities for {len(ids)} tokens (llama.cpp has "
            "none for tokens that are part of a character). Set sampling.logprobs: false, or use vLLM."
        )
    end = next((place for place, token in enumerate(ids) if token in facts.eos_ids), None)
    if end is not None:
        ids = ids[: end + 1]
    elif _finished(choice):
        ids = (*ids[:-1], facts.eos_ids[0])
    elif len(ids) < sampling.max_tokens:
        raise EngineError(
            f"the server cut a text after {len(ids)} of max_tokens={sampling.max_tokens} tokens: with its "
            "prompt it fills the server's context. Start the server with a longer one (--max-model-len of "
            "vLLM, --ctx-size of llama.cpp, which its slots share), or lower data.max_prompt or max_tokens."
        )
    finished = ids[-1] in facts.eos_ids
    return Completion(ids, finished, logprobs[: len(ids)] if sampling.logprobs and logprobs else None)


def from_text(choice: CompletionChoice, sampling: Sampling, facts: TokenizerFacts) -> Completion:
    """The text, tokenised with the student's tokenizer; cut where that makes more than `max_tokens`.

    Raises:
        ValueError: the completion is empty.
        EngineError: the server cut it for a reason of its own.
    """
    finished = _finished(choice)
    ids = [int(token) for token in facts.tokenizer(choice.text, add_special_tokens=False)["input_ids"]]
    if finished:
        ids.append(facts.eos_ids[0])
    if not ids:
        raise ValueError("a completion without text")
    fits = len(ids) <= sampling.max_tokens
    return Completion(tuple(ids[: sampling.max_tokens]), finished and fits)


def _finished(choice: CompletionChoice) -> bool:
    if choice.finish_reason not in ("stop", "length"):
        raise EngineError(
            f"the server ended a text because of {choice.finish_reason!r}, and not at its end or at "
            "max_tokens. It may filter contents or have been stopped."
        )
    return choice.finish_reason == "stop"


def _packed(completion: Completion) -> list[Any]:
    return [list(completion.token_ids), completion.finished, completion.logprobs]


def _unpacked(row: Sequence[Any]) -> Completion:
    ids, finished, logprobs = row
    return Completion(tuple(ids), finished, None if logprobs is None else tuple(logprobs))
