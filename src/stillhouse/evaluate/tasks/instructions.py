"""Instruction following as the papers measure it, and other tasks of free text with reference answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stillhouse.config import ListOf
from stillhouse.core.types import Response
from stillhouse.data import DatasetConfig, DatasetField
from stillhouse.data.rows import Row
from stillhouse.engines.base import Sampling
from stillhouse.evaluate.metrics.rouge import rouge_of
from stillhouse.evaluate.metrics.translation import corpus_bleu, corpus_chrf
from stillhouse.evaluate.tasks.base import REGISTRY, Bench, Question, Scores, Task, means_over_seeds
from stillhouse.evaluate.tasks.exact_match import normal
from stillhouse.evaluate.tasks.formats import instruction_rows

Metric = Literal["rouge_l", "bleu", "chrf", "exact_match"]

PROTOCOLS: dict[str, dict[str, Any]] = {
    "minillm": {
        "template": {"kind": "alpaca"},
        "max_prompt": 256,
        "too_long": "first_tokens",
        "seeds": (10, 20, 30, 40, 50),
        "sampling": {"temperature": 1.0, "max_tokens": 256, "no_repeat_ngram_size": 6},
    }
}
"""Values that a protocol gives where the configuration gives none."""


class FreeText(Task):
    """Answers in free words, compared with references."""

    metrics: ListOf[Metric] = ("rouge_l",)
    """What answers are scored by: rouge_l, bleu, chrf, exact_match. BLEU and chrF are of all answers of a
    seed together, as sacrebleu computes them (extra [eval])."""
    likelihood: bool = True
    """Also the loss on the references and, where there is a teacher, how near the student is to it there and
    on its own answers."""
    min_reference: Annotated[int, Field(ge=1)] | None = None
    """Leave out questions whose first reference has fewer words."""

    def row(self, raw: Mapping[str, Any], where: str, source: DatasetConfig) -> Row | Iterable[Row]:
        """All formats of `formats.instruction_rows`."""
        rows = instruction_rows(raw, source.fields, where)
        least = self.min_reference or 0
        return [row for row in rows if not least or len((row.response or "").split()) >= least]

    def scores(self, questions: Sequence[Question], texts: Sequence[str]) -> Sequence[Scores]:
        """The scores of single answers; none for a question without references."""
        references = [question.prompt.references for question in questions]
        scored: list[dict[str, float]] = [{} for _ in texts]
        if "rouge_l" in self.metrics:
            for scores, value in zip(scored, rouge_of(texts, references), strict=True):
                if value is not None:
                    scores["rouge_l"] = value
        if "exact_match" in self.metrics:
            for scores, text, right in zip(scored, texts, references, strict=True):
                if right:
                    scores["exact_match"] = float(normal(text) in [normal(one) for one in right])
        return scored

    def score(self, question: Question, text: str) -> Scores:
        """The scores of one answer."""
        return self.scores([question], [text])[0]

    def summary(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Mean over answers for each seed, BLEU and chrF over all answers of a seed; then mean and standard
        deviation over seeds."""
        metrics = super().summary(rows)
        measures = {"bleu": corpus_bleu, "chrf": corpus_chrf}
        per_seed: list[dict[str, Any]] = []
        for seed in dict.fromkeys(row["seed"] for row in rows):
            answered = [row for row in rows if row["seed"] == seed and row["references"]]
            texts, references = [r["response"] for r in answered], [r["references"] for r in answered]
            wanted = [name for name in measures if name in self.metrics and answered]
            per_seed.append({"seed": seed, **{name: measures[name](texts, references) for name in wanted}})
        return {**metrics, **means_over_seeds(per_seed, [n for n in measures if n in self.metrics])}

    def further(
        self, bench: Bench, questions: Sequence[Question], responses: Sequence[Response]
    ) -> dict[str, float]:
        """Loss on the references; with a teacher also fidelity there and on the student's own answers."""
        if not self.likelihood:
            return {}
        from stillhouse.evaluate.likelihood import closeness

        prompts = [question.prompt for question in questions]
        return closeness(bench.model, bench.teacher, prompts, responses, **bench.options())

    def about(self) -> dict[str, Any]:
        """Definitions of the metrics."""
        told = {
            "rouge_l": "rouge-score rougeL F, stemmer, best over references",
            "bleu": "sacrebleu BLEU of the answers of one seed, 13a tokenizer, exponential smoothing",
            "chrf": "sacrebleu chrF2 of the answers of one seed",
            "exact_match": "without case, punctuation and white space",
        }
        facts: dict[str, Any] = {name: told[name] for name in self.metrics}
        if self.likelihood:
            facts["loss"] = "nats per reference token"
            facts["fidelity"] = "on references; _on_own_text: on the answers of the first seed"
        return facts


@REGISTRY.register
class Instructions(FreeText):
    """Instruction following: answers sampled at temperature 1 with five seeds, ROUGE-L against the best
    reference, mean and standard deviation over seeds.

    `protocol: minillm` adds the other settings of the released evaluation code of MiniLLM and DistiLLM: the
    Alpaca template, prompts cut to their first 256 tokens, at most 256 new tokens, and no 6-gram twice in
    prompt and answer (evaluate_main.py and prompt_datasets.py in microsoft/LMOps, minillm). Each can be
    overruled. That last setting is in no paper and moves results; without the protocol it is off.

    `sets` makes one task of each of several files:
    `{kind: instructions, protocol: minillm, sets: {dolly: dolly_eval.jsonl, vicuna: vicuna80_eval.jsonl}}`

    Source: MiniLLM (arXiv 2306.08543) section 3.1; DistiLLM, ABKD and CSD follow it.
    """

    kind: Literal["instructions"] = "instructions"
    protocol: Literal["minillm"] | None = None
    """Settings of a paper, for those that are not given here."""
    sets: dict[str, DatasetField] | None = None
    """Several files of rows by the names of their tasks, in place of `data`."""
    sampling: Sampling | None = Sampling(temperature=1.0)
    """How answers are written. `no_repeat_ngram_size` is 0 unless set here or by the protocol."""
    seeds: ListOf[Annotated[int, Field(ge=0)]] | None = (10, 20, 30, 40, 50)
    """One pass over the questions for each."""

    @model_validator(mode="before")
    @classmethod
    def _of_protocol(cls, given: Any) -> Any:
        protocol = given.get("protocol") if isinstance(given, Mapping) else None
        if protocol not in PROTOCOLS:
            return given
        values = {**PROTOCOLS[protocol], **given}
        own = given.get("sampling")
        if isinstance(own, Mapping):
            values["sampling"] = {**PROTOCOLS[protocol]["sampling"], **own}
        return values

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.sets is not None and self.data is not None:
            raise ValueError("needs data or sets, not both")
        return self

    def expanded(self) -> Sequence[Instructions]:
        """One task for each set."""
        if not self.sets:
            return (self,)
        return [
            self.model_copy(update={"name": name, "data": source, "sets": None})
            for name, source in self.sets.items()
        ]

    def sources(self) -> Mapping[str, DatasetConfig]:
        """Its rows, or those of all sets."""
        sets = self.sets or {}
        return {**super().sources(), **{f"sets.{name}": source for name, source in sets.items()}}


@REGISTRY.register
class E2E(FreeText):
    """Restaurant descriptions from facts (E2E NLG, Novikova et al. 2017): greedy answers, ROUGE-L, BLEU and
    chrF against several references.

    Rows are `{instruction, input, outputs: [...]}`. Rows that ask the same are one question with all of their
    references, as the data set's own measure has it.
    """

    kind: Literal["e2e"] = "e2e"
    metrics: ListOf[Metric] = ("rouge_l", "bleu", "chrf")
    sampling: Sampling | None = Sampling(temperature=0.0)
    """How answers are written."""
    seeds: ListOf[Annotated[int, Field(ge=0)]] | None = (10,)
    """One pass over the questions for each; greedy needs one."""

    def questions(self, *arguments: Any, **named: Any) -> Any:
        """The questions, equal ones put together."""
        asked = super().questions(*arguments, **named)
        merged: dict[tuple[int, ...], Question] = {}
        for question in asked.questions:
            first = merged.get(question.prompt.token_ids)
            if first is None:
                merged[question.prompt.token_ids] = question
                continue
            references = dict.fromkeys((*first.prompt.references, *question.prompt.references))
            prompt = replace(first.prompt, references=tuple(references))
            merged[question.prompt.token_ids] = replace(first, prompt=prompt)
        return replace(asked, questions=tuple(merged.values()))
