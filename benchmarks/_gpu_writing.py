"""Stage of gpu.py: writing text, our engine against transformers' `generate` and `generate_batch`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _gpu_models import SHAPES, SMALL_VOCAB, Place, attempt, saved
from transformers import AutoModelForCausalLM, GenerationConfig

from stillhouse.engines import Sampling, TokenizerInfo
from stillhouse.engines.transformers import TransformersConfig

Writer = Callable[[], int]
"""Writes for all prompts; returns the number of tokens."""


def stage(place: Place) -> Iterator[dict[str, Any]]:
    """32 prompts of 128 to 256 tokens, 256 new tokens each; random weights, so nothing ends early."""
    rows, new, wide = (4, 8, 16) if place.small else (32, 256, 256)
    for name in ("0.5B",) if place.small else ("0.5B", "3B"):
        dtype = torch.bfloat16 if place.cuda else torch.float32
        model = AutoModelForCausalLM.from_pretrained(saved(place, name, dtype)).to(place.device).eval()
        draw = random.Random(0)
        vocab = SMALL_VOCAB if place.small else SHAPES[name].vocab
        prompts = [
            [draw.randrange(3, vocab) for _ in range(draw.randint(wide // 2, wide))] for _ in range(rows)
        ]
        for who, writer in WRITERS.items():
            row: dict[str, Any] = {"who": who, "model": name, "rows": rows, "new_tokens": new}
            place.forget()
            if who == "generate_batch" and not place.cuda:
                row["skipped"] = "its default cache makes it take minutes on a CPU: see generate_batch.py"
            else:
                with attempt(row):
                    row |= measured(place, writer(model, prompts, new), new)
                if who == "generate_batch":
                    model.destroy_cached_continuous_batching_manager()
            yield row


def measured(place: Place, write: Writer, new: int) -> dict[str, Any]:
    """The second of two calls; what the first one sets up is told apart."""
    start = place.now()
    write()
    first = place.now()
    written = write()
    seconds = place.now() - first
    return {
        "ms_per_token_of_a_row": round(seconds / new * 1e3, 3),
        "tokens_per_second": round(written / seconds, 1),
        "first_call_seconds": round(first - start, 2),
        **place.peak(),
    }


def by_engine(model: Any, prompts: list[list[int]], new: int) -> Writer:
    """Our engine, as the configuration of a run makes it, and one for all calls as in training."""
    engine = TransformersConfig(batch_size=len(prompts)).build(model, TokenizerInfo((1,), 0))

    def write() -> int:
        found = engine.generate(prompts, Sampling(max_tokens=new, min_tokens=new), seed=0)
        return sum(len(one.token_ids) for one in found)

    return write


def by_generate(model: Any, prompts: list[list[int]], new: int) -> Writer:
    """`generate`."""
    width = max(map(len, prompts))
    padded = [[0] * (width - len(one)) + one for one in prompts]
    mask = [[0] * (width - len(one)) + [1] * len(one) for one in prompts]
    ids, attention = (torch.tensor(one, device=model.device) for one in (padded, mask))

    def write() -> int:
        output = model.generate(ids, attention_mask=attention, generation_config=settings(new))
        return int((output.shape[1] - width) * len(prompts))

    return write


def by_batches(model: Any, prompts: list[list[int]], new: int) -> Writer:
    """transformers' continuous batching, with one manager for all calls."""

    def write() -> int:
        found = model.generate_batch(
            prompts, generation_config=settings(new), progress_bar=False, persistent_manager=True
        )
        return sum(len(one.generated_tokens) for one in found.values())

    return write


WRITERS = {"ours": by_engine, "generate": by_generate, "generate_batch": by_batches}


def settings(new: int) -> GenerationConfig:
    """Sampling from the model's own distribution."""
    options = {"do_sample": True, "top_k": 0, "eos_token_id": 1, "pad_token_id": 0}
    return GenerationConfig(max_new_tokens=new, min_new_tokens=new, **options)
