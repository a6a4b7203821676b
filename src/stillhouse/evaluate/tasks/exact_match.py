"""Exact match with accepted answers."""

from __future__ import annotations

import re
import string
from typing import Any, Literal

from stillhouse.evaluate.tasks.base import REGISTRY
from stillhouse.evaluate.tasks.prompts import EvalExample, ScoredTask, Scores


@REGISTRY.register
class ExactMatch(ScoredTask):
    """Share (0 to 1) of responses that equal one of the accepted answers.

    Accepted are the texts in the row's field `accept`, or else its references. Case, ASCII punctuation and
    white space are ignored unless `strict` is set.

    Example: `evaluate: {tasks: [{kind: exact_match, data: instruction_induction_eval.jsonl}]}`
    """

    kind: Literal["exact_match"] = "exact_match"
    accept: str = "accept"
    """The field of a row that lists the accepted answers."""
    strict: bool = False
    """Compare texts as they are, except for leading and trailing white space."""
    first_line: bool = False
    """Score only the first line of a response, for models that continue with another example."""

    def score(self, example: EvalExample, response: str) -> Scores:
        """1 or 0."""
        answers: Any = example.row.get(self.accept)
        accepted = [answers] if isinstance(answers, str) else answers or example.prompt.references
        if self.first_line:
            response = response.strip().split("\n", 1)[0]
        if self.strict:
            return {"exact_match": float(response.strip() in [str(answer).strip() for answer in accepted])}
        return {
            "exact_match": float(normalized(response) in [normalized(str(answer)) for answer in accepted])
        }

    def score_settings(self) -> dict[str, Any]:
        """How texts were compared."""
        return {"exact_match": "strict" if self.strict else "ignoring case, punctuation and white space"}


PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")


def normalized(text: str) -> str:
    """The text in lower case, without ASCII punctuation, with single spaces."""
    return " ".join(PUNCTUATION.sub(" ", text.lower()).split())
