"""How the two tokenizers of a run split its responses, for people to look at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from stillhouse.core.alignment import UNALIGNED
from stillhouse.core.types import Prompt, Response
from stillhouse.data import load_data
from stillhouse.data.translate import Translator
from stillhouse.errors import DataError, ModelError
from stillhouse.runs.config import RunConfig
from stillhouse.runs.tokenizers import Translation, tokenizers


def align_responses(config: RunConfig, number: int) -> dict[str, Any]:
    """The first responses of data.train in both tokenizers, group by group.

    Returns:
        `samples`: for each response id, text, bytes, dropped (why it is not compared, or None) and groups,
        each with the tokens of student and teacher as JSON strings and their bytes; `summary`: shares and
        counts over the samples.

    Raises:
        ModelError: both models have the same tokenizer, or one cannot be read as bytes.
        DataError: there are no responses.
    """
    found = tokenizers(config)
    if found.same_ids:
        raise ModelError("student and teacher have the same tokenizer: their tokens are aligned one to one.")
    data = load_data(config.data, found.student, teacher=found.reads)
    translation = Translation.of(found, data, None)
    assert translation is not None
    assert translation.translator is not None
    translator = translation.translator
    prompts = [prompt for prompt in data.train if prompt.response_ids is not None][:number]
    if not prompts:
        raise DataError(f"{config.data.train.title}: has no response to align.")
    samples = [_sample(prompt, translator) for prompt in prompts]
    return {"samples": samples, "summary": _summary(samples, translator)}


def _sample(prompt: Prompt, translator: Translator) -> dict[str, Any]:
    assert prompt.response_ids is not None
    response = Response(prompt, prompt.response_ids, "fixed", prompt.response_finished)
    found = translator.translate(response)
    student_bytes = translator.student.pieces(response.token_ids)
    text = b"".join(student_bytes)
    sample: dict[str, Any] = {"id": prompt.id, "text": text.decode(errors="replace"), "bytes": len(text)}
    if isinstance(found, str):
        return {**sample, "dropped": found, "groups": []}
    teacher_bytes = translator.teacher.pieces(found.token_ids)
    student_tokens = _quoted(response.token_ids, student_bytes, translator.student.tokenizer)
    teacher_tokens = _quoted(found.token_ids, teacher_bytes, translator.teacher.tokenizer)
    groups = [
        {
            "student": _in_group(student_tokens, found.spans.student, group),
            "teacher": _in_group(teacher_tokens, found.spans.teacher, group),
            "bytes": sum(map(len, _in_group(student_bytes, found.spans.student, group))),
        }
        for group in range(found.spans.count)
    ]
    return {
        **sample,
        "dropped": None,
        "groups": groups,
        "student_tokens": len(found.spans.student),
        "teacher_tokens": len(found.spans.teacher),
        "unaligned_student_tokens": found.spans.student.count(UNALIGNED),
    }


def _in_group(items: Sequence[Any], groups: Sequence[int], group: int) -> list[Any]:
    return [item for item, number in zip(items, groups, strict=True) if number == group]


def _quoted(ids: Sequence[int], pieces: Sequence[bytes], tokenizer: Any) -> list[str]:
    """Each token's text in quotes; bytes that are no character as escapes; special tokens by name."""
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
    one_to_one = sum(len(group["student"]) == 1 == len(group["teacher"]) for group in groups)
    tokens = sum(sample.get("student_tokens", 0) for sample in samples)
    covered = sum(group["bytes"] for group in groups)
    matching = translator.vocabulary_match
    return {
        "responses": len(samples),
        "dropped": sum(sample["dropped"] is not None for sample in samples),
        "student_tokens": tokens,
        "teacher_tokens": sum(sample.get("teacher_tokens", 0) for sample in samples),
        "groups": len(groups),
        "share_of_student_tokens_one_to_one": round(one_to_one / max(1, tokens), 4),
        "share_of_bytes_covered": round(covered / max(1, sum(sample["bytes"] for sample in samples)), 4),
        "student_vocabulary": matching.sizes[0],
        "teacher_vocabulary": matching.sizes[1],
        "identical_tokens": int(matching.student.shape[0]),
    }
