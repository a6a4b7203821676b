"""Privileged context: what a teacher reads of a row and the student does not."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator
from pydantic_core import PydanticCustomError

from stillhouse.core.images import without_images
from stillhouse.core.requirements import MAIN
from stillhouse.data.conversation import reasoning_of
from stillhouse.data.rows import Row
from stillhouse.errors import RowError

PROMPT = "prompt"
"""The placeholder that every context needs: the text of the prompt itself."""


def _response(row: Row) -> str | None:
    return row.response if not row.completion else str(row.completion[-1]["content"])


def _reasoning(row: Row) -> str | None:
    return "\n".join(filter(None, (reasoning_of(turn)[0] for turn in row.completion))) or None


PARTS: Mapping[str, Callable[[Row], str | None]] = {
    PROMPT: lambda row: row.user_text,
    "response": _response,
    "reasoning": _reasoning,
}
"""What a context may show beside the row's columns, by placeholder."""
OTHER = "other_"
"""The beginning of placeholders that show a part of another row."""

NO_ROW_BEFORE = "no row before it for the teacher's context"
"""The reason of a first row that is always dropped where contexts show the one before."""


def in_context(context: str, row: Row, before: Row | None) -> Row:
    """The row with the context in the place of its prompt's text.

    Example: `in_context("{prompt}\\nHint: {response}", row, None)`

    Args:
        context: a format string.
        row: the row.
        before: the row before it that has a response, which "other_" placeholders show.

    Raises:
        RowError: the row has not what the context shows.
    """
    names = {name for _, name, _, _ in string.Formatter().parse(context) if name is not None}
    return row.with_user_text(context.format(**{name: _value(name, row, before) for name in names}))


def _value(name: str, row: Row, before: Row | None) -> str:
    shown: Row | None = row
    found: Any
    if name in PARTS:
        found = PARTS[name](row)
    elif name.removeprefix(OTHER) in PARTS and name.startswith(OTHER):
        shown, found = before, None if before is None else PARTS[name.removeprefix(OTHER)](before)
        found = found and without_images(found)
    else:
        found = row.extra.get(name)
    if isinstance(found, str | int | float) and not isinstance(found, bool) and str(found).strip():
        return str(found)
    if shown is None:
        problem = f"data.teacher_context shows {{{name}}}, but no row with a response comes before this one"
        raise RowError(row.location, problem, NO_ROW_BEFORE)
    there = ", ".join(sorted((*PARTS, *row.extra)))
    problem = (
        f"data.teacher_context shows {{{name}}}, of which the row has no text (got {found!r}); there are: "
        f"{there}. Add the column, or leave out such rows and count them: data.bad_rows: drop"
    )
    raise RowError(row.location, problem, f"no {name} for the teacher's context")


def _checked(contexts: Mapping[str, str]) -> Mapping[str, str]:
    for teacher, context in contexts.items():
        try:
            parsed = list(string.Formatter().parse(context))
        except ValueError as error:
            raise PydanticCustomError("context", "{problem}", {"problem": str(error)}) from error
        if any(spec or conversion for _, _, spec, conversion in parsed):
            raise PydanticCustomError("context", "may have names of columns in braces, nothing else")
        names = [name for _, name, _, _ in parsed if name is not None]
        if PROMPT not in names:
            raise PydanticCustomError(
                "context",
                "must contain {placeholder} (context of {teacher}), got {context}",
                {"placeholder": "{prompt}", "teacher": teacher, "context": repr(context)},
            )
        if not all(name.isidentifier() for name in names):
            raise PydanticCustomError(
                "context", "may have names in braces, got {names}", {"names": ", ".join(map(repr, names))}
            )
    return contexts


TeacherContexts = Annotated[
    dict[str, str],
    BeforeValidator(lambda value: {MAIN: value} if isinstance(value, str) else value),
    AfterValidator(_checked),
]
"""The annotation of a config field with the context of each teacher."""
