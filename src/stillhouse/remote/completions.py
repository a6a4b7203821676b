"""A model behind /v1/completions: what its server can do, what it generates, and how it tokenises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from stillhouse.errors import ModelError
from stillhouse.remote.answers import (
    InvalidAnswer,
    check_sent_back,
    check_whole_text,
    checked_ids,
    checked_position,
    checked_sampled_logprobs,
    checked_text,
    only_choice,
)
from stillhouse.remote.config import ServerConnection

T = TypeVar("T")

ServerKind = Literal["vllm", "llama.cpp", "other"]
PromptLogprobsFormat = Literal["prompt_logprobs", "echo"]
"""vLLM's own field, or OpenAI's `echo` with `logprobs`."""
PromptLogprobs = Sequence[Mapping[int, float]]
"""For each position of a prompt: token id -> log-probability (nats), of the most probable tokens and the
prompt's own. Empty for the first position, which nothing predicts."""

TOKEN_ID = "token_id:"
"""vLLM writes tokens as token_id:17 when `return_tokens_as_token_ids` is set."""

PROBE_TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "def f(x):\n    return x ** 2  # naïve\n\n",
    "Größe: 1 024 €; 北京, здравствуйте 👋🏽",
    "  \t two  spaces\n\n\nand the end ",
    "3.14159265358979 isn't 22/7!?",
)
"""Texts on which tokenizers of different families differ."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a server can do, as a few small requests showed.

    Example: `Capabilities("vllm", token_prompts=True, token_ids=True, prompt_logprobs="prompt_logprobs")`
    """

    kind: ServerKind
    """Decides the names of sampling options beyond OpenAI's."""
    token_prompts: bool
    """It takes prompts as token ids."""
    token_ids: bool
    """It returns the ids of the tokens that it samples."""
    prompt_logprobs: PromptLogprobsFormat | None
    """How it gives log-probabilities of a prompt's tokens, if it does."""
    alternatives: bool = False
    """Whether it gives those of other tokens than the prompt's own too, with their ids."""
    context: int | None = None
    """Most tokens of prompt and completion together; None if it does not say."""


@dataclass(frozen=True, slots=True)
class CompletionChoice:
    """One completion as a server returns it.

    Example: `CompletionChoice("Fig", finish_reason="stop", token_ids=(41, 2), logprobs=(-0.3, -0.1))`
    """

    text: str
    finish_reason: str
    """"stop" (an end token), "length", or whatever else the server says."""
    token_ids: tuple[int, ...] | None = None
    """The tokens that were sampled, the server's end token included; None if it does not return them."""
    logprobs: tuple[float, ...] | None = None
    """Their log-probabilities (nats) under the model, before temperature and truncation."""


class ServedModel:
    """A model on a server, used through /v1/completions.

    Example:
        >>> served = ServedModel(ServerConnection(url="http://127.0.0.1:8000/v1"), tokenizer)
        >>> served.capabilities.prompt_logprobs
        'prompt_logprobs'
    """

    def __init__(self, server: ServerConnection, tokenizer: Any) -> None:
        """Ask the server for its model and capabilities: two or three small requests.

        Args:
            server: where it is.
            tokenizer: the student's; None where no text will be exchanged or compared.

        Raises:
            EnvironmentFault: a package or the key is missing.
            ServerError: the server does not answer.
        """
        self.tokenizer = tokenizer
        self.client = server.client()
        self.name = server.model_name(self.client)
        self.capabilities = self._probe()

    def request_body(self, prompt: str | Sequence[int], max_tokens: int, **options: Any) -> dict[str, Any]:
        """The body of a request for one completion."""
        prompt = prompt if isinstance(prompt, str) else list(prompt)
        return {"model": self.name, "prompt": prompt, "max_tokens": max_tokens, **options}

    def complete(
        self, bodies: Sequence[Mapping[str, Any]], parse: Callable[[CompletionChoice], T]
    ) -> Iterator[tuple[int, T]]:
        """Request completions; (index, result) as they arrive. See `Client.request_many`.

        Raises:
            ServerError: an answer is not one to what was asked: ids that the tokenizer does not have, more
                tokens than `max_tokens`, log-probabilities that are none, another prompt.
        """
        native = self.capabilities.kind == "llama.cpp"
        read = parse_llama_cpp_completion if native else parse_completion
        vocab = vocab_size(self.tokenizer)

        def checked(reply: Any, body: Mapping[str, Any]) -> T:
            check_sent_back(reply, body["prompt"])
            return parse(read(reply, vocab, body["max_tokens"]))

        return self.client.exchange("/completion" if native else "completions", bodies, checked)

    def close(self) -> None:
        """Close the connections; the next request opens new ones."""
        self.client.close()

    def check_tokenizer(self) -> None:
        """Compare how server and student tokenise a few texts.

        Where the server has no /tokenize, only the numbers of tokens can be compared.

        Raises:
            ModelError: they differ; both tokenisations are in the message.
        """
        eos = self.tokenizer.eos_token
        for text in (*PROBE_TEXTS, *([f"one{eos}"] if eos else [])):
            ours = self._tokenize(text)
            theirs = self._tokenize_on_server(text)
            if theirs is None:
                self._compare_lengths(text, len(ours))
            elif theirs != ours:
                raise ModelError(self._difference(text, ours, theirs))

    def _probe(self) -> Capabilities:
        ids = self._tokenize(PROBE_TEXTS[0]) if self.tokenizer is not None else [5, 6, 7]
        kind, context = self._kind_and_context()
        plain = self.request_body(ids, 1, temperature=0.0)
        everything = {
            "logprobs": 1,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "prompt_logprobs": 1,
        }
        for options in (everything, {"logprobs": 1}, {}):
            choice = self.client.request_if_supported("completions", {**plain, **options}, _first_choice)
            if choice is not None:
                token_ids = kind == "llama.cpp" or isinstance(choice.get("token_ids"), list)
                return Capabilities(kind, True, token_ids, *self._logprobs_format(choice, plain), context)
        self.client.request("completions", self.request_body(PROBE_TEXTS[0], 1))  # raises if text fails too
        return Capabilities(kind, False, False, None, context=context)

    def _kind_and_context(self) -> tuple[ServerKind, int | None]:
        listed: Any = self.client.request_if_supported("models")
        models = [model for model in _field(listed, "data", list) or () if isinstance(model, dict)]
        if not models:
            return "other", None
        model = next((m for m in models if m.get("id") == self.name), models[0])
        kinds: dict[str, ServerKind] = {"vllm": "vllm", "llamacpp": "llama.cpp"}
        context = _field(model, "max_model_len", int) or _field(model.get("meta"), "n_ctx", int)
        return kinds.get(str(model.get("owned_by")), "other"), context

    def _logprobs_format(
        self, choice: Mapping[str, Any], plain: Mapping[str, Any]
    ) -> tuple[PromptLogprobsFormat | None, bool]:
        """How it gives log-probabilities of a prompt, and whether of other tokens than the prompt's too."""
        found, length = choice.get("prompt_logprobs"), len(plain["prompt"])
        if isinstance(found, list) and len(found) == length:
            return "prompt_logprobs", True
        body = {**plain, "echo": True, "logprobs": 1, "return_tokens_as_token_ids": True}
        echoed = self.client.request_if_supported("completions", body, _first_choice)
        logprobs = _field(echoed, "logprobs", dict)
        values = _field(logprobs, "token_logprobs", list) or []
        if len(values) not in (length, length + 1) or not any(type(one) is float for one in values[1:length]):
            return None, False
        tokens = _field(logprobs, "tokens", list) or []
        as_ids = len(tokens) >= length and all(str(token).startswith(TOKEN_ID) for token in tokens)
        return "echo", as_ids and bool(_field(logprobs, "top_logprobs", list))

    def _tokenize(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def _tokenize_on_server(self, text: str) -> list[int] | None:
        """The server's token ids of a text. The body has vLLM's names and llama.cpp's side by side."""
        body = {
            "model": self.name,
            "prompt": text,
            "add_special_tokens": False,
            "content": text,
            "add_special": False,
            "parse_special": True,
        }
        reply: Any = self.client.request_if_supported("/tokenize", body)
        tokens = _field(reply, "tokens", list)
        if tokens is None or not all(type(token) is int for token in tokens):
            return None
        return tokens

    def _compare_lengths(self, text: str, ours: int) -> None:
        theirs = self.client.request(
            "completions",
            self.request_body(text, 1),
            lambda reply: _field(reply.get("usage"), "prompt_tokens", int),
        )
        if theirs is not None and theirs - ours not in (0, 1):  # 1: a beginning of sequence
            raise ModelError(
                f"{self.client.url}: splits {text!r} into {theirs} tokens, the student's tokenizer into "
                f"{ours}. {WAY_OUT}"
            )

    def _difference(self, text: str, ours: list[int], theirs: list[int]) -> str:
        first = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
            min(len(ours), len(theirs)),
        )
        tokens = " ".join(map(repr, self.tokenizer.convert_ids_to_tokens(ours)))
        return (
            f"{self.client.url}: its token ids are not the student's. {text!r} is\n"
            f"  {ours} ({tokens}) for the student's tokenizer and\n"
            f"  {theirs} on the server; they part at token {first}. {WAY_OUT}"
        )


WAY_OUT = (
    "A loss over token ids would compare different tokens. Serve a model whose tokenizer the student has, or "
    "choose a student of the served model's family; to train on its text alone (such as recipe seqkd), set "
    "retokenise: true."
)


def parse_completion(
    reply: Mapping[str, Any], vocab: int | None = None, max_tokens: int | None = None
) -> CompletionChoice:
    """A response of /v1/completions. `token_ids` are vLLM's; OpenAI's API has none.

    Args:
        reply: the decoded JSON.
        vocab: token ids are below it; None: unknown.
        max_tokens: how many tokens were asked for at most; None: any number.

    Raises:
        KeyError, TypeError, ValueError: the response is incomplete.
        InvalidAnswer: it is not one to what was asked.
    """
    choice = only_choice(reply)
    ids, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
    token_ids = None if ids is None else checked_ids(ids, "choices[0].token_ids", vocab, max_tokens)
    if logprobs is not None and token_ids is not None:
        logprobs = checked_sampled_logprobs(logprobs, "choices[0].logprobs.token_logprobs", len(token_ids))
    return CompletionChoice(
        checked_text(choice["text"], "choices[0].text"),
        str(choice["finish_reason"]),
        token_ids,
        None if token_ids is None else logprobs,
    )


def parse_llama_cpp_completion(
    reply: Mapping[str, Any], vocab: int | None = None, max_tokens: int | None = None
) -> CompletionChoice:
    """A response of llama.cpp's own /completion.

    Its /v1/completions gives ids with log-probabilities only, and leaves out tokens whose bytes make no whole
    character; there may therefore be fewer log-probabilities than tokens.

    Args:
        reply: the decoded JSON.
        vocab: token ids are below it; None: unknown.
        max_tokens: how many tokens were asked for at most; None: any number.

    Raises:
        KeyError, TypeError, ValueError: the response is incomplete.
        InvalidAnswer: it is not one to what was asked.
    """
    reasons = {"eos": "stop", "limit": "length"}
    token_ids = checked_ids(reply["tokens"], "tokens", vocab, max_tokens)
    logprobs = reply.get("completion_probabilities")
    if logprobs is not None:
        values = [token["logprob"] for token in logprobs]
        logprobs = checked_sampled_logprobs(values, "completion_probabilities", len(values))
    return CompletionChoice(
        checked_text(reply["content"], "content"),
        reasons.get(reply["stop_type"], str(reply["stop_type"])),
        token_ids,
        logprobs,
    )


def parse_prompt_logprobs(
    reply: Mapping[str, Any],
    given_as: PromptLogprobsFormat,
    sequence: Sequence[int],
    k: int,
    vocab: int | None = None,
) -> PromptLogprobs:
    """The log-probabilities of a prompt's tokens in a /v1/completions response.

    Args:
        reply: the decoded JSON.
        given_as: how the server gives them.
        sequence: the token ids that were sent.
        k: how many of the most probable tokens were asked for; 0: none but the prompt's own.
        vocab: token ids are below it; None: unknown.

    Raises:
        KeyError, TypeError, ValueError: the response is incomplete.
        InvalidAnswer: it is not one to what was asked.
    """
    choice = only_choice(reply)
    check_sent_back(reply, list(sequence))
    field = "choices[0].prompt_logprobs"
    if given_as == "echo":
        field = "choices[0].logprobs"
        read = _echoed_positions if k else _echoed_labels
        positions = read(choice["logprobs"], sequence)
    else:
        positions = [
            [(_canonical_id(token), entry["logprob"]) for token, entry in (position or {}).items()]
            for position in choice["prompt_logprobs"]
        ]
    found = [
        checked_position(entries, f"{field}[{place}]", k, vocab) if entries else {}
        for place, entries in enumerate(positions)
    ]
    check_whole_text(found, sequence, field)
    return found


def _echoed_positions(logprobs: Mapping[str, Any], sequence: Sequence[int]) -> list[list[tuple[int, Any]]]:
    """OpenAI's `echo` of a sequence and the one token that was written after it."""
    count = len(sequence)
    columns = [logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs")]
    if len({len(column) for column in columns}) != 1 or len(columns[0]) not in (count, count + 1):
        raise InvalidAnswer(
            "choices[0].logprobs",
            f"has {', '.join(str(len(column)) for column in columns)} tokens, values and lists of "
            f"alternatives for {count} tokens sent",
        )
    positions = []
    for own, value, top in list(zip(*columns, strict=True))[:count]:
        entries = {_token_id(token): entry for token, entry in (top or {}).items()}
        positions.append(list(({_token_id(own): value} | entries).items()) if value is not None else [])
    return positions


def _echoed_labels(logprobs: Mapping[str, Any], sequence: Sequence[int]) -> list[list[tuple[int, Any]]]:
    """The values of the sequence's own tokens alone, from servers that write tokens as text too.

    A token that is written as an id has to be that of the sequence; of text only the place counts.
    """
    tokens, values = logprobs["tokens"], logprobs["token_logprobs"]
    if len(tokens) != len(values) or len(values) not in (len(sequence), len(sequence) + 1):
        raise InvalidAnswer(
            "choices[0].logprobs",
            f"has {len(tokens)} tokens and {len(values)} values for {len(sequence)} tokens sent",
        )
    own = [
        _token_id(text) if str(text).startswith(TOKEN_ID) else sent
        for text, sent in zip(tokens, sequence, strict=False)
    ]
    return [[] if value is None else [(one, value)] for one, value in zip(own, values, strict=False)]


def _token_id(token: str) -> int:
    if not token.startswith(TOKEN_ID):
        raise ValueError(f"{token!r} is no token id")
    return _canonical_id(token.removeprefix(TOKEN_ID))


def _canonical_id(text: str) -> int:
    number = int(text)
    if str(number) != text:
        raise ValueError(f"{text!r} is no token id")
    return number


def vocab_size(tokenizer: Any) -> int | None:
    """One more than the largest token id; None without a tokenizer."""
    return None if tokenizer is None else max(tokenizer.get_vocab().values(), default=-1) + 1


def _first_choice(reply: Any) -> dict[str, Any]:
    return dict(reply["choices"][0])


def _field(holder: Any, name: str, kind: type[T]) -> T | None:
    """A field of an optional part of an answer; None where it is not there or of another type."""
    value = holder.get(name) if isinstance(holder, Mapping) else None
    return value if type(value) is kind else None
