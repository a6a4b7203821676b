"""Tasks that prompt the model: which rows become prompts, how responses are generated, scored and averaged.

`PromptTask` generates; `ScoredTask` also scores each response by itself; `FewShotTask` puts solved examples
before the prompt.
"""

from __future__ import annotations

import statistics
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stillhouse.config import ListOf
from stillhouse.core.distributed import broadcast_from_first
from stillhouse.core.images import without_images
from stillhouse.core.types import Completion, Prompt, Response, turn_text
from stillhouse.data import DataConfig, DatasetConfig, DatasetField, Encoder
from stillhouse.data.config import TemplateField
from stillhouse.data.formats import read_row
from stillhouse.data.load import encode_rows
from stillhouse.data.prompt_builder import IMAGES_TOO_LONG
from stillhouse.data.reading import Reading
from stillhouse.data.rows import Row
from stillhouse.data.templates import Template
from stillhouse.data.text_tokens import response_text
from stillhouse.data.tokenise import TooLong
from stillhouse.engines.base import Sampling, TokenizerInfo
from stillhouse.errors import ConfigError, DataError, Fault, RowError
from stillhouse.evaluate.generation import (
    Generations,
    Share,
    generate,
    questions_digest,
    response_statistics,
    to_responses,
    token_ids_digest,
    with_sums,
)
from stillhouse.evaluate.shown_images import ShownImages
from stillhouse.evaluate.tasks.base import EvalContext, EvalTask, TaskResult

if TYPE_CHECKING:
    from torch import nn

    from stillhouse.evaluate.likelihood import TokenSums


@dataclass(frozen=True, slots=True)
class EvalExample:
    """A prompt with the row that it was made from.

    Example: `EvalExample(Prompt("svamp:1", (5, 9), "How many?", references=("3",)), {"type": "sum"})`
    """

    prompt: Prompt
    row: Mapping[str, Any] = field(default_factory=dict)
    """The row as the file has it."""
    question: str = ""
    """The prompt's text without the template."""


@dataclass(frozen=True, slots=True)
class EvalSet:
    """The examples of a task, and how many rows could not be used.

    Example: `EvalSet(examples=(e,), path="svamp.jsonl", dropped={"prompt too long": 3}, truncated={})`
    """

    examples: tuple[EvalExample, ...]
    path: str
    """The file that they are from."""
    dropped: Mapping[str, int]
    truncated: Mapping[str, int]
    rows: int = 0
    """How many were read, those included."""
    sha256: str = ""
    """Of the file, as far as it was read."""

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts of all examples."""
        return [example.prompt for example in self.examples]


class PromptTask(EvalTask):
    """A task on responses to prompts; a subclass computes metrics from them."""

    data: DatasetField | None = None
    """The rows; default: the held-out rows of the run."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """At most this many prompts."""
    sampling: Sampling | None = None
    """How responses are sampled; default: `evaluate.sampling`."""
    seeds: ListOf[Annotated[int, Field(ge=0)]] | None = None
    """One pass over the prompts for each; default: `evaluate.seeds`."""
    template: TemplateField | None = None
    """How a row becomes a prompt; default: `data.template`."""
    max_prompt: Annotated[int, Field(ge=1)] | None = None
    """Maximum tokens of a prompt; default: `data.max_prompt`."""
    too_long: Literal["drop", "truncate_left", "truncate_right", "first_tokens"] | None = None
    """What happens to longer prompts; default: `data.too_long.prompt`. `first_tokens` cuts the finished
    prompt, template included; prompts with images are dropped instead."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """What its rows must have; see `load_prompts`. Others are left out and counted."""

    def datasets(self) -> Mapping[str, DatasetConfig]:
        """Its rows."""
        return {} if self.data is None else {"data": self.data}

    def encoder(self, template: Template, tokenizer: Any) -> Encoder:
        """What makes prompts of rows: the task's template, or else that of the run."""
        return Encoder(self.template or template, tokenizer)

    def parse_row(self, raw: Mapping[str, Any], where: str, dataset: DatasetConfig) -> Row | Iterable[Row]:
        """One row of the file, with its references; several where the row holds several examples."""
        return read_row(raw, dataset.fields, where)

    def load(
        self,
        encoder: Encoder,
        limits: DataConfig,
        held_out: DatasetConfig | None = None,
        limit: int | None = None,
    ) -> EvalSet:
        """Read the rows and make prompts of them.

        Args:
            encoder: template and tokenizer.
            limits: length rules, where the task has none.
            held_out: rows for a task without `data`.
            limit: at most so many of those, where the task has no limit of its own.

        Raises:
            DataError: a row cannot be read, or none is left.
            ConfigError: there are no rows to read.
        """
        dataset = self.data or held_out
        if dataset is None:
            raise ConfigError(
                Fault(
                    f"evaluate.tasks ({self.title})",
                    "needs rows, and the run has no held-out rows",
                    hint=f"Set its data: {{kind: {self.kind}, data: FILE}}.",
                )
            )
        rows = _Rows(self, dataset, limits.reading())
        most = self.limit if self.data is not None or self.limit is not None else limit
        rules = self._length_rules(limits)
        prompts, dropped, truncated = encode_rows(rows, dataset, rules, encoder, most, needs=self.needs)
        if self.too_long == "first_tokens":
            prompts = _first_tokens(prompts, self.max_prompt or limits.max_prompt, dropped, truncated)
        dropped.update(rows.reading.dropped)
        if not prompts:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in dropped.items()) or "empty"
            raise DataError(f"{dataset.title}: no prompt is left for the task {self.title} ({reasons})")
        examples = tuple(EvalExample(prompt, *rows.origins[prompt.id]) for prompt in prompts)
        return EvalSet(
            examples, dataset.title, dict(dropped), dict(truncated), rows.num_rows, dataset.fingerprint()
        )

    def _length_rules(self, limits: DataConfig) -> DataConfig:
        max_prompt = self.max_prompt or limits.max_prompt
        rule = self.too_long or limits.too_long.prompt
        if rule == "first_tokens":  # cut afterwards
            max_prompt, rule = 10**9, "drop"
        too_long = TooLong(prompt=rule, response=limits.too_long.response)
        changes = {"max_prompt": max_prompt, "too_long": too_long}
        return limits.model_copy(update={**changes, **({"no_response": "drop"} if self.needs else {})})

    def sampling_and_seeds(self, context: EvalContext) -> tuple[Sampling, tuple[int, ...]]:
        """Its own, or those of the run."""
        sampling = self.sampling or context.sampling
        if "max_tokens" not in sampling.model_fields_set:
            sampling = sampling.model_copy(update={"max_tokens": context.sampling.max_tokens})
        return sampling, tuple(self.seeds or context.seeds)

    def session(self, context: EvalContext) -> EvalSession:
        """Load the prompts and settle sampling and seeds.

        Raises:
            ConfigError: there are no rows, or prompt and response together exceed the model's context length.
            DataError: a row cannot be read, or none is left.
        """
        encoder = self.encoder(context.data.template, context.tokenizer)
        eval_set = self.load(encoder, context.data, context.held_out, context.limit)
        sampling, seeds = self.sampling_and_seeds(context)
        longest = max(len(prompt.token_ids) for prompt in eval_set.prompts)
        if context.context_length is not None and longest + sampling.max_tokens > context.context_length:
            raise ConfigError(
                Fault(
                    f"evaluate.tasks ({self.title})",
                    f"the longest prompt ({longest} tokens) and a response ({sampling.max_tokens}) exceed "
                    "the model's context length",
                    got=str(longest + sampling.max_tokens),
                    allowed=str(context.context_length),
                    hint="Lower max_prompt or sampling.max_tokens of the task.",
                )
            )
        return EvalSession(context, encoder, eval_set, sampling, seeds)


@dataclass(frozen=True)
class EvalSession:
    """One system on the prompts of one task."""

    context: EvalContext
    encoder: Encoder
    eval_set: EvalSet
    sampling: Sampling
    seeds: tuple[int, ...]
    shown: ShownImages = field(default_factory=ShownImages)
    """Writes the images of questions into rows."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        model: nn.Module | None = None,
        sampling: Sampling | None = None,
        name: str = "",
    ) -> Generations:
        """Complete prompts with every seed; finished blocks are kept until the whole task is done.

        Args:
            prompts: those of the task, each as often as it needs completions.
            model: default: the system.
            sampling: default: that of the task.
            name: tells the generations of one task apart, in files and on the terminal.
        """
        model, sampling = model or self.context.model, sampling or self.sampling
        header = {
            "prompts": token_ids_digest(prompts),
            "sampling": sampling.model_dump(mode="json"),
            "weights": self.context.fingerprint(model),
        }
        return generate(
            self.context.engine.build(model, self.facts),
            prompts,
            sampling,
            self.seeds,
            journal=self.context.open_journal(header, name),
            title=self.context.title and " ".join(filter(None, (self.context.title, name))),
            share=Share.of(self.context.world, model),
        )

    @property
    def facts(self) -> TokenizerInfo:
        """What ends a response here: the end of the task's template, or whatever ends the system's text."""
        return self.context.tokenizer_info.ended_by(self.encoder.ends)

    def decode(self, output: Completion | Response, *, strip: bool = True) -> str:
        """The text of a completion or response, for scoring."""
        text = response_text(self.context.tokenizer, output.token_ids)
        return text.strip() if strip else text

    def row(
        self, example: EvalExample, seed: int, output: Completion | Response, text: str
    ) -> dict[str, Any]:
        """The row of one response that the run folder keeps; scores are added to it."""
        prompt = example.prompt
        # A judge reads the question in place of the prompt with its template.
        question = {"question": example.question} if example.question != prompt.text.strip() else {}
        return {
            "id": prompt.id,
            "seed": seed,
            "prompt": prompt.text,
            **question,
            **self.shown.fields(prompt.id, prompt.images),
            "references": list(prompt.references),
            "response": text,
            "tokens": len(output.token_ids),
            "finished": output.finished,
        }

    def settings(self) -> dict[str, Any]:
        """What the reader of a result has to know about the responses."""
        return {
            "sampling": self.sampling.model_dump(mode="json"),
            "seeds": list(self.seeds),
            "prompts": len(self.eval_set.examples),
            "questions_digest": questions_digest(self.eval_set.prompts),
            "template": self.encoder.template.kind,
            "data": self.eval_set.path,
            "sha256": self.eval_set.sha256,
            "rows": self.eval_set.rows,
            "dropped": dict(self.eval_set.dropped),
            "truncated": dict(self.eval_set.truncated),
        }


class _Rows:
    """The rows of a task by the id of their prompt; keeps the origin of each."""

    def __init__(self, task: PromptTask, dataset: DatasetConfig, reading: Reading) -> None:
        self.task, self.dataset, self.reading = task, dataset, reading
        self.origins: dict[str, tuple[Mapping[str, Any], str]] = {}
        """The raw row and the question, by id."""
        self._given, self._dropped_here = 0, 0

    @property
    def num_rows(self) -> int:
        """Rows that were read so far, those that were dropped included."""
        return self._given + sum(self.reading.dropped.values()) - self._dropped_here

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        for number, (part, (where, raw)) in enumerate(self.dataset.raw_by_part(self.reading), start=1):
            self._given = number
            seen = {name: value for name, value in raw.items() if name not in self.reading.ignore}
            try:
                parsed = self.task.parse_row(seen, where, part)
                rows = [parsed] if isinstance(parsed, Row) else list(parsed)
            except RowError as error:
                self.reading.drop(error)
                self._dropped_here += 1
                continue
            if not rows:
                self.reading.dropped["left out by the task"] += 1
                self._dropped_here += 1
            for index, row in enumerate(rows, start=1):
                id = f"{self.task.title}:{number}" + (f":{index}" if index > 1 else "")
                self.origins[id] = (raw, _question(row))
                yield id, self.reading.placed(row)


def _question(row: Row) -> str:
    if row.messages:
        return "\n\n".join(map(turn_text, row.messages))
    return without_images("\n\n".join(filter(None, (row.instruction, row.input))))


def _first_tokens(
    prompts: Iterable[Prompt], limit: int, dropped: Counter[str], truncated: Counter[str]
) -> list[Prompt]:
    found = []
    for prompt in prompts:
        if len(prompt.token_ids) <= limit:
            found.append(prompt)
        elif prompt.images:  # a part of an image's tokens is no image
            dropped[IMAGES_TOO_LONG] += 1
        else:
            truncated["prompt"] += 1
            found.append(replace(prompt, token_ids=prompt.token_ids[:limit]))
    return found


Scores = Mapping[str, float | str | None]
"""Of one response: numbers, which are averaged, and texts, which are kept (such as an extracted answer)."""

ROW_FIELDS = ("id", "seed", "sample", "prompt", "question", "references", "response", "tokens", "finished")
"""What every row has besides its scores."""


class ScoredTask(PromptTask):
    """A task whose responses are scored one by one and averaged.

    A subclass says how a response is scored (`score`) and, where rows have a shape of their own, how a row
    is read (`parse_row`). Everything else has defaults.
    """

    samples: Annotated[int, Field(ge=1)] = 1
    """Responses per prompt and seed."""
    strip_responses: ClassVar[bool] = True
    """Whether white space around a response is removed before it is scored."""

    @property
    def title(self) -> str:
        """The name, or that of its file, or the kind."""
        if self.name is None and self.data is not None:
            return self.data.title.rstrip("/").rsplit("/", 1)[-1].split(".")[0]
        return super().title

    @abstractmethod
    def score(self, example: EvalExample, response: str) -> Scores:
        """The scores of one response."""

    def score_all(self, examples: Sequence[EvalExample], responses: Sequence[str]) -> Sequence[Scores]:
        """The scores of many responses, in order; overridden where scoring them together is faster."""
        return [self.score(example, response) for example, response in zip(examples, responses, strict=True)]

    def aggregate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Metrics from all rows of all seeds; here `mean_over_seeds` of every numeric score."""
        names = dict.fromkeys(name for row in rows for name in row if name not in ROW_FIELDS)
        numeric = [n for n in names if any(isinstance(row.get(n), int | float) for row in rows)]
        return mean_over_seeds(rows, numeric)

    def extra_metrics(
        self, context: EvalContext, examples: Sequence[EvalExample], responses: Sequence[Response]
    ) -> tuple[dict[str, float], TokenSums]:
        """Metrics that are no average of scores, such as likelihoods, and what each prompt adds to those that
        are means over tokens.

        Args:
            context: the system.
            examples: each once.
            responses: those of the first seed, `samples` for each example.
        """
        return {}, {}

    def score_settings(self) -> dict[str, Any]:
        """What the reader of a result has to know about the scores."""
        return {}

    def evaluate(self, context: EvalContext) -> TaskResult:
        """Generate, score, average."""
        session = self.session(context)
        examples = [example for example in session.eval_set.examples for _ in range(self.samples)]
        prompts = [example.prompt for example in examples]
        generations = session.generate(prompts)
        rows: list[dict[str, Any]] = []
        for seed, completions in generations.by_seed.items():
            texts = [session.decode(one, strip=self.strip_responses) for one in completions]
            world, score = context.world, partial(self.score_all, examples, texts)
            scored = broadcast_from_first(world.rank, world.size, score, patient=True)
            for index, example in enumerate(examples):
                row = session.row(example, seed, completions[index], texts[index])
                sample = {"sample": index % self.samples} if self.samples > 1 else {}
                rows.append({**row, **sample, **scored[index]})
        first = to_responses(prompts, next(iter(generations.by_seed.values())), context.role)
        extra, sums = self.extra_metrics(context, session.eval_set.examples, first)
        metrics = {**self.aggregate(rows), **response_statistics(rows, generations.seconds), **extra}
        settings = {**session.settings(), "samples": self.samples, **self.score_settings()}
        return TaskResult(metrics, settings, with_sums(rows, sums))


def mean_over_seeds(rows: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, float]:
    """The mean of each score over the rows of a seed, then over seeds.

    Returns:
        `NAME` and `NAME_std`, the standard deviation over seeds (n - 1; 0 for one seed). Rows without the
        score, or with None, take no part.
    """
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


class FewShotTask(ScoredTask):
    """A scored task whose prompts may begin with solved examples, for models without instruction tuning."""

    few_shot: Annotated[int, Field(ge=0)] = 0
    """Number of solved examples before each prompt: the first rows of `few_shot_data`."""
    few_shot_data: DatasetField | None = None
    """Rows of the solved examples; not those that are evaluated."""

    @model_validator(mode="after")
    def _has_examples(self) -> Self:
        if self.few_shot and self.few_shot_data is None:
            raise ValueError("few_shot needs few_shot_data: a file of rows that are not evaluated")
        return self

    def datasets(self) -> Mapping[str, DatasetConfig]:
        """Its rows, and those of the solved examples."""
        examples = {} if self.few_shot_data is None else {"few_shot_data": self.few_shot_data}
        return {**super().datasets(), **examples}

    def few_shot_rows(self) -> list[Mapping[str, Any]]:
        """The rows of the solved examples.

        Raises:
            DataError: there are fewer than `few_shot`.
        """
        if self.few_shot_data is None or not self.few_shot:
            return []
        rows: list[Mapping[str, Any]] = []
        for _, (_, raw) in self.few_shot_data.raw_by_part(Reading()):
            rows.append(raw)
            if len(rows) == self.few_shot:
                return rows
        raise DataError(f"{self.few_shot_data.title}: has {len(rows)} rows, but few_shot is {self.few_shot}")
