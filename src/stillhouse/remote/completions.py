"""A model behind /v1/completions: what its server can do, what it generates, and how it tokenises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from stillhouse.errors import ModelError
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
        """Request completions; (index, result) as they arrive. See `Client.request_many`."""
        if self.capabilities.kind == "llama.cpp":
            return self.client.request_many(
                "/completion", bodies, lambda reply: parse(parse_llama_cpp_completion(reply))
            )
        return self.client.request_many("completions", bodies, lambda reply: parse(parse_completion(reply)))

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
                return Capabilities(kind, True, token_ids, self._logprobs_format(choice, plain), context)
        self.client.request("completions", self.request_body(PROBE_TEXTS[0], 1))  # raises if text fails too
        return Capabilities(kind, False, False, None, context)

    def _kind_and_context(self) -> tuple[ServerKind, int | None]:
        listed: Any = self.client.request_if_supported("models")
        models = listed.get("data") if isinstance(listed, Mapping) else None
        if not isinstance(models, list) or not models:
            return "other", None
        model = next((m for m in models if m.get("id") == self.name), models[0])
        kinds: dict[Any, ServerKind] = {"vllm": "vllm", "llamacpp": "llama.cpp"}
        meta = model.get("meta") or {}
        return kinds.get(model.get("owned_by"), "other"), model.get("max_model_len") or meta.get("n_ctx")

    def _logprobs_format(
        self, choice: Mapping[str, Any], plain: Mapping[str, Any]
    ) -> PromptLogprobsFormat | None:
        found, length = choice.get("prompt_logprobs"), len(plain["prompt"])
        if isinstance(found, list) and len(found) == length:
            return "prompt_logprobs"
        body = {**plain, "echo": True, "logprobs": 1, "return_tokens_as_token_ids": True}
        echoed = self.client.request_if_supported("completions", body, _first_choice) or {}
        logprobs = echoed.get("logprobs") or {}
        tokens = logprobs.get("tokens") or []
        as_ids = len(tokens) >= length and all(str(token).startswith(TOKEN_ID) for token in tokens)
        return "echo" if as_ids and logprobs.get("top_logprobs") else None

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
        tokens = reply.get("tokens") if isinstance(reply, Mapping) else None
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            return None
        return tokens

    def _compare_lengths(self, text: str, ours: int) -> None:
        theirs = self.client.request(
            "completions",
            self.request_body(text, 1),
            lambda reply: (reply.get("usage") or {}).get("prompt_tokens"),
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


def parse_completion(reply: Mapping[str, Any]) -> CompletionChoice:
    """A response of /v1/completions. `token_ids` are vLLM's; OpenAI's API has none.

    Raises:
        KeyError, TypeError, ValueError: the response is incomplete.
    """
    choice = reply["choices"][0]
    token_ids, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
    return CompletionChoice(
        choice["text"],
        str(choice["finish_reason"]),
        None if token_ids is None else tuple(int(token) for token in token_ids),
        None if logprobs is None else tuple(float(value) for value in logprobs),
    )


def parse_llama_cpp_completion(reply: Mapping[str, Any]) -> CompletionChoice:
    """A response of llama.cpp's own /completion.

    Its /v1/completions gives ids with log-probabilities only, and leaves out tokens whose bytes make no whole
    character.

    Raises:
        KeyError, TypeError, ValueError: the response is incomplete.
    """
    reasons = {"eos": "stop", "limit": "length"}
    logprobs = reply.get("completion_probabilities")
    return CompletionChoice(
        reply["content"],
        reasons.get(reply["stop_type"], str(reply["stop_type"])),
        tuple(int(token) for token in reply["tokens"]),
        None if logprobs is None else tuple(float(token["logprob"]) for token in logprobs),
    )


def parse_prompt_logprobs(choice: Mapping[str, Any], given_as: PromptLogprobsFormat) -> PromptLogprobs:
    """The log-probabilities of a prompt's tokens in one choice of a /v1/completions response.

    Raises:
        KeyError, TypeError, ValueError: the response is incomplete.
    """
    if given_as == "prompt_logprobs":
        return [
            {int(token): _logprob(entry["logprob"]) for token, entry in (position or {}).items()}
            for position in choice["prompt_logprobs"]
        ]
    found = choice["logprobs"]
    positions = zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
    return [
        {}
        if value is None
        else {_token_id(token): _logprob(entry) for token, entry in {own: value, **(top or {})}.items()}
        for own, value, top in positions
    ]


def _logprob(value: Any) -> float:
    number = float(value)
    if not number < 0.01:  # above 0 by rounding only; NaN is no answer to keep
        raise ValueError(f"{value!r} is no log-probability")
    return number


def _token_id(token: str) -> int:
    if not token.startswith(TOKEN_ID):
        raise ValueError(f"{token!r} is no token id")
    return int(token.removeprefix(TOKEN_ID))


def _first_choice(reply: Any) -> dict[str, Any]:
    return dict(reply["choices"][0])
