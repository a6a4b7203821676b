"""What a model answers to held-out prompts, and how good that is.

Answers are written block by block, so that an interruption loses one block only.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse import console
from stillhouse.core.journal import Journal, content_digest
from stillhouse.core.seeds import derived_seed
from stillhouse.core.types import Completion, Prompt, Response
from stillhouse.engines.base import Engine, Sampling
from stillhouse.errors import DataError
from stillhouse.evaluate.metrics.diversity import distinct_n
from stillhouse.evaluate.metrics.lengths import lengths
from stillhouse.evaluate.metrics.rouge import rouge_l

BLOCK = 256
"""Prompts of one call of the engine. The blocks are the same whether or not an evaluation is interrupted."""


@dataclass(frozen=True, slots=True)
class Written:
    """Answers of one model to all prompts.

    Example: `Written({10: [Completion((41, 0), True), ...], 20: [...]}, seconds=3.1)`
    """

    by_seed: dict[int, list[Completion]]
    """For each seed, one completion for each prompt, in the order of the prompts."""
    seconds: float
    """Time spent writing, that of an interrupted evaluation included."""


def write_answers(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seeds: Sequence[int],
    *,
    journal: Journal | None = None,
    title: str | None = None,
) -> Written:
    """Let a model answer every prompt, once for each seed.

    Args:
        engine: who answers.
        prompts: what is asked. Equal prompts get answers of their own.
        sampling: how answers are written.
        seeds: one pass over the prompts for each.
        journal: what an interrupted evaluation of the same kind has written already.
        title: show progress under this title.
    """
    journal = Journal() if journal is None else journal
    by_seed: dict[int, list[Completion]] = {seed: [] for seed in seeds}
    seconds = 0.0
    with _progress(title, len(by_seed) * len(prompts)) as advance:
        for seed, completions in by_seed.items():
            for block, start in enumerate(range(0, len(prompts), BLOCK)):
                ids = [prompt.token_ids for prompt in prompts[start : start + BLOCK]]
                piece = journal.get(f"{seed}/{block}")
                if piece is None:
                    piece = _block(engine, ids, sampling, _seed(seed, block), advance)
                    journal.put(f"{seed}/{block}", piece)
                else:
                    advance(len(ids))
                completions += [Completion(tuple(ids), finished) for ids, finished in piece["answers"]]
                seconds += piece["seconds"]
    return Written(by_seed, seconds)


def _seed(seed: int, block: int) -> int:
    return seed if block == 0 else derived_seed(seed, "answers", block)


def _block(
    engine: Engine,
    ids: list[tuple[int, ...]],
    sampling: Sampling,
    seed: int,
    advance: Callable[[int], object],
) -> dict[str, Any]:
    start, told = time.perf_counter(), 0

    def progress(finished: int, _total: int) -> None:
        nonlocal told
        advance(finished - told)
        told = finished

    completions = engine.generate(ids, sampling, seed, progress=progress)
    return {
        "seconds": round(time.perf_counter() - start, 6),
        "answers": [[list(done.token_ids), done.finished] for done in completions],
    }


@contextlib.contextmanager
def _progress(title: str | None, total: int) -> Iterator[Callable[[int], object]]:
    if title is None:
        yield lambda count: None
        return
    with console.progress(title, total=total) as meter:
        yield meter.advance


def text_statistics(rows: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, float]:
    """Length, termination, distinct bigrams and speed, from the rows that a run folder keeps."""
    tokens = [row["tokens"] for row in rows]
    return {
        **lengths(tokens, [row["finished"] for row in rows]).as_metrics(),
        "distinct_2": distinct_n([row["response"].split() for row in rows], 2),
        "tokens_per_second": sum(tokens) / max(seconds, 1e-9),
    }


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
    journal: Journal | None = None,
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
        journal: what an interrupted evaluation has written already.

    Raises:
        DataError: no prompt has a reference.
    """
    prompts = [prompt for prompt in prompts if prompt.references]
    if not prompts:
        raise DataError(
            "evaluation needs prompts with references, and there are none. Set evaluate.data or data.valid."
        )
    written = write_answers(engine, prompts, sampling, seeds, journal=journal, title=title)
    scores: list[float] = []
    rows: list[dict[str, Any]] = []
    for seed, completions in written.by_seed.items():
        texts = [tokenizer.decode(list(c.token_ids), skip_special_tokens=True).strip() for c in completions]
        rouge = rouge_l(texts, [prompt.references for prompt in prompts])
        scores.append(rouge.mean)
        for prompt, text, score, done in zip(prompts, texts, rouge.rows, completions, strict=True):
            rows.append(
                {
                    "id": prompt.id,
                    "seed": seed,
                    "prompt": prompt.text,
                    # A judge has no use for the marks of a template.
                    **({"question": prompt.question} if prompt.question != prompt.text.strip() else {}),
                    "references": list(prompt.references),
                    "response": text,
                    "rouge_l": round(score, 4),
                    "finished": done.finished,
                    "tokens": len(done.token_ids),
                }
            )
    metrics = {
        "rouge_l": statistics.fmean(scores),
        "rouge_l_std": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        **text_statistics(rows, written.seconds),
    }
    first = next(iter(written.by_seed.values()))
    return Answers(metrics, rows, as_responses(prompts, first, source))


def prompts_digest(prompts: Iterable[Prompt]) -> str:
    """Stands for the token ids and references of prompts, in their order."""
    return content_digest([[prompt.token_ids, prompt.references] for prompt in prompts])


def questions_digest(prompts: Iterable[Prompt]) -> str:
    """Stands for questions and right answers, whatever the template and the tokenizer: results are comparable
    where it is the same."""
    return content_digest([[prompt.question, prompt.references] for prompt in prompts])


def as_responses(prompts: Sequence[Prompt], completions: Sequence[Completion], source: Any) -> list[Response]:
    """Completions as the responses of their prompts, for measures of likelihood."""
    return [
        Response(prompt, done.token_ids, source, done.finished)
        for prompt, done in zip(prompts, completions, strict=True)
    ]
