"""Responses of a model to held-out prompts, and their scores.

Responses are generated and kept in blocks, so that an interruption loses one block only.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stillhouse import console
from stillhouse.core.distributed import SINGLE_PROCESS, World, is_sharded
from stillhouse.core.journal import Journal, content_digest
from stillhouse.core.seeds import derived_seed
from stillhouse.core.types import Completion, Prompt, Response, images_of
from stillhouse.data.text_tokens import response_text
from stillhouse.engines.base import Engine, Sampling
from stillhouse.errors import DataError
from stillhouse.evaluate.metrics.text import distinct_n, length_statistics, rouge_l
from stillhouse.evaluate.shown_images import ShownImages

if TYPE_CHECKING:
    from torch import nn

BLOCK_SIZE = 256
"""Prompts per call of the engine. Seeds depend on it, so that interrupted and straight evaluations agree."""


@dataclass(frozen=True)
class Share:
    """The part of the prompts that this process completes: every n-th of each block of `generate`."""

    world: World = SINGLE_PROCESS
    in_step: bool = False
    """Every process completes all prompts, because the weights are spread over them."""

    @classmethod
    def of(cls, world: World, model: nn.Module) -> Share:
        """The share in what a model completes."""
        return cls(world, is_sharded(model))

    def local_indices(self, count: int) -> range:
        """The indices of the prompts, of `count` in all, that this process completes."""
        return range(count) if self.in_step else range(count)[self.world.rank :: self.world.size]

    def of_first(self, value: Any) -> Any:
        """What the first process has."""
        return value if self.world.size == 1 else self.world.gather(value)[0]

    def of_all(self, written: list[Any], count: int) -> list[Any]:
        """What all processes have written, in the order of the prompts."""
        if self.world.size == 1:
            return written
        shares = self.world.gather(written)
        if self.in_step:
            return list(shares[0])
        return [shares[place % self.world.size][place // self.world.size] for place in range(count)]


ALONE = Share()


@dataclass(frozen=True, slots=True)
class Generations:
    """Completions of one model for all prompts.

    Example: `Generations({10: [Completion((41, 0), True), ...], 20: [...]}, seconds=3.1)`
    """

    by_seed: dict[int, list[Completion]]
    """For each seed one completion per prompt, in the order of the prompts."""
    seconds: float
    """Generation time, that of an interrupted evaluation included."""


def generate(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seeds: Sequence[int],
    *,
    journal: Journal | None = None,
    title: str | None = None,
    share: Share = ALONE,
) -> Generations:
    """Complete every prompt once per seed.

    Of several processes each completes every n-th prompt of a block, with the random numbers that the prompt
    has in one process, and all get the whole; the first one keeps the journal.

    Args:
        engine: generates.
        prompts: equal prompts get completions of their own.
        sampling: temperature, length limit and so on.
        seeds: one pass over the prompts for each.
        journal: the blocks that an interrupted evaluation has finished; new ones are added.
        title: show progress under this title.
        share: of this process.
    """
    journal = Journal() if journal is None else journal
    by_seed: dict[int, list[Completion]] = {seed: [] for seed in seeds}
    seconds = 0.0
    with _progress(title if share.world.rank == 0 else None, len(by_seed) * len(prompts)) as advance:
        for seed, completions in by_seed.items():
            for index, start in enumerate(range(0, len(prompts), BLOCK_SIZE)):
                inputs = prompts[start : start + BLOCK_SIZE]
                block = share.of_first(journal.get(f"{seed}/{index}"))
                if block is None:
                    block = _generate_block(
                        engine, inputs, sampling, _block_seed(seed, index), advance, share
                    )
                    if share.world.rank == 0:
                        journal.put(f"{seed}/{index}", block)
                else:
                    advance(len(inputs))
                completions += [Completion(tuple(ids), finished) for ids, finished in block["completions"]]
                seconds += block["seconds"]
    return Generations(by_seed, seconds)


def _block_seed(seed: int, index: int) -> int:
    return seed if index == 0 else derived_seed(seed, "answers", index)  # the label is part of the seed


def _generate_block(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int,
    advance: Callable[[int], object],
    share: Share,
) -> dict[str, Any]:
    start, shown, own = time.perf_counter(), 0, share.local_indices(len(prompts))

    def progress(finished: int, _total: int) -> None:
        nonlocal shown
        advance(finished - shown)
        shown = finished

    mine = [prompts[place] for place in own]
    completions = (
        engine.generate(
            [prompt.token_ids for prompt in mine],
            sampling,
            seed,
            sample_ids=own,
            progress=progress,
            images=images_of(mine),
        )
        if mine
        else []
    )
    written = share.of_all([[list(one.token_ids), one.finished] for one in completions], len(prompts))
    advance(len(prompts) - len(mine))
    return {"seconds": round(time.perf_counter() - start, 6), "completions": written}


@contextlib.contextmanager
def _progress(title: str | None, total: int) -> Iterator[Callable[[int], object]]:
    if title is None:
        yield lambda count: None
        return
    with console.progress(title, total=total) as meter:
        yield meter.advance


def response_statistics(rows: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, float]:
    """Length, termination, distinct bigrams and speed, from the rows that a run folder keeps."""
    tokens = [row["tokens"] for row in rows]
    return {
        **length_statistics(tokens, [row["finished"] for row in rows]),
        "distinct_2": distinct_n([row["response"].split() for row in rows], 2),
        "tokens_per_second": sum(tokens) / max(seconds, 1e-9),
    }


@dataclass(frozen=True, slots=True)
class ScoredResponses:
    """Responses of one model to all prompts, for each seed, with their scores.

    Example: `ScoredResponses(metrics={"rouge_l": 57.1, ...}, rows=[{"id": "valid:0", ...}], responses=[...])`
    """

    metrics: dict[str, float]
    """Means over seeds; `rouge_l_std` is the standard deviation over seeds (0 for one seed)."""
    rows: list[dict[str, Any]]
    """One row for each prompt and seed, as the run folder keeps them."""
    responses: list[Response]
    """The responses of the first seed as token ids."""


def generate_and_score(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seeds: Sequence[int],
    tokenizer: Any,
    *,
    title: str | None = None,
    journal: Journal | None = None,
    share: Share = ALONE,
) -> ScoredResponses:
    """Generate responses and score them: ROUGE-L, length, termination, distinct bigrams, speed.

    Args:
        engine: generates.
        prompts: those without references are left out.
        sampling: temperature, length limit and so on.
        seeds: one pass over the prompts for each.
        tokenizer: decodes responses for scoring; text is never encoded again.
        title: show progress under this title.
        journal: the blocks that an interrupted evaluation has finished.
        share: of this process.

    Raises:
        DataError: no prompt has a reference.
    """
    prompts = [prompt for prompt in prompts if prompt.references]
    if not prompts:
        raise DataError(
            "evaluation needs prompts with references, and there are none. Set evaluate.data or data.valid."
        )
    generations = generate(engine, prompts, sampling, seeds, journal=journal, title=title, share=share)
    seed_means: list[float] = []
    rows: list[dict[str, Any]] = []
    shown = ShownImages()
    for seed, completions in generations.by_seed.items():
        texts = [response_text(tokenizer, one.token_ids).strip() for one in completions]
        scores = rouge_l(texts, [prompt.references for prompt in prompts])
        seed_means.append(statistics.fmean(scores))
        rows += [
            _row(prompt, seed, text, score, completion, shown)
            for prompt, text, score, completion in zip(prompts, texts, scores, completions, strict=True)
        ]
    metrics = {
        "rouge_l": statistics.fmean(seed_means),
        "rouge_l_std": statistics.stdev(seed_means) if len(seed_means) > 1 else 0.0,
        **response_statistics(rows, generations.seconds),
    }
    first = next(iter(generations.by_seed.values()))
    return ScoredResponses(metrics, rows, to_responses(prompts, first, "student"))


def _row(
    prompt: Prompt, seed: int, text: str, score: float, completion: Completion, shown: ShownImages
) -> dict[str, Any]:
    # A judge reads the question in place of the prompt with its template.
    question = {"question": prompt.question} if prompt.question != prompt.text.strip() else {}
    return {
        "id": prompt.id,
        "seed": seed,
        "prompt": prompt.text,
        **question,
        **shown.fields(prompt.id, prompt.images),
        "references": list(prompt.references),
        "response": text,
        "rouge_l": round(score, 4),
        "finished": completion.finished,
        "tokens": len(completion.token_ids),
    }


def with_sums(
    rows: Sequence[dict[str, Any]], sums: Mapping[str, Mapping[str, Sequence[float]]]
) -> list[dict[str, Any]]:
    """The rows with what each prompt adds to means over tokens, `sums: {NAME: [total, tokens]}`, in its first
    row."""
    seen: set[Any] = set()
    found = []
    for row in rows:
        own = {} if row["id"] in seen else sums.get(row["id"], {})
        seen.add(row["id"])
        rounded = {name: [float(f"{total:.6g}"), tokens] for name, (total, tokens) in own.items()}
        found.append({**row, "sums": rounded} if rounded else row)
    return found


def to_responses(prompts: Sequence[Prompt], completions: Sequence[Completion], source: Any) -> list[Response]:
    """Completions as responses to their prompts, for metrics of likelihood."""
    return [
        Response(prompt, completion.token_ids, source, completion.finished)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def token_ids_digest(prompts: Iterable[Prompt]) -> str:
    """Digest of token ids, images and references of prompts, in order: equal for equal generations."""
    return content_digest(
        [[prompt.token_ids, prompt.references, *prompt.image_digests] for prompt in prompts]
    )


def questions_digest(prompts: Iterable[Prompt]) -> str:
    """Digest of questions, images and references, independent of template and tokenizer: results with equal
    digests are comparable."""
    return content_digest([[prompt.question, prompt.references, *prompt.image_digests] for prompt in prompts])
