"""Tasks that ask questions and score the answers.

A task is data in YAML: `evaluate: {tasks: [instructions, {kind: exact_match, data: rows.jsonl}]}`.
"""

from __future__ import annotations

import statistics
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from stillhouse.evaluate.answers import as_responses, text_statistics
from stillhouse.evaluate.tasks.asking import Asked, Asking, Question
from stillhouse.evaluate.tasks.probe import REGISTRY, Bench, Outcome, Probe, TaskField

Scores = Mapping[str, float | str | None]
"""Of one answer: numbers, which are averaged, and texts, which are kept (such as an extracted answer)."""


class Task(Asking):
    """Questions from a set of rows; answers are scored one by one and averaged.

    A subclass says how an answer is scored (`score`) and, where rows have a shape of their own, how a row is
    read (`row`). Everything else has defaults.
    """

    samples: Annotated[int, Field(ge=1)] = 1
    """Answers to each question in each pass."""

    @property
    def title(self) -> str:
        """The name, or the file's where it has a file, or the kind."""
        if self.name is None and self.data is not None:
            return self.data.path.rstrip("/").rsplit("/", 1)[-1].split(".")[0]
        return super().title

    def decoded(self, tokenizer: Any, ids: Sequence[int]) -> str:
        """The text of an answer, for scoring."""
        return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    @abstractmethod
    def score(self, question: Question, text: str) -> Scores:
        """The scores of one answer."""

    def scores(self, questions: Sequence[Question], texts: Sequence[str]) -> Sequence[Scores]:
        """The scores of many answers, in their order; a task that can score several at once does it here."""
        return [self.score(question, text) for question, text in zip(questions, texts, strict=True)]

    def summary(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Metrics from all rows of all seeds: the mean over rows for each seed, then mean and `_std` over
        seeds."""
        return means_over_seeds(rows, self.score_names(rows))

    def score_names(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """The scores that are numbers."""
        names = dict.fromkeys(name for row in rows for name in row if name not in ROW_FIELDS)
        return [name for name in names if any(isinstance(row.get(name), int | float) for row in rows)]

    def measure(self, bench: Bench) -> Outcome:
        """Ask, score, average."""
        sitting = self.begin(bench)
        questions = [question for question in sitting.asked.questions for _ in range(self.samples)]
        prompts = [question.prompt for question in questions]
        written = sitting.write(prompts)
        rows: list[dict[str, Any]] = []
        for seed, completions in written.by_seed.items():
            texts = [self.decoded(bench.tokenizer, done.token_ids) for done in completions]
            scored = self.scores(questions, texts)
            for index, (question, text, done, scores) in enumerate(
                zip(questions, texts, completions, scored, strict=True)
            ):
                rows.append(
                    {
                        **sitting.row(question, seed),
                        **({"sample": index % self.samples} if self.samples > 1 else {}),
                        "response": text,
                        "tokens": len(done.token_ids),
                        "finished": done.finished,
                        **scores,
                    }
                )
        first = as_responses(prompts, next(iter(written.by_seed.values())), bench.role)
        metrics = {
            **self.summary(rows),
            **text_statistics(rows, written.seconds),
            **self.further(bench, sitting.asked.questions, first),
        }
        return Outcome(metrics, {**sitting.settings(), "samples": self.samples, **self.about()}, rows)

    def further(
        self, bench: Bench, questions: Sequence[Question], responses: Sequence[Any]
    ) -> dict[str, float]:
        """More metrics than those of single answers, such as likelihoods.

        Args:
            bench: the system.
            questions: each once.
            responses: the answers of the first seed as token ids, `samples` of them for each question.
        """
        return {}

    def about(self) -> dict[str, Any]:
        """What the reader of a result has to know about the scores."""
        return {}


ROW_FIELDS = ("id", "seed", "sample", "prompt", "question", "references", "response", "tokens", "finished")
"""What every row of answers has besides its scores."""


def means_over_seeds(rows: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, float]:
    """The mean of each score over the rows of a seed, then `NAME` and `NAME_std`, mean and standard deviation
    (n - 1; 0 for one seed) over seeds. Rows without the score, or with None, take no part."""
    metrics: dict[str, float] = {}
    for name in names:
        by_seed: dict[Any, list[float]] = {}
        for row in rows:
            if isinstance(row.get(name), int | float):
                by_seed.setdefault(row["seed"], []).append(float(row[name]))
        means = [statistics.fmean(values) for values in by_seed.values()]
        if means:
            metrics[name] = statistics.fmean(means)
            metrics[f"{name}_std"] = statistics.stdev(means) if len(means) > 1 else 0.0
    return metrics


__all__ = [
    "REGISTRY",
    "Asked",
    "Bench",
    "Outcome",
    "Probe",
    "Question",
    "Scores",
    "Task",
    "TaskField",
    "means_over_seeds",
]
