"""Short answers to questions about images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from stillhouse.evaluate.metrics.text import rouge_l_if_referenced
from stillhouse.evaluate.metrics.vqa import normalized_answer, vqa_accuracy
from stillhouse.evaluate.tasks.base import REGISTRY
from stillhouse.evaluate.tasks.prompts import EvalExample, ScoredTask, Scores


@REGISTRY.register
class VqaTask(ScoredTask):
    """Short answers, such as to questions about images, normalised by the rules of the VQA challenge.

    `vqa_accuracy` (0 to 1) is the soft accuracy over several annotators, `exact_match` whether a response
    equals any of their answers, `rouge_l` (0 to 100) the best over them. Answers are the texts in the row's
    field `answers` (or there under `answer`), or else its references.

    Example: `evaluate: {tasks: [{kind: vqa, data: textvqa_val.jsonl, sampling: {temperature: 0}}]}`
    """

    kind: Literal["vqa"] = "vqa"
    answers: str = "answers"
    """The field of a row that lists the answers of its annotators."""
    first_line: bool = True
    """Score only the first line of a response, for models that explain their answer after it."""

    def score(self, example: EvalExample, response: str) -> Scores:
        """The three scores; none for a row without answers."""
        answers = self._answers(example)
        if not answers:
            return {}
        said = response.strip().split("\n", 1)[0] if self.first_line else response
        return {
            "vqa_accuracy": vqa_accuracy(said, answers),
            "exact_match": float(normalized_answer(said) in map(normalized_answer, answers)),
            "rouge_l": rouge_l_if_referenced([said], [answers])[0],
        }

    def _answers(self, example: EvalExample) -> list[str]:
        found: Any = example.row.get(self.answers)
        listed = [found] if isinstance(found, str | Mapping) else found or example.prompt.references
        return [str(one["answer"] if isinstance(one, Mapping) else one) for one in listed]

    def score_settings(self) -> dict[str, Any]:
        """How answers were compared."""
        return {"exact_match": "normalised as in VQA", "first_line": self.first_line}
