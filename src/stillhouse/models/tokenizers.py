"""Do student and teacher speak the same token ids?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from stillhouse.errors import ModelError


def check_same_tokenizer(student: Any, teacher: Any) -> int:
    """The number of token ids that both have.

    Heads of different height are no difference: they are padded, and the loss looks at shared ids only.

    Raises:
        ModelError: the same id means different text; a loss over ids would be silently wrong.
    """
    found = difference(student, teacher)
    if found is None:
        return len(student.get_vocab())
    raise ModelError(
        f"student and teacher have different tokenizers: {found}. A loss over token ids would compare "
        "different tokens. Use objective uld, span or transport, or a teacher with the student's tokenizer; "
        "a student of the teacher's family, or one that starts from the teacher (student.from_teacher), has "
        "it."
    )


def difference(student: Any, teacher: Any) -> str | None:
    """In which tokens two tokenizers differ; None if every id means the same to both."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return None
    differing = [token for token, index in ours.items() if theirs.get(token) != index]
    extra = len(theirs.keys() - ours.keys())
    facts = []
    if differing:
        example = ", ".join(
            f"{token!r} is {ours[token]} for the student, {theirs.get(token)} for the teacher"
            for token in differing[:3]
        )
        facts.append(
            f"{len(differing):,} of the student's {len(ours):,} tokens have another id or none with the "
            f"teacher ({example})"
        )
    if extra:
        facts.append(f"{extra:,} of the teacher's {len(theirs):,} tokens are none of the student's")
    return "; ".join(facts)


def tokenizer_digest(vocabulary: Mapping[str, int]) -> str:
    """16 hexadecimal digits that change with which id is which token."""
    rows = sorted((index, token) for token, index in vocabulary.items())
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
