"""How near a student is to its teacher, on whose text, and how much its own texts differ from each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from stillhouse.config import ListOf
from stillhouse.core.types import Response
from stillhouse.engines.base import Sampling
from stillhouse.evaluate.answers import Written, as_responses, text_statistics
from stillhouse.evaluate.metrics.diversity import distinct_n, self_bleu
from stillhouse.evaluate.metrics.rouge import rouge_of
from stillhouse.evaluate.tasks.asking import Asking, Sitting
from stillhouse.evaluate.tasks.base import means_over_seeds
from stillhouse.evaluate.tasks.probe import REGISTRY, Bench, Outcome

SAMPLED = Sampling(temperature=1.0)


@REGISTRY.register
class FidelityProbe(Asking):
    """The student's distribution beside the teacher's on three kinds of text: the references, what the
    teacher writes (`_on_teacher_text`) and what the student writes (`_on_own_text`).

    On each: KL(teacher || student) and KL(student || teacher) in nats per token, total variation distance,
    top-1 agreement, the loss -log q, and the expected calibration error of student and teacher. Texts are
    sampled at temperature 1 unless set otherwise, so that the last two are drawn from the distributions that
    are compared. Of the teacher itself: loss and calibration.
    """

    kind: Literal["fidelity"] = "fidelity"
    sampling: Sampling | None = SAMPLED
    """How both write."""

    def measure(self, bench: Bench) -> Outcome:
        """Write, then compare."""
        from stillhouse.evaluate.likelihood import references_of

        sitting = self.begin(bench)
        prompts = sitting.prompts
        rows: dict[tuple[str, int], dict[str, Any]] = {}
        texts = {"": references_of(prompts)}
        for whose in ("own", "teacher") if bench.teacher is not None else ("own",):
            model = bench.model if whose == "own" else bench.teacher
            written = sitting.write(prompts, model=model, piece="" if whose == "own" else "teacher")
            texts[f"_on_{whose}_text"] = [
                response
                for completions in written.by_seed.values()
                for response in as_responses(
                    prompts, completions, bench.role if whose == "own" else "teacher"
                )
            ]
            for seed, completions in written.by_seed.items():
                for question, done in zip(sitting.asked.questions, completions, strict=True):
                    row = rows.setdefault((question.prompt.id, seed), sitting.row(question, seed))
                    if whose == "teacher":
                        row["teacher_response"] = sitting.text(done)
                        continue
                    row |= {"response": sitting.text(done), "tokens": len(done.token_ids)}
                    row["finished"] = done.finished
        metrics: dict[str, Any] = {}
        for suffix, responses in texts.items():
            if responses:
                metrics |= {f"{name}{suffix}": value for name, value in _on(bench, responses).items()}
        settings = {
            **sitting.settings(),
            "texts": "references; _on_teacher_text, _on_own_text: sampled from teacher and student",
            "calibration": "expected calibration error of next-token predictions, 15 equal bins",
        }
        return Outcome(metrics, settings, list(rows.values()))


def _on(bench: Bench, responses: Sequence[Response]) -> dict[str, float]:
    from stillhouse.evaluate.likelihood import likelihood

    found = likelihood(bench.model, responses, teacher=bench.teacher, **bench.options())
    metrics = {"loss": found.loss, "calibration_error": found.calibration}
    if found.fidelity is not None and found.teacher_calibration is not None:
        metrics |= found.fidelity.as_metrics()
        metrics["teacher_calibration_error"] = found.teacher_calibration
    return metrics


@REGISTRY.register
class CurveProbe(Asking):
    """The fidelity-diversity curve: ROUGE-L against how varied the answers are, over temperatures.

    For each temperature the answers of all seeds: ROUGE-L (mean over answers, then over seeds), Self-BLEU of
    at most 200 answers of a seed (lower is more varied), distinct-1 to distinct-4. A method is better where
    its curve lies higher at the same diversity. `metrics.curve` holds the points; the plain metrics are those
    of the temperature nearest to 1. Needs the extra [eval].

    Source: the picture of CSD (arXiv 2509.25837); the measures as in Texygen (Self-BLEU) and Li et al. 2016.
    """

    kind: Literal["curve"] = "curve"
    temperatures: ListOf[Annotated[float, Field(gt=0)]] = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
    """Where the curve has points."""
    sampling: Sampling | None = SAMPLED
    """How answers are written, but for the temperature."""

    def measure(self, bench: Bench) -> Outcome:
        """Answer at every temperature."""
        sitting = self.begin(bench)
        rows: list[dict[str, Any]] = []
        points: list[dict[str, float]] = []
        for temperature in dict.fromkeys(self.temperatures):
            sampling = sitting.sampling.model_copy(update={"temperature": temperature})
            written = sitting.write(sitting.prompts, sampling=sampling, piece=f"T={temperature:g}")
            found = _scored(sitting, written, temperature)
            rows += found
            points.append(_point(temperature, found, written.seconds))
        nearest = min(points, key=lambda point: abs(point["temperature"] - 1.0))
        metrics = {name: value for name, value in nearest.items() if name != "temperature"}
        settings = {
            **sitting.settings(),
            "temperature of the metrics": nearest["temperature"],
            "self_bleu": "sacrebleu BLEU-4 of each answer against the others of its seed, at most 200",
        }
        return Outcome({**metrics, "curve": points}, settings, rows)


def _scored(sitting: Sitting, written: Written, temperature: float) -> list[dict[str, Any]]:
    rows = []
    for seed, completions in written.by_seed.items():
        texts = [sitting.text(done) for done in completions]
        scores = rouge_of(texts, [prompt.references for prompt in sitting.prompts])
        for question, text, done, score in zip(
            sitting.asked.questions, texts, completions, scores, strict=True
        ):
            row = {**sitting.row(question, seed), "temperature": temperature, "response": text}
            row |= {"tokens": len(done.token_ids), "finished": done.finished}
            rows.append(row if score is None else {**row, "rouge_l": score})
    return rows


def _point(temperature: float, rows: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, float]:
    """Quality and diversity at one temperature; diversity is measured for each seed alone, then averaged."""
    per_seed = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        texts = [row["response"] for row in rows if row["seed"] == seed]
        words = [text.split() for text in texts]
        diversity = {f"distinct_{n}": distinct_n(words, n) for n in range(1, 5)}
        if len(texts) > 1:
            diversity["self_bleu"] = self_bleu(texts)
        per_seed.append({"seed": seed, **diversity})
    names = [name for name in per_seed[0] if name != "seed"]
    statistics = {n: v for n, v in text_statistics(rows, seconds).items() if n != "distinct_2"}
    return {
        "temperature": temperature,
        **means_over_seeds(rows, ["rouge_l"]),
        **means_over_seeds(per_seed, names),
        **statistics,
    }
