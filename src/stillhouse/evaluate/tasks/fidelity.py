"""Fidelity of a student to its teacher, and the trade-off of quality and diversity over temperatures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from stillhouse.config import ListOf
from stillhouse.core.types import Response
from stillhouse.engines.base import Sampling
from stillhouse.evaluate.generation import Generations, response_statistics, to_responses, with_sums
from stillhouse.evaluate.metrics.text import distinct_n, rouge_l_if_referenced, self_bleu
from stillhouse.evaluate.tasks.base import REGISTRY, EvalContext, TaskResult
from stillhouse.evaluate.tasks.prompts import EvalSession, PromptTask, mean_over_seeds

if TYPE_CHECKING:
    from stillhouse.evaluate.likelihood import TokenSums

SAMPLED = Sampling(temperature=1.0)


@REGISTRY.register
class TeacherFidelity(PromptTask):
    """KL both ways, TVD, top-1 agreement, loss and calibration error of both models, on references,
    teacher-generated and student-generated text.

    Metrics on text that the teacher generated end in `_on_teacher_text`, those on the student's own in
    `_on_own_text`. On each: KL(teacher || student) and KL(student || teacher) in nats per token, total
    variation distance, top-1 agreement, the loss -log q, and the expected calibration error of student and
    teacher. Responses are sampled at temperature 1 unless set otherwise, so that they come from the
    distributions that are compared. Of the teacher itself: loss and calibration error.
    """

    kind: Literal["fidelity"] = "fidelity"
    sampling: Sampling | None = SAMPLED
    """How both models sample."""

    def evaluate(self, context: EvalContext) -> TaskResult:
        """Generate with both models, then compare."""
        from stillhouse.evaluate.likelihood import merge_sums, references_of

        session = self.session(context)
        prompts = session.eval_set.prompts
        rows: dict[tuple[str, int], dict[str, Any]] = {}
        texts = {"": references_of(prompts)}
        authors = {"own": context.model}
        if context.teacher is not None:
            authors["teacher"] = context.teacher
        for author, model in authors.items():
            own = author == "own"
            generations = session.generate(prompts, model=model, name="" if own else author)
            texts[f"_on_{author}_text"] = [
                response
                for completions in generations.by_seed.values()
                for response in to_responses(prompts, completions, context.role if own else author)
            ]
            for seed, completions in generations.by_seed.items():
                for example, completion in zip(session.eval_set.examples, completions, strict=True):
                    key, text = (example.prompt.id, seed), session.decode(completion)
                    if own:
                        rows[key] = session.row(example, seed, completion, text)
                    else:
                        rows[key]["teacher_response"] = text
        metrics: dict[str, Any] = {}
        sums: TokenSums = {}
        for suffix, responses in texts.items():
            if responses:
                found, by_prompt = _compare(context, responses)
                metrics |= {f"{name}{suffix}": value for name, value in found.items()}
                merge_sums(sums, by_prompt, suffix)
        settings = {
            **session.settings(),
            "texts": "references; _on_teacher_text, _on_own_text: sampled from teacher and student",
            "calibration": "expected calibration error of next-token predictions, 15 equal bins",
        }
        return TaskResult(metrics, settings, with_sums(list(rows.values()), sums))


def _compare(context: EvalContext, responses: Sequence[Response]) -> tuple[dict[str, float], TokenSums]:
    from stillhouse.evaluate.likelihood import likelihood

    result = likelihood(context.model, responses, teacher=context.teacher, **context.likelihood_options())
    metrics = {"loss": result.loss, "calibration_error": result.calibration_error}
    if result.fidelity is not None and result.teacher_calibration_error is not None:
        metrics |= result.fidelity.as_metrics()
        metrics["teacher_calibration_error"] = result.teacher_calibration_error
    return metrics, result.sums


@REGISTRY.register
class DiversityCurve(PromptTask):
    """ROUGE-L, Self-BLEU and distinct-1 to -4 over temperatures: the fidelity-diversity curve
    (`metrics.curve`).

    For each temperature: ROUGE-L (mean over responses, then over seeds), Self-BLEU of at most 200 responses
    of a seed (lower is more diverse), distinct-1 to distinct-4. A method is better where its curve lies
    higher at the same diversity. The plain metrics are those of the temperature nearest to 1. Needs the
    extra [eval].

    Source: the figure of CSD (arXiv 2509.25837); the metrics as in Texygen (Self-BLEU) and Li et al. 2016.
    """

    kind: Literal["curve"] = "curve"
    temperatures: ListOf[Annotated[float, Field(gt=0)]] = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
    """The points of the curve."""
    sampling: Sampling | None = SAMPLED
    """How responses are sampled, except for the temperature."""

    def evaluate(self, context: EvalContext) -> TaskResult:
        """Generate at every temperature."""
        session = self.session(context)
        rows: list[dict[str, Any]] = []
        points: list[dict[str, float]] = []
        for temperature in dict.fromkeys(self.temperatures):
            sampling = session.sampling.model_copy(update={"temperature": temperature})
            name = f"T={temperature:g}"
            generations = session.generate(session.eval_set.prompts, sampling=sampling, name=name)
            scored = _scored_rows(session, generations, temperature)
            rows += scored
            points.append(_point(temperature, scored, generations.seconds))
        nearest = min(points, key=lambda point: abs(point["temperature"] - 1.0))
        metrics = {name: value for name, value in nearest.items() if name != "temperature"}
        settings = {
            **session.settings(),
            "temperature of the metrics": nearest["temperature"],
            "self_bleu": "sacrebleu BLEU-4 of each response against the others of its seed, at most 200",
        }
        return TaskResult({**metrics, "curve": points}, settings, rows)


def _scored_rows(session: EvalSession, generations: Generations, temperature: float) -> list[dict[str, Any]]:
    rows = []
    examples = session.eval_set.examples
    for seed, completions in generations.by_seed.items():
        texts = [session.decode(completion) for completion in completions]
        scores = rouge_l_if_referenced(texts, [example.prompt.references for example in examples])
        for example, text, completion, score in zip(examples, texts, completions, scores, strict=True):
            row = {**session.row(example, seed, completion, text), "temperature": temperature}
            rows.append(row if score is None else {**row, "rouge_l": score})
    return rows


def _point(temperature: float, rows: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, float]:
    """Quality and diversity at one temperature; diversity within each seed, then averaged."""
    per_seed = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        texts = [row["response"] for row in rows if row["seed"] == seed]
        words = [text.split() for text in texts]
        diversity = {f"distinct_{n}": distinct_n(words, n) for n in range(1, 5)}
        if len(texts) > 1:
            diversity["self_bleu"] = self_bleu(texts)
        per_seed.append({"seed": seed, **diversity})
    names = [name for name in per_seed[0] if name != "seed"]
    statistics = {n: v for n, v in response_statistics(rows, seconds).items() if n != "distinct_2"}
    return {
        "temperature": temperature,
        **mean_over_seeds(rows, ["rouge_l"]),
        **mean_over_seeds(per_seed, names),
        **statistics,
    }
