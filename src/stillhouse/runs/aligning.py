"""How the two tokenizers of a run cut its responses; for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from stillhouse.core.alignment import NOTHING
from stillhouse.core.types import Prompt, Response
from stillhouse.data import load_data
from stillhouse.data.translate import TranslatedResponse, Translator
from stillhouse.errors import DataError, ModelError
from stillhouse.runs.config import RunConfig
from stillhouse.runs.tokenizers import Translation, tokenizers


def aligned_samples(config: RunConfig, number: int) -> dict[str, Any]:
    """The first responses of data.train under both tokenizers, group by group, and how well they fit.

    Returns:
        `samples`: for each id, text, dropped (why it is not compared, or None) and groups, each with the
        tokens of student and teacher as JSON strings and their bytes; `summary`: shares and counts.

    Raises:
        ModelError: both models have the same tokenizer, or one cannot be read as bytes.
        DataError: there are no responses.
    """
    found = tokenizers(config)
    if found.teacher is None:
        raise ModelError("student and teacher have the same tokenizer: their tokens are aligned one to one.")
    data = load_data(config.data, found.student, teacher_tokenizer=found.teacher)
    translation = Translation.of(found, data, None)
    assert translation is not None
    translator = translation.translator
    chosen = [prompt for prompt in data.train if prompt.response_ids is not None][:number]
    if not chosen:
        raise DataError(f"{config.data.train.path}: has no response to align.")
    samples = [_sample(prompt, translator) for prompt in chosen]
    return {"samples": samples, "summary": _summary(samples, translator)}


def _sample(prompt: Prompt, translator: Translator) -> dict[str, Any]:
    assert prompt.response_ids is not None
    response = Response(prompt, prompt.response_ids, "fixed", prompt.response_finished)
    found = translator.translate(response)
    pieces = translator.student.pieces(response.token_ids)
    text = b"".join(pieces)
    sample: dict[str, Any] = {"id": prompt.id, "text": text.decode(errors="replace"), "bytes": len(text)}
    if isinstance(found, str):
        return {**sample, "dropped": found, "groups": []}
    theirs = translator.teacher.pieces(found.token_ids)
    ours = _shown(response.token_ids, pieces, translator.student.tokenizer)
    others = _shown(found.token_ids, theirs, translator.teacher.tokenizer)
    groups = [
        {
            "student": _of(ours, found.spans.student, group),
            "teacher": _of(others, found.spans.teacher, group),
            "bytes": sum(map(len, _of(pieces, found.spans.student, group))),
        }
        for group in range(found.spans.count)
    ]
    return {**sample, "dropped": None, "groups": groups, **_tokens(found)}


def _tokens(found: TranslatedResponse) -> dict[str, int]:
    return {
        "student_tokens": len(found.spans.student),
        "teacher_tokens": len(found.spans.teacher),
        "compared_with_nothing": found.spans.student.count(NOTHING),
    }


def _of(items: Sequence[Any], groups: Sequence[int], group: int) -> list[Any]:
    return [item for item, number in zip(items, groups, strict=True) if number == group]


def _shown(ids: Sequence[int], pieces: Sequence[bytes], tokenizer: Any) -> list[str]:
    """What a token spells, in quotes; bytes that are no character as such; special tokens by name."""
    shown = []
    for index, piece in zip(ids, pieces, strict=True):
        try:
            text = json.dumps(piece.decode(), ensure_ascii=False)
        except UnicodeDecodeError:
            text = "".join(f"\\x{byte:02x}" for byte in piece)
        shown.append(text if piece else str(tokenizer.convert_ids_to_tokens(index)))
    return shown


def _summary(samples: Sequence[dict[str, Any]], translator: Translator) -> dict[str, Any]:
    groups = [group for sample in samples for group in sample["groups"]]
    single = sum(len(group["student"]) == 1 == len(group["teacher"]) for group in groups)
    tokens = sum(sample.get("student_tokens", 0) for sample in samples)
    covered = sum(group["bytes"] for group in groups)
    matching = translator.vocabulary_match
    return {
        "responses": len(samples),
        "dropped": sum(sample["dropped"] is not None for sample in samples),
        "student_tokens": tokens,
        "teacher_tokens": sum(sample.get("teacher_tokens", 0) for sample in samples),
        "groups": len(groups),
        "share_of_student_tokens_one_to_one": round(single / max(1, tokens), 4),
        "share_of_bytes_covered": round(covered / max(1, sum(sample["bytes"] for sample in samples)), 4),
        "student_vocabulary": matching.sizes[0],
        "teacher_vocabulary": matching.sizes[1],
        "spelt_alike": int(matching.student.shape[0]),
    }
