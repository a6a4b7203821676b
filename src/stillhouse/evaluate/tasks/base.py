"""Tasks that ask questions and score the answers.

A task is data in YAML: `evaluate: {tasks: [instructions, {kind: exact_match, data: rows.jsonl}]}`.
"""

from __future__ import annotations

import statistics
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from stillhouse.config import Many
from stillhouse.data import DataConfig, Encoder, Source, SourceConfig
from stillhouse.data.lengths import TooLong
from stillhouse.data.load import TemplateField, read_rows
from stillhouse.data.rows import Row, understand
from stillhouse.engines.base import Sampling
from stillhouse.errors import ConfigError, DataError, Fault
from stillhouse.evaluate.answers import as_responses, text_statistics, write_answers
from stillhouse.evaluate.partial import digest_of_prompts, digest_of_weights
from stillhouse.evaluate.tasks.probe import REGISTRY, Bench, Outcome, Probe, TaskField
from stillhouse.types import Prompt

Scores = Mapping[str, float | str | None]
"""Of one answer: numbers, which are averaged, and texts, which are kept (such as an extracted answer)."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and what its row says beyond the prompt.

    Example: `Question(Prompt("svamp:1", (5, 9), "How many?", references=("3",)), facts={"type": "addition"})`
    """

    prompt: Prompt
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The row as the file has it."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The questions of a task, and how many rows could not be used.

    Example: `Asked(questions=(q,), path="svamp.jsonl", dropped={"prompt too long": 3}, truncated={})`
    """

    questions: tuple[Question, ...]
    path: str
    """Where they are from."""
    dropped: Mapping[str, int]
    truncated: Mapping[str, int]


class Task(Probe):
    """Questions from a set of rows; answers are scored one by one and averaged.

    A subclass says how an answer is scored (`score`) and, where rows have a shape of their own, how a row is
    read (`row`). Everything else has defaults.
    """

    data: Source | None = None
    """The rows; default: the held-out rows of the run."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """At most this many questions."""
    sampling: Sampling | None = None
    """How answers are written; default: `evaluate.sampling`."""
    seeds: Many[Annotated[int, Field(ge=0)]] | None = None
    """One pass over the questions for each; default: `evaluate.seeds`."""
    samples: Annotated[int, Field(ge=1)] = 1
    """Answers to each question in each pass."""
    template: TemplateField | None = None
    """How a row becomes a prompt; default: `data.template`."""
    max_prompt: Annotated[int, Field(ge=1)] | None = None
    """The most tokens of a prompt; default: `data.max_prompt`."""
    too_long: Literal["drop", "truncate_left", "truncate_right", "first_tokens"] | None = None
    """What happens to longer ones; default: `data.too_long.prompt`. `first_tokens` cuts the finished prompt,
    words of the template included."""

    @property
    def title(self) -> str:
        """The name, or the file's where it has a file, or the kind."""
        if self.name is None and self.data is not None:
            return self.data.path.rstrip("/").rsplit("/", 1)[-1].split(".")[0]
        return super().title

    def sources(self) -> Mapping[str, SourceConfig]:
        """Its rows."""
        return {} if self.data is None else {"data": self.data}

    def row(self, raw: Mapping[str, Any], where: str, source: SourceConfig) -> Row | Iterable[Row]:
        """A row of the file, understood: whose `references` are right answers. Several where one row holds
        several questions; each question's facts are the whole row."""
        return understand(raw, source.fields, where)

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

    def questions(self, encoder: Encoder, limits: DataConfig, held_out: SourceConfig | None = None) -> Asked:
        """Read the rows and make prompts of them.

        Args:
            encoder: template and tokenizer.
            limits: length rules, where the task has none.
            held_out: the rows of a task without data.

        Raises:
            DataError: a row cannot be read, or none is left.
            ConfigError: there are no rows to read.
        """
        source = self.data or held_out
        if source is None:
            raise ConfigError(
                Fault(
                    f"evaluate.tasks ({self.title})",
                    "needs rows, and the run has no held-out ones",
                    hint=f"Give it some: {{kind: {self.kind}, data: FILE}}.",
                )
            )
        counts: Counter[str] = Counter()
        facts: dict[str, Mapping[str, Any]] = {}
        rows = _Rows(self, source, counts, facts)
        prompts, dropped, truncated = read_rows(rows, source, self._lengths(limits), encoder, self.limit)
        if self._cut_tokens():
            prompts = [_first_tokens(p, self.max_prompt or limits.max_prompt, truncated) for p in prompts]
        for reason, name in (("broken", "broken line"), ("left out", "left out by the task")):
            if counts[reason]:
                dropped[name] += counts[reason]
        if not prompts:
            told = ", ".join(f"{count} x {reason}" for reason, count in dropped.items()) or "empty"
            raise DataError(f"{source.path}: no question is left for the task {self.title} ({told})")
        questions = tuple(Question(prompt, facts[prompt.id]) for prompt in prompts)
        return Asked(questions, source.path, dict(dropped), dict(truncated))

    def _cut_tokens(self) -> bool:
        return self.too_long == "first_tokens"

    def _lengths(self, limits: DataConfig) -> DataConfig:
        most = self.max_prompt or limits.max_prompt
        rule = self.too_long or limits.too_long.prompt
        changed = {
            "max_prompt": 10**9 if rule == "first_tokens" else most,
            "too_long": TooLong(
                prompt="drop" if rule == "first_tokens" else rule, response=limits.too_long.response
            ),
        }
        return limits.model_copy(update=changed)

    def settled(self, bench: Bench) -> tuple[Sampling, tuple[int, ...]]:
        """The sampling and the seeds that are really used."""
        sampling = self.sampling or bench.sampling
        if "max_tokens" not in sampling.model_fields_set:
            sampling = sampling.model_copy(update={"max_tokens": bench.sampling.max_tokens})
        return sampling, tuple(self.seeds or bench.seeds)

    def measure(self, bench: Bench) -> Outcome:
        """Ask, score, average."""
        encoder = Encoder(self.template or bench.data.template, bench.tokenizer)
        asked = self.questions(encoder, bench.data, bench.held_out)
        sampling, seeds = self.settled(bench)
        questions = [question for question in asked.questions for _ in range(self.samples)]
        prompts = [question.prompt for question in questions]
        header = {
            "prompts": digest_of_prompts(prompts),
            "sampling": sampling.model_dump(mode="json"),
            "weights": digest_of_weights(bench.model),
        }
        partial = bench.keep(header, "")
        written = write_answers(bench.engine, prompts, sampling, seeds, partial=partial, title=bench.title)
        rows: list[dict[str, Any]] = []
        for seed, completions in written.by_seed.items():
            texts = [self.decoded(bench.tokenizer, done.token_ids) for done in completions]
            scored = self.scores(questions, texts)
            for index, (question, text, done, scores) in enumerate(
                zip(questions, texts, completions, scored, strict=True)
            ):
                rows.append(
                    {
                        "id": question.prompt.id,
                        "seed": seed,
                        **({"sample": index % self.samples} if self.samples > 1 else {}),
                        "prompt": question.prompt.text,
                        "references": list(question.prompt.references),
                        "response": text,
                        "tokens": len(done.token_ids),
                        "finished": done.finished,
                        **scores,
                    }
                )
        metrics = {**self.summary(rows), **text_statistics(rows, written.seconds)}
        first = as_responses(prompts, next(iter(written.by_seed.values())), bench.role)
        metrics |= self.further(bench, asked.questions, first)
        settings = {
            "sampling": sampling.model_dump(mode="json"),
            "seeds": list(seeds),
            "questions": len(asked.questions),
            "samples": self.samples,
            "template": encoder.template.kind,
            "data": asked.path,
            "dropped": dict(asked.dropped),
            "truncated": dict(asked.truncated),
            **self.about(),
        }
        return Outcome(metrics, settings, rows)

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


class _Rows:
    """The rows of a task by the id of their prompt; keeps what else each row says in `facts`."""

    def __init__(
        self, task: Task, source: SourceConfig, counts: Counter[str], facts: dict[str, Mapping[str, Any]]
    ) -> None:
        self.task, self.source, self.counts, self.facts = task, source, counts, facts

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        for number, (where, raw) in enumerate(self.source.raw(self.counts), start=1):
            if self.source.limit is not None and number > self.source.limit:
                return
            found = self.task.row(raw, where, self.source)
            several = [found] if isinstance(found, Row) else list(found)
            self.counts["left out"] += not several
            for index, row in enumerate(several, start=1):
                id = f"{self.task.title}:{number}" + (f":{index}" if index > 1 else "")
                self.facts[id] = raw
                yield id, row


def _first_tokens(prompt: Prompt, most: int, truncated: Counter[str]) -> Prompt:
    if len(prompt.token_ids) <= most:
        return prompt
    truncated["prompt"] += 1
    return replace(prompt, token_ids=prompt.token_ids[:most])


ROW_FIELDS = ("id", "seed", "sample", "prompt", "references", "response", "tokens", "finished")
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
