"""Several responses to a prompt with a score for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from stillhouse.data.formats.base import RawRow, RowFormat, register
from stillhouse.data.formats.pair_answers import read_score
from stillhouse.data.formats.preference import PreferenceFormat
from stillhouse.data.formats.prompt_fields import is_detected
from stillhouse.data.formats.prompt_response import PromptResponseFormat
from stillhouse.data.formats.turns import is_turn
from stillhouse.data.formats.values import as_list, first_filled, is_blank, other_fields
from stillhouse.data.rows import Fields, Row
from stillhouse.errors import RowError

_PROMPT_FIELDS = ("prompt", "instruction", "question", "query")
_LISTS = ("responses", "completions")
_SCORE_LISTS = ("scores", "ratings")
_TEXT_KEYS = ("response", "completion", "text", "content", "output")
_SCORE_KEYS = ("score", "rating", "fine-grained_score", "overall_score")


class _Scored(NamedTuple):
    """Where a row has its responses and their scores."""

    field: str
    score_field: str | None
    responses: list[Any]
    scores: list[Any]


@register
class ScoredFormat(RowFormat):
    """A prompt with a list of responses and a score for each, in a list beside it or in the entries, as in
    UltraFeedback. The best response is the chosen one, the worst the rejected one (of equal scores the
    first), the difference of their scores the fact `margin`. Where all scores are equal there is no pair, and
    the first is the response."""

    name = "prompt/responses/scores"
    precedence = 7
    reads = (
        "`prompt` (or `instruction`, `question`, `query`), `responses` or `completions`, `scores` (or "
        "`ratings`, or in the entries `score`, `rating`, `fine-grained_score`, `overall_score`), `input`, "
        "`system`, `history`, `tools`"
    )
    example = '{"prompt": "A fruit?", "responses": ["Fig", "Carrot", "Stone"], "scores": [9, 4, 1]}'
    parsed = Row(
        "example",
        instruction="A fruit?",
        response="Fig",
        references=("Fig",),
        rejected="Stone",
        extra={"margin": 8.0},
    )

    def matches(self, raw: RawRow, fields: Fields) -> bool:
        return (
            is_detected(fields) and first_filled(raw, _PROMPT_FIELDS) is not None and _scored(raw) is not None
        )

    def read(self, raw: RawRow, fields: Fields, location: str) -> Row:
        question = first_filled(raw, _PROMPT_FIELDS)
        found = _scored(raw)
        assert question is not None
        assert found is not None
        if len(found.scores) != len(found.responses):
            raise RowError(
                location,
                f"{found.score_field!r} has {len(found.scores)} scores for the {len(found.responses)} "
                f"entries of {found.field!r}",
                "not a score for each response",
            )
        names = [f"{found.field}[{number}]" for number in range(len(found.responses))]
        scores = [
            read_score(score, f"score of {name}", location)
            for score, name in zip(found.scores, names, strict=True)
        ]
        for name, response in zip(names, found.responses, strict=True):
            if is_blank(response):
                raise RowError(location, f"{name!r} is blank", "blank response in a scored list")
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        rest = other_fields(raw, found.field, found.score_field)
        if best == worst:
            alone = {**rest, "response": found.responses[best]}
            return PromptResponseFormat().read(alone, Fields(prompt=question), location)
        margin = scores[best] - scores[worst]
        pair = {"chosen": found.responses[best], "rejected": found.responses[worst], "margin": margin}
        return PreferenceFormat().read({**rest, **pair}, fields, location)


def _scored(raw: RawRow) -> _Scored | None:
    """The responses of a row with their scores; None if it has none."""
    name = first_filled(raw, _LISTS)
    entries = as_list(raw[name]) if name is not None else None
    if name is None or not isinstance(entries, list) or not entries:
        return None
    beside = first_filled(raw, _SCORE_LISTS)
    scores = as_list(raw[beside]) if beside is not None else None
    if isinstance(scores, list):
        return _Scored(name, beside, [_response(entry) for entry in entries], scores)
    key = next((key for key in _SCORE_KEYS if _has(entries[0], key)), None)
    if key is None:
        return None
    scores = [entry.get(key) if isinstance(entry, Mapping) else None for entry in entries]
    return _Scored(name, None, [_response(entry) for entry in entries], scores)


def _has(entry: Any, key: str) -> bool:
    return isinstance(entry, Mapping) and not is_blank(entry.get(key))


def _response(entry: Any) -> Any:
    """The response of an entry: itself, or what it holds under the usual names."""
    if not isinstance(entry, Mapping) or is_turn(entry):
        return entry
    return next((entry[key] for key in _TEXT_KEYS if key in entry), entry)
