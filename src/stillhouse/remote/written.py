"""What a server wrote, taken out of the two kinds of answer that servers give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TOKEN_ID = "token_id:"
"""vLLM writes tokens as token_id:17 when asked to."""


@dataclass(frozen=True, slots=True)
class Written:
    """One answer.

    Example: `Written(text="Fig", ended="stop", ids=(41, 2), logprobs=(-0.3, -0.1))`
    """

    text: str
    ended: str
    """Why it ended there: "stop" (an end token), "length", or whatever else the server says."""
    ids: tuple[int, ...] | None = None
    """The tokens that were sampled, the server's end token included; None if it does not tell."""
    logprobs: tuple[float, ...] | None = None
    """Their log-probabilities (nats) under the model, before temperature and limits."""


def from_choice(reply: Mapping[str, Any]) -> Written:
    """An answer of /v1/completions. Ids are vLLM's `token_ids`; OpenAI's interface has none."""
    choice = reply["choices"][0]
    ids, found = choice.get("token_ids"), choice.get("logprobs") or {}
    values = found.get("token_logprobs")
    return Written(
        choice["text"],
        str(choice["finish_reason"]),
        None if ids is None else tuple(int(token) for token in ids),
        None if values is None else tuple(float(value) for value in values),
    )


def from_llama_cpp(reply: Mapping[str, Any]) -> Written:
    """An answer of llama.cpp's own /completion.

    Its /v1/completions tells ids with log-probabilities only, and leaves out tokens whose bytes make no whole
    character.
    """
    kinds = {"eos": "stop", "limit": "length"}
    found = reply.get("completion_probabilities")
    return Written(
        reply["content"],
        kinds.get(reply["stop_type"], str(reply["stop_type"])),
        tuple(int(token) for token in reply["tokens"]),
        None if found is None else tuple(float(token["logprob"]) for token in found),
    )
