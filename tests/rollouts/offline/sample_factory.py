"""Samples made by hand."""

from __future__ import annotations

from typing import Any

from stillhouse.core.types import Prompt, Response, Source
from stillhouse.rollouts.offline.samples import Sample


def sample(
    text: str,
    number: int = 0,
    *,
    prompt: str = "A question?",
    source: Source = "teacher",
    tokens: int = 4,
    finished: bool = True,
    scores: dict[str, float] | None = None,
    **more: Any,
) -> Sample:
    given = Prompt(f"train:{number + 1}", (2, 3, 4), "", fields={"prompt": prompt}, **more)
    response = Response(given, tuple(range(2, 2 + tokens)), source, finished)
    return Sample(number, response, text, source, scores or {})


def samples(*texts: str, **more: Any) -> list[Sample]:
    return [sample(text, number, **more) for number, text in enumerate(texts)]
