"""Measurements that begin with questions: which rows are asked, and how they become prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from stillhouse.config import ListOf
from stillhouse.core.types import Completion, Prompt
from stillhouse.data import DataConfig, DatasetConfig, DatasetField, Encoder
from stillhouse.data.formats import read_row
from stillhouse.data.load import TemplateField, encode_rows
from stillhouse.data.rows import Row
from stillhouse.data.tokenise import TooLong
from stillhouse.engines.base import Sampling, TokenizerInfo
from stillhouse.errors import ConfigError, DataError, Fault
from stillhouse.evaluate.answers import Written, prompts_digest, questions_digest, write_answers
from stillhouse.evaluate.tasks.probe import Bench, Probe

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and what its row says beyond the prompt.

    Example: `Question(Prompt("svamp:1", (5, 9), "How many?", references=("3",)), facts={"type": "addition"})`
    """

    prompt: Prompt
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The row as the file has it."""
    words: str = ""
    """What is asked, without the words of a template."""


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


class Asking(Probe):
    """A measurement on answers to questions; a subclass says what is made of the answers."""

    data: DatasetField | None = None
    """The rows; default: the held-out rows of the run."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """At most this many questions."""
    sampling: Sampling | None = None
    """How answers are written; default: `evaluate.sampling`."""
    seeds: ListOf[Annotated[int, Field(ge=0)]] | None = None
    """One pass over the questions for each; default: `evaluate.seeds`."""
    template: TemplateField | None = None
    """How a row becomes a prompt; default: `data.template`."""
    max_prompt: Annotated[int, Field(ge=1)] | None = None
    """The most tokens of a prompt; default: `data.max_prompt`."""
    too_long: Literal["drop", "truncate_left", "truncate_right", "first_tokens"] | None = None
    """What happens to longer ones; default: `data.too_long.prompt`. `first_tokens` cuts the finished prompt,
    words of the template included."""

    def sources(self) -> Mapping[str, DatasetConfig]:
        """Its rows."""
        return {} if self.data is None else {"data": self.data}

    def row(self, raw: Mapping[str, Any], where: str, source: DatasetConfig) -> Row | Iterable[Row]:
        """A row of the file, understood: whose `references` are right answers. Several where one row holds
        several questions; each question's facts are the whole row."""
        return read_row(raw, source.fields, where)

    def questions(
        self,
        encoder: Encoder,
        limits: DataConfig,
        held_out: DatasetConfig | None = None,
        at_most: int | None = None,
    ) -> Asked:
        """Read the rows and make prompts of them.

        Args:
            encoder: template and tokenizer.
            limits: length rules, where the task has none.
            held_out: the rows of a task without data.
            at_most: so many of those, where the task has no limit of its own.

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
        facts: dict[str, tuple[Mapping[str, Any], str]] = {}
        rows = _Rows(self, source, counts, facts)
        most = self.limit if self.data is not None or self.limit is not None else at_most
        prompts, dropped, truncated = encode_rows(rows, source, self._lengths(limits), encoder, most)
        if self.too_long == "first_tokens":
            prompts = [_first_tokens(p, self.max_prompt or limits.max_prompt, truncated) for p in prompts]
        for reason, name in (("broken", "broken line"), ("left out", "left out by the task")):
            if counts[reason]:
                dropped[name] += counts[reason]
        if not prompts:
            told = ", ".join(f"{count} x {reason}" for reason, count in dropped.items()) or "empty"
            raise DataError(f"{source.path}: no question is left for the task {self.title} ({told})")
        questions = tuple(Question(prompt, *facts[prompt.id]) for prompt in prompts)
        return Asked(questions, source.path, dict(dropped), dict(truncated))

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

    def begin(self, bench: Bench) -> Sitting:
        """Questions, sampling and seeds, ready to be answered.

        Raises:
            ConfigError: there are no rows, or a prompt and an answer together are longer than the context.
            DataError: a row cannot be read, or none is left.
        """
        encoder = Encoder(self.template or bench.data.template, bench.tokenizer)
        asked = self.questions(encoder, bench.data, bench.held_out, bench.limit)
        sampling, seeds = self.settled(bench)
        longest = max(len(question.prompt.token_ids) for question in asked.questions)
        if bench.context is not None and longest + sampling.max_tokens > bench.context:
            raise ConfigError(
                Fault(
                    f"evaluate.tasks ({self.title})",
                    f"the longest prompt ({longest} tokens) and an answer ({sampling.max_tokens}) are longer "
                    "than the model's context",
                    got=str(longest + sampling.max_tokens),
                    allowed=str(bench.context),
                    hint="Lower max_prompt or sampling.max_tokens of the task.",
                )
            )
        return Sitting(bench, encoder, asked, sampling, seeds)


@dataclass(frozen=True)
class Sitting:
    """A system before its questions."""

    bench: Bench
    encoder: Encoder
    asked: Asked
    sampling: Sampling
    seeds: tuple[int, ...]

    @property
    def prompts(self) -> list[Prompt]:
        """What is asked."""
        return [question.prompt for question in self.asked.questions]

    def write(
        self,
        prompts: Sequence[Prompt],
        *,
        model: nn.Module | None = None,
        sampling: Sampling | None = None,
        piece: str = "",
    ) -> Written:
        """Answers, kept under the name `piece` until the whole measurement is done.

        Args:
            prompts: what is asked.
            model: who answers; default: the system.
            sampling: how; default: that of the task.
            piece: tells several kinds of answers of one measurement apart, in files and on the terminal.
        """
        writer, how = model or self.bench.model, sampling or self.sampling
        header = {
            "prompts": prompts_digest(prompts),
            "sampling": how.model_dump(mode="json"),
            "weights": self.bench.weights_of(writer),
        }
        return write_answers(
            self.bench.writer.build(writer, TokenizerInfo((self.encoder.end_id,), self.bench.facts.pad_id)),
            prompts,
            how,
            self.seeds,
            journal=self.bench.open_journal(header, piece),
            title=self.bench.title and " ".join(filter(None, (self.bench.title, piece))),
        )

    def row(self, question: Question, seed: int) -> dict[str, Any]:
        """The beginning of a row that the run folder keeps."""
        prompt = question.prompt
        row = {"id": prompt.id, "seed": seed, "prompt": prompt.text, "references": list(prompt.references)}
        # A judge has no use for the marks of a chat template.
        return row if self.encoder.template.kind != "chat" else {**row, "question": question.words}

    def text(self, completion: Completion) -> str:
        """An answer as text, for scoring."""
        return str(self.bench.tokenizer.decode(list(completion.token_ids), skip_special_tokens=True)).strip()

    def settings(self) -> dict[str, Any]:
        """What the reader of a result has to know of how it was made."""
        return {
            "sampling": self.sampling.model_dump(mode="json"),
            "seeds": list(self.seeds),
            "questions": len(self.asked.questions),
            "questions_digest": questions_digest(self.prompts),
            "template": self.encoder.template.kind,
            "data": self.asked.path,
            "dropped": dict(self.asked.dropped),
            "truncated": dict(self.asked.truncated),
        }


class _Rows:
    """The rows of a task by the id of their prompt; keeps what else each row says in `facts`."""

    def __init__(
        self,
        task: Asking,
        source: DatasetConfig,
        counts: Counter[str],
        facts: dict[str, tuple[Mapping[str, Any], str]],
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
                self.facts[id] = (raw, _words(row))
                yield id, row


def _words(row: Row) -> str:
    if row.messages:
        return "\n\n".join(turn["content"] for turn in row.messages)
    return "\n\n".join(filter(None, (row.instruction, row.input)))


def _first_tokens(prompt: Prompt, most: int, truncated: Counter[str]) -> Prompt:
    if len(prompt.token_ids) <= most:
        return prompt
    truncated["prompt"] += 1
    return replace(prompt, token_ids=prompt.token_ids[:most])
