"""What a model answers to held-out prompts, and how good that is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.engines import shown
from stillhouse.engines.base import Engine, Sampling
from stillhouse.errors import DataError
from stillhouse.evaluate.metrics.diversity import distinct_n
from stillhouse.evaluate.metrics.lengths import lengths
from stillhouse.evaluate.metrics.rouge import rouge_l
from stillhouse.types import Completion, Prompt, Response


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers of one model to all prompts, for each seed, with their scores.

    Example: `Answers(metrics={"rouge_l": 57.1, ...}, rows=[{"id": "valid:0", ...}], responses=[...])`
    """

    metrics: dict[str, float]
    """Means over seeds; `rouge_l_std` is the standard deviation over seeds (0 for one seed)."""
    rows: list[dict[str, Any]]
    """One row for each prompt and seed, as the run folder keeps them."""
    responses: list[Response]
    """The answers of the first seed as token ids."""


def answer(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seeds: Sequence[int],
    tokenizer: Any,
    *,
    source: Any = "student",
    title: str | None = None,
) -> Answers:
    """Let a model answer and score it: ROUGE-L, length, termination, distinct bigrams, speed.

    Args:
        engine: who answers.
        prompts: with references.
        sampling: how answers are written.
        seeds: one pass over the prompts for each.
        tokenizer: turns answers into text for scoring; never back.
        source: "student" or "teacher", noted in the responses.
        title: show progress under this title.

    Raises:
        DataError: no prompt has a reference.
    """
    prompts = [prompt for prompt in prompts if prompt.references]
    if not prompts:
        raise DataError(
            "evaluation needs prompts with references, and there are none. Set evaluate.data or data.valid."
        )
    ids = [prompt.token_ids for prompt in prompts]
    scores: list[float] = []
    rows: list[dict[str, Any]] = []
    first: list[Completion] = []
    seconds = 0.0
    for seed in seeds:
        start = time.perf_counter()
        completions = shown.generate(engine, ids, sampling, seed, title)
        seconds += time.perf_counter() - start
        texts = [tokenizer.decode(list(c.token_ids), skip_special_tokens=True).strip() for c in completions]
        rouge = rouge_l(texts, [prompt.references for prompt in prompts])
        scores.append(rouge.mean)
        first = first or completions
        for prompt, text, score, done in zip(prompts, texts, rouge.rows, completions, strict=True):
            rows.append(
                {
                    "id": prompt.id,
                    "seed": seed,
                    "prompt": prompt.text,
                    "references": list(prompt.references),
                    "response": text,
                    "rouge_l": round(score, 4),
                    "finished": done.finished,
                    "tokens": len(done.token_ids),
                }
            )
    tokens = [row["tokens"] for row in rows]
    metrics = {
        "rouge_l": statistics.fmean(scores),
        "rouge_l_std": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        **lengths(tokens, [row["finished"] for row in rows]).as_metrics(),
        "distinct_2": distinct_n([row["response"].split() for row in rows], 2),
        "tokens_per_second": sum(tokens) / max(seconds, 1e-9),
    }
    responses = [
        Response(prompt, done.token_ids, source, done.finished)
        for prompt, done in zip(prompts, first, strict=True)
    ]
    return Answers(metrics, rows, responses)
