"""Instruction following as the papers measure it, and other open-ended generation with references.

Rows of the published instruction sets are read as their files have them:

- Dolly, Self-Instruct (flattened), Vicuna: `{instruction, input, output}` or `{instruction, input, outputs}`
- MiniLLM's processed files (dolly, self-inst, vicuna, sinst/11_, uinst/11_): `{prompt, output}`, the prompt
  in the Alpaca template already, with `<n>` for a line break, the output a string or a list
- Unnatural Instructions (core) and Self-Instruct's user-oriented tasks: `{instruction, instances: [{input,
  output}]}`, one example for each instance
- Super-NaturalInstructions: `{Definition, Instances: [{input, output: [...]}]}`, one task file a line
- MT-bench: `{turns: [...], reference}`; the first turn is the prompt
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stillhouse.config import ListOf
from stillhouse.core.types import PromptContent, Response
from stillhouse.data import DataConfig, DatasetConfig, DatasetField, Encoder
from stillhouse.data.formats import read_row
from stillhouse.data.rows import Fields, Row
from stillhouse.engines.base import Sampling
from stillhouse.errors import DataError
from stillhouse.evaluate.metrics.text import (
    corpus_bleu,
    corpus_chrf,
    corpus_interval,
    rouge_l_if_referenced,
)
from stillhouse.evaluate.tasks.base import REGISTRY, EvalContext, EvalTask
from stillhouse.evaluate.tasks.exact_match import normalized
from stillhouse.evaluate.tasks.prompts import EvalExample, EvalSet, ScoredTask, Scores, mean_over_seeds

if TYPE_CHECKING:
    from stillhouse.evaluate.likelihood import TokenSums

Metric = Literal["rouge_l", "bleu", "chrf", "exact_match"]
CORPUS_METRICS: dict[Literal["bleu", "chrf"], Callable[[Sequence[str], Sequence[Sequence[str]]], float]] = {
    "bleu": corpus_bleu,
    "chrf": corpus_chrf,
}

ALPACA_PROMPT = re.compile(
    r"\ABelow is an instruction that describes a task.*?### Instruction:\n(?P<instruction>.*?)"
    r"(?:\n\n### Input:\n(?P<input>.*?))?\n\n### Response:\n?\Z",
    re.DOTALL,
)

PROTOCOLS: dict[str, dict[str, Any]] = {
    "minillm": {
        "template": {"kind": "alpaca"},
        "max_prompt": 256,
        "too_long": "first_tokens",
        "seeds": (10, 20, 30, 40, 50),
        "sampling": {"temperature": 1.0, "max_tokens": 256, "no_repeat_ngram_size": 6},
    }
}
"""Defaults of each protocol; the configuration overrides them."""


def instruction_rows(raw: Mapping[str, Any], fields: Fields, where: str) -> list[Row]:
    """The examples in one row of any of the formats above.

    Raises:
        DataError: the row has none of these formats.
    """
    if fields.model_dump(exclude_none=True):
        return [read_row(raw, fields, where)]
    if isinstance(raw.get("Instances"), list):
        definition = raw.get("Definition", "")
        instruction = definition[0] if isinstance(definition, list) and definition else definition
        return list(_instances(str(instruction), raw["Instances"], fields, where))
    if isinstance(raw.get("instances"), list):
        return list(_instances(str(raw.get("instruction", "")), raw["instances"], fields, where))
    if isinstance(raw.get("turns"), list) and raw["turns"]:
        reference = raw.get("reference")
        outputs = reference[:1] if isinstance(reference, list) else []
        return [read_row({"instruction": raw["turns"][0], "outputs": outputs}, fields, where)]
    if "instruction" not in raw and isinstance(raw.get("prompt"), str):
        return [read_row(_without_alpaca_template(raw), fields, where)]
    return [read_row(raw, fields, where)]


def _instances(instruction: str, instances: Iterable[Any], fields: Fields, where: str) -> Iterable[Row]:
    for number, instance in enumerate(instances, start=1):
        if not isinstance(instance, Mapping):
            raise DataError(f"{where}: instance {number} should be an object, got {instance!r:.80}")
        row = {"instruction": instruction, "input": instance.get("input") or ""}
        if instance.get("output") is not None:
            row["output"] = instance["output"]
        yield read_row(row, fields, f"{where} (instance {number})")


def _without_alpaca_template(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with `instruction` and `input` in place of a prompt in the Alpaca template, so that any
    template can be used; that of Alpaca gives the same prompt back."""
    text = raw["prompt"].replace("<n>", "\n")
    match = ALPACA_PROMPT.match(text)
    if match is None:
        return {**raw, "prompt": text}
    rest = {key: value for key, value in raw.items() if key != "prompt"}
    return {**rest, "instruction": match["instruction"], "input": match["input"] or ""}


class FreeTextTask(ScoredTask):
    """Open-ended responses, compared with references."""

    metrics: ListOf[Metric] = ("rouge_l",)
    """Any of rouge_l, bleu, chrf, exact_match. BLEU and chrF are over all responses of a seed together, as
    sacrebleu computes them (extra [eval])."""
    likelihood: bool = True
    """Also the loss on the references and, with a teacher, fidelity there and on the own responses."""
    min_reference_words: Annotated[int, Field(ge=1)] | None = None
    """Leave out examples whose first reference has fewer words."""

    def parse_row(self, raw: Mapping[str, Any], where: str, dataset: DatasetConfig) -> Row | Iterable[Row]:
        """All formats of `instruction_rows`."""
        rows = instruction_rows(raw, dataset.fields, where)
        minimum = self.min_reference_words or 0
        return [row for row in rows if not minimum or len((row.response or "").split()) >= minimum]

    def score_all(self, examples: Sequence[EvalExample], responses: Sequence[str]) -> Sequence[Scores]:
        """ROUGE-L and exact match of each response; nothing for an example without references."""
        references = [example.prompt.references for example in examples]
        scored: list[dict[str, float]] = [{} for _ in responses]
        if "rouge_l" in self.metrics:
            for scores, value in zip(scored, rouge_l_if_referenced(responses, references), strict=True):
                if value is not None:
                    scores["rouge_l"] = value
        if "exact_match" in self.metrics:
            for scores, response, accepted in zip(scored, responses, references, strict=True):
                if accepted:
                    scores["exact_match"] = float(normalized(response) in map(normalized, accepted))
        return scored

    def score(self, example: EvalExample, response: str) -> Scores:
        """The scores of one response."""
        return self.score_all([example], [response])[0]

    def aggregate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Scores averaged over responses, BLEU and chrF over all responses of a seed with their intervals;
        then mean and standard deviation over seeds."""
        wanted = [name for name in CORPUS_METRICS if name in self.metrics]
        ends: dict[str, list[float]] = {}
        per_seed: list[dict[str, Any]] = []
        for seed in dict.fromkeys(row["seed"] for row in rows):
            referenced = [row for row in rows if row["seed"] == seed and row["references"]]
            texts, references = [r["response"] for r in referenced], [r["references"] for r in referenced]
            values: dict[str, float] = {
                name: CORPUS_METRICS[name](texts, references) for name in wanted if referenced
            }
            for name in wanted if len(referenced) > 1 else ():
                for end, value in zip(("low", "high"), corpus_interval(name, texts, references), strict=True):
                    ends.setdefault(f"{name}_{end}", []).append(value)
            per_seed.append({"seed": seed, **values})
        means = {name: fmean(values) for name, values in ends.items()}
        return {**super().aggregate(rows), **mean_over_seeds(per_seed, wanted), **means}

    def extra_metrics(
        self, context: EvalContext, examples: Sequence[EvalExample], responses: Sequence[Response]
    ) -> tuple[dict[str, float], TokenSums]:
        """Loss on the references; with a teacher also fidelity there and on the student's own responses."""
        if not self.likelihood:
            return {}, {}
        from stillhouse.evaluate.likelihood import likelihood_metrics

        prompts = [example.prompt for example in examples]
        options = context.likelihood_options()
        return likelihood_metrics(context.model, context.teacher, prompts, responses, **options)

    def score_settings(self) -> dict[str, Any]:
        """Definitions of the metrics."""
        definitions = {
            "rouge_l": "rouge-score rougeL F, stemmer, best over references",
            "bleu": "sacrebleu BLEU of the responses of one seed, 13a tokenizer, exponential smoothing",
            "chrf": "sacrebleu chrF2 of the responses of one seed",
            "exact_match": "ignoring case, punctuation and white space",
        }
        settings: dict[str, Any] = {name: definitions[name] for name in self.metrics}
        if self.likelihood:
            settings["loss"] = "nats per reference token"
            settings["fidelity"] = "on references; _on_own_text: on the responses of the first seed"
        return settings


@REGISTRY.register
class Instructions(FreeTextTask):
    """ROUGE-L (also BLEU, chrF, exact match) of responses sampled at temperature 1 with five seeds; loss and
    fidelity on the references and on the student's own responses.

    `protocol: minillm` adds the other settings of the evaluation code that MiniLLM and DistiLLM released:
    the Alpaca template, prompts cut to their first 256 tokens, at most 256 new tokens, and no 6-gram twice
    in prompt and response (evaluate_main.py and prompt_datasets.py in microsoft/LMOps, minillm). Each can
    be overridden. That last setting is in no paper and changes results; without the protocol it is off.

    `sets` makes one task of each of several files:
    `{kind: instructions, protocol: minillm, sets: {dolly: dolly_eval.jsonl, vicuna: vicuna80_eval.jsonl}}`

    Source: MiniLLM (arXiv 2306.08543) section 3.1; DistiLLM, ABKD and CSD follow it.
    """

    kind: Literal["instructions"] = "instructions"
    protocol: Literal["minillm"] | None = None
    """The settings of a paper, where none are given here."""
    sets: dict[str, DatasetField] | None = None
    """Several files of rows by the names of their tasks, in place of `data`."""
    sampling: Sampling | None = Sampling(temperature=1.0)
    """How responses are sampled. `no_repeat_ngram_size` is 0 unless set here or by the protocol."""
    seeds: ListOf[Annotated[int, Field(ge=0)]] | None = (10, 20, 30, 40, 50)
    """One pass over the prompts for each."""

    @model_validator(mode="before")
    @classmethod
    def _apply_protocol(cls, given: Any) -> Any:
        protocol = given.get("protocol") if isinstance(given, Mapping) else None
        if protocol not in PROTOCOLS:
            return given
        values = {**PROTOCOLS[protocol], **given}
        sampling = given.get("sampling")
        if isinstance(sampling, Mapping):
            values["sampling"] = {**PROTOCOLS[protocol]["sampling"], **sampling}
        return values

    @model_validator(mode="after")
    def _data_or_sets(self) -> Self:
        if self.sets is not None and self.data is not None:
            raise ValueError("needs data or sets, not both")
        return self

    def expanded(self) -> Sequence[EvalTask]:
        """One task for each set."""
        if not self.sets:
            return (self,)
        return [
            self.model_copy(update={"name": name, "data": dataset, "sets": None})
            for name, dataset in self.sets.items()
        ]

    def datasets(self) -> Mapping[str, DatasetConfig]:
        """Its rows, or those of all sets."""
        sets = self.sets or {}
        return {**super().datasets(), **{f"sets.{name}": dataset for name, dataset in sets.items()}}


@REGISTRY.register
class E2E(FreeTextTask):
    """Restaurant descriptions from facts (E2E NLG, Novikova et al. 2017): greedy decoding, ROUGE-L, BLEU
    and chrF against several references.

    Rows are `{instruction, input, outputs: [...]}`. Rows with the same prompt are one example with all of
    their references, as the data set's own metric has it.
    """

    kind: Literal["e2e"] = "e2e"
    metrics: ListOf[Metric] = ("rouge_l", "bleu", "chrf")
    sampling: Sampling | None = Sampling(temperature=0.0)
    """How responses are decoded."""
    seeds: ListOf[Annotated[int, Field(ge=0)]] | None = (10,)
    """One pass over the prompts for each; greedy decoding needs one."""

    def load(
        self,
        encoder: Encoder,
        limits: DataConfig,
        held_out: DatasetConfig | None = None,
        limit: int | None = None,
    ) -> EvalSet:
        """The examples, those with equal prompts merged."""
        eval_set = super().load(encoder, limits, held_out, limit)
        merged: dict[PromptContent, EvalExample] = {}
        for example in eval_set.examples:
            first = merged.get(example.prompt.content)
            if first is not None:
                references = dict.fromkeys((*first.prompt.references, *example.prompt.references))
                example = replace(first, prompt=replace(first.prompt, references=tuple(references)))
            merged[example.prompt.content] = example
        return replace(eval_set, examples=tuple(merged.values()))
