"""Answers that are right or wrong by their words."""

from __future__ import annotations

import re
import string
from typing import Any, Literal

from stillhouse.evaluate.tasks.base import REGISTRY, Question, Scores, Task


@REGISTRY.register
class ExactMatch(Task):
    """The share (0 to 1) of answers that equal one of the accepted ones.

    Accepted are the texts under `accept` in the row, or else its references. Case, ASCII punctuation and
    white space do not count unless `strict` is set.

    Example: `evaluate: {tasks: [{kind: exact_match, data: instruction_induction_eval.jsonl}]}`
    """

    kind: Literal["exact_match"] = "exact_match"
    accept: str = "accept"
    """The field of a row with the list of accepted answers."""
    strict: bool = False
    """Compare texts as they are, but for white space at their ends."""
    first_line: bool = False
    """Take the first line of an answer only, for models that go on with another example."""

    def score(self, question: Question, text: str) -> Scores:
        """1 or 0."""
        given: Any = question.facts.get(self.accept)
        accepted = [given] if isinstance(given, str) else given or question.prompt.references
        if self.first_line:
            text = text.strip().split("\n", 1)[0]
        if self.strict:
            return {"exact_match": float(text.strip() in [str(one).strip() for one in accepted])}
        return {"exact_match": float(normal(text) in [normal(str(one)) for one in accepted])}

    def about(self) -> dict[str, Any]:
        """How texts were compared."""
        return {"exact_match": "as they are" if self.strict else "without case, punctuation and white space"}


PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")


def normal(text: str) -> str:
    """Lower case, without ASCII punctuation, with single spaces."""
    return " ".join(PUNCTUATION.sub(" ", text.lower()).split())
