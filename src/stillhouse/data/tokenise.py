"""From rows to token ids: a template with a tokenizer, and the rules for rows that are too long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from stillhouse.config import StrictConfig
from stillhouse.data.rows import Row
from stillhouse.data.templates import Template, Tokenizer


class Encoder:
    """Turns rows into token ids with a template and a tokenizer.

    Prompt and response are tokenised separately, each once, and concatenated as ids; decoded text is never
    tokenised again. A response ends with the template's end-of-turn token.

    Example:
        >>> encoder = Encoder(Alpaca(), tokenizer)
        >>> encoder.encode([row])
        [("Below is ...", (21, 33), (7, 2))]
    """

    def __init__(self, template: Template, tokenizer: Tokenizer, teacher: Encoder | None = None) -> None:
        """An encoder for a tokenizer.

        Args:
            template: renders rows; resolved for the tokenizer.
            tokenizer: the student's.
            teacher: the teacher's encoder, if its tokenizer is another one.
        """
        self.template = template.resolved(tokenizer)
        self.tokenizer = tokenizer
        self.teacher = teacher
        self.end_id = self.template.end_id(tokenizer)

    def encode(self, rows: Sequence[Row]) -> list[tuple[str, tuple[int, ...], tuple[int, ...] | None]]:
        """For each row: the prompt's text, its ids, and the response's ids with the end token, or None."""
        prompts = [self.template.prompt(row, self.tokenizer) for row in rows]
        with_response = [index for index, row in enumerate(rows) if row.response is not None]
        texts = [self.template.response(rows[i], prompts[i], self.tokenizer) for i in with_response]
        ids = dict(zip(with_response, self._ids(texts, special=False), strict=True))
        return [
            (prompt, tuple(prompt_ids), (*ids[index], self.end_id) if index in ids else None)
            for index, (prompt, prompt_ids) in enumerate(zip(prompts, self.prompt_ids(prompts), strict=True))
        ]

    def prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """The ids of rendered prompts, without an end-of-sequence token that the tokenizer may append."""
        end = self.tokenizer.eos_token_id
        special = self.template.special_tokens
        encoded = self._ids(prompts, special=special)
        return [ids[:-1] if special and ids and ids[-1] == end else ids for ids in encoded]

    def teacher_ids(self, row: Row) -> tuple[int, ...] | None:
        """The prompt of a row in the teacher's template and ids; None if they are the student's."""
        if self.teacher is None:
            return None
        text = self.teacher.template.prompt(row, self.teacher.tokenizer)
        return tuple(self.teacher.prompt_ids([text])[0])

    def text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of plain texts, without special tokens."""
        return self._ids(texts, special=False)

    def _ids(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
        return [list(ids) for ids in encoded]


class TooLong(StrictConfig):
    """What happens to a row that is longer than `max_prompt` or `max_response`."""

    prompt: Literal["drop", "truncate_left", "truncate_right"] = "drop"
    """`truncate_left` removes the beginning and `truncate_right` the end of the last message, the input, or
    else the instruction. The text of the template is never truncated; a row that still does not fit is
    dropped."""
    response: Literal["drop", "truncate"] = "truncate"
    """`truncate` keeps the first `max_response` tokens, without an end-of-sequence token: a truncated
    response must not teach the student to stop there."""


def truncate_prompt(
    row: Row, encoder: Encoder, limit: int, side: Literal["truncate_left", "truncate_right"]
) -> tuple[Row, str, tuple[int, ...]] | None:
    """The row with the longest part of its `user_text` for which the prompt has at most `limit` tokens.

    The user text is truncated, not the rendered prompt; bisection over the number of characters kept.

    Returns:
        The row, its prompt and the prompt's ids; None if not one character fits.
    """
    whole = row.user_text
    best: tuple[Row, str, tuple[int, ...]] | None = None
    low, high = 1, len(whole) - 1
    while low <= high:
        keep = (low + high) // 2
        kept = whole[-keep:] if side == "truncate_left" else whole[:keep]
        truncated = row.with_user_text(kept)
        text = encoder.template.prompt(truncated, encoder.tokenizer)
        ids = tuple(encoder.prompt_ids([text])[0])
        if len(ids) <= limit:
            best, low = (truncated, text, ids), keep + 1
        else:
            high = keep - 1
    return best


def truncate_response(
    ids: tuple[int, ...], limit: int, rule: Literal["drop", "truncate"], counts: Counter[str]
) -> tuple[int, ...] | None:
    """A response of at most `limit` tokens, or None to drop it; counts "response" if it truncates."""
    if len(ids) <= limit:
        return ids
    if rule == "drop":
        return None
    counts["response"] += 1
    return ids[:limit]
