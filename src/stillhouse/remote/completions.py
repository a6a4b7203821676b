"""The completions endpoint of a server: what it can do, and whether its token ids are the student's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from stillhouse.errors import EngineError, ModelError, StillhouseError
from stillhouse.remote.client import Client
from stillhouse.remote.server import Server
from stillhouse.remote.written import TOKEN_ID, Written, from_choice, from_llama_cpp

T = TypeVar("T")

Kind = Literal["vllm", "llama.cpp", "other"]

PROBES = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "def f(x):\n    return x ** 2  # naïve\n\n",
    "Größe: 1 024 €; 北京, здравствуйте 👋🏽",
    "  \t two  spaces\n\n\nand the end ",
    "3.14159265358979 isn't 22/7!?",
)
"""Texts on which tokenizers of different families differ."""


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a server can do, as it showed when it was asked.

    Example: `Abilities("vllm", id_prompts=True, ids=True, prompt_logprobs="prompt_logprobs")`
    """

    kind: Kind
    """Whose server it is; decides the names of sampling options beyond OpenAI's."""
    id_prompts: bool
    """It takes prompts as token ids."""
    ids: bool
    """It returns the ids of the tokens that it writes."""
    prompt_logprobs: Literal["prompt_logprobs", "echo"] | None
    """How it gives log-probabilities of a prompt's tokens, if it does."""
    context: int | None = None
    """Most tokens of prompt and response together; None if it does not say."""


class Completions:
    """A model on a server, asked through /v1/completions.

    Example:
        >>> completions = Completions(server, tokenizer, EngineError)
        >>> completions.abilities.prompt_logprobs
        'prompt_logprobs'
    """

    def __init__(
        self, server: Server, tokenizer: Any, failure: Callable[[str], StillhouseError] = EngineError
    ) -> None:
        """Ask the server for its model and abilities: two or three small requests.

        Args:
            server: where it is.
            tokenizer: the student's; None where no text will be exchanged or compared.
            failure: the error to raise when the server does not answer or refuses.

        Raises:
            EnvironmentFault: httpx or the key is missing.
            EngineError: (or `failure`) the server does not answer.
        """
        self.tokenizer = tokenizer
        self.client: Client = server.client(failure)
        self.model = server.served(self.client)
        self.abilities = self._probe()

    def body(self, prompt: str | Sequence[int], max_tokens: int, **more: Any) -> dict[str, Any]:
        """A request for one completion."""
        prompt = prompt if isinstance(prompt, str) else list(prompt)
        return {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, **more}

    def close(self) -> None:
        """Close the connections; the next request opens new ones."""
        self.client.close()

    def write(
        self, bodies: Sequence[Mapping[str, Any]], read: Callable[[Written], T]
    ) -> Iterator[tuple[int, T]]:
        """Ask for completions; (index, answer) as they come. See `Client.each`."""
        native = self.abilities.kind == "llama.cpp"
        taken = from_llama_cpp if native else from_choice
        return self.client.each(
            "/completion" if native else "completions", bodies, lambda reply: read(taken(reply))
        )

    def check_tokenizer(self) -> None:
        """Compare how server and student split a few texts into tokens.

        Where the server has no /tokenize, only the numbers of tokens can be compared.

        Raises:
            ModelError: they differ; both ways are in the message.
        """
        end = self.tokenizer.eos_token
        for text in (*PROBES, *([f"one{end}"] if end else [])):
            ours = self._ids(text)
            theirs = self._tokenized(text)
            if theirs is None:
                self._compare_numbers(text, len(ours))
            elif theirs != ours:
                raise ModelError(self._differs(text, ours, theirs))

    def _probe(self) -> Abilities:
        ids = self._ids(PROBES[0]) if self.tokenizer is not None else [5, 6, 7]
        kind, context = self._kind()
        plain = self.body(ids, 1, temperature=0.0)
        asked = {
            "logprobs": 1,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "prompt_logprobs": 1,
        }
        for more in (asked, {"logprobs": 1}, {}):
            choice = self.client.allowed("completions", {**plain, **more}, _first_choice)
            if choice is not None:
                told = _prompt_logprobs(choice, len(ids)) or self._echoes(plain, len(ids))
                ids_told = kind == "llama.cpp" or isinstance(choice.get("token_ids"), list)
                return Abilities(kind, True, ids_told, told, context)
        self.client.ask("completions", self.body(PROBES[0], 1))  # says why, if text is refused too
        return Abilities(kind, False, False, None, context)

    def _kind(self) -> tuple[Kind, int | None]:
        listed: Any = self.client.allowed("models")
        models = listed.get("data") if isinstance(listed, Mapping) else None
        if not isinstance(models, list) or not models:
            return "other", None
        model = next((m for m in models if m.get("id") == self.model), models[0])
        kinds: dict[Any, Kind] = {"vllm": "vllm", "llamacpp": "llama.cpp"}
        meta = model.get("meta") or {}
        return kinds.get(model.get("owned_by"), "other"), model.get("max_model_len") or meta.get("n_ctx")

    def _echoes(self, plain: Mapping[str, Any], length: int) -> Literal["echo"] | None:
        body = {**plain, "echo": True, "logprobs": 1, "return_tokens_as_token_ids": True}
        choice = self.client.allowed("completions", body, _first_choice)
        if choice is None:
            return None
        found = choice.get("logprobs") or {}
        tokens = found.get("tokens") or []
        told = len(tokens) >= length and all(str(token).startswith(TOKEN_ID) for token in tokens)
        return "echo" if told and found.get("top_logprobs") else None

    def _ids(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def _tokenized(self, text: str) -> list[int] | None:
        """The server's token ids of a text. The body has vLLM's names and llama.cpp's side by side."""
        body = {
            "model": self.model,
            "prompt": text,
            "add_special_tokens": False,
            "content": text,
            "add_special": False,
            "parse_special": True,
        }
        reply: Any = self.client.allowed("/tokenize", body)
        tokens = reply.get("tokens") if isinstance(reply, Mapping) else None
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            return None
        return tokens

    def _compare_numbers(self, text: str, ours: int) -> None:
        theirs = self.client.ask(
            "completions", self.body(text, 1), lambda reply: (reply.get("usage") or {}).get("prompt_tokens")
        )
        if theirs is not None and theirs - ours not in (0, 1):  # 1: a beginning of sequence
            raise ModelError(
                f"{self.client.url}: splits {text!r} into {theirs} tokens, the student's tokenizer into "
                f"{ours}. {WAY_OUT}"
            )

    def _differs(self, text: str, ours: list[int], theirs: list[int]) -> str:
        first = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
            min(len(ours), len(theirs)),
        )
        return (
            f"{self.client.url}: its token ids are not the student's. {text!r} is\n"
            f"  {self._shown(ours)} for the student's tokenizer and\n"
            f"  {theirs} on the server; they part at token {first}. {WAY_OUT}"
        )

    def _shown(self, ids: list[int]) -> str:
        return f"{ids} ({' '.join(map(repr, self.tokenizer.convert_ids_to_tokens(ids)))})"


WAY_OUT = (
    "A loss over token ids would compare different tokens. Serve a model whose tokenizer the student has, or "
    "choose a student of the served model's family; to train on its text alone (such as recipe seqkd), set "
    "retokenise: true."
)


def _first_choice(reply: Any) -> dict[str, Any]:
    return dict(reply["choices"][0])


def _prompt_logprobs(choice: Mapping[str, Any], length: int) -> Literal["prompt_logprobs"] | None:
    found = choice.get("prompt_logprobs")
    return "prompt_logprobs" if isinstance(found, list) and len(found) == length else None
