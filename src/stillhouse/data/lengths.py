"""What happens to rows that are too long: one stated rule for prompts, one for responses, both counted."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from stillhouse.config import StrictConfig
from stillhouse.data.rows import Row
from stillhouse.data.templates import Encoder


class TooLong(StrictConfig):
    """What to do with a row that is longer than `max_prompt` or `max_response`."""

    prompt: Literal["drop", "truncate_left", "truncate_right"] = "drop"
    """`truncate_left` cuts the beginning and `truncate_right` the end of what is asked (the input where there
    is one, else the instruction or the last message). The words of the template are never cut; a row that
    does not fit even so is dropped."""
    response: Literal["drop", "truncate"] = "truncate"
    """`truncate` keeps the first `max_response` tokens, without an end-of-sequence token: a cut response must
    not teach the student to stop there."""


def shortened(
    row: Row, encoder: Encoder, limit: int, side: Literal["truncate_left", "truncate_right"]
) -> tuple[Row, str, tuple[int, ...]] | None:
    """The longest prompt of `limit` tokens at most keeping one side of what is asked, and its row, or None.

    The cut is made in the row's own text and the prompt rendered anew, by bisection on the characters kept.
    """
    words = row.asked()
    best: tuple[Row, str, tuple[int, ...]] | None = None
    low, high = 1, len(words) - 1
    while low <= high:
        keep = (low + high) // 2
        kept = words[-keep:] if side == "truncate_left" else words[:keep]
        asking = row.asking(kept)
        text = encoder.template.prompt(asking, encoder.tokenizer)
        ids = tuple(encoder.prompt_ids([text])[0])
        if len(ids) <= limit:
            best, low = (asking, text, ids), keep + 1
        else:
            high = keep - 1
    return best


def fit_response(
    ids: tuple[int, ...], limit: int, rule: Literal["drop", "truncate"], counts: Counter[str]
) -> tuple[int, ...] | None:
    """A response of at most `limit` tokens, or None if it is dropped; "response" is counted if it was cut."""
    if len(ids) <= limit:
        return ids
    if rule == "drop":
        return None
    counts["response"] += 1
    return ids[:limit]
