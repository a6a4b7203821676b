"""transformers' own continuous batching, `generate_batch`, beside the engine: speed, and what it promises.

    python benchmarks/generate_batch.py            # minutes on a CPU
    python benchmarks/generate_batch.py --small    # under a minute; writes nothing

Speeds are response tokens per second of CPU time of one thread on the 5M model of generation.py, both with
temperature 1. "keeps": which promises of the engine `generate_batch` keeps with a seed: the same text again,
in other company, with a smaller batch; and the random state of the process left alone.

Writes benchmarks/results/generate_batch.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from _result import result, save
from generation import Case, Subject, random_llama, some_prompts, with_engine
from transformers import ContinuousBatchingConfig, GenerationConfig

RESULTS = Path(__file__).parent / "results" / "generate_batch.json"


def texts(subject: Subject, prompts: list[list[int]], seed: int, batch_tokens: int = 512) -> list[list[int]]:
    """What `generate_batch` writes."""
    settings = GenerationConfig(
        max_new_tokens=64, do_sample=True, top_k=0, temperature=1.0, eos_token_id=2, pad_token_id=0
    )
    # On a CPU neither can be taken from the memory that is free.
    batching = ContinuousBatchingConfig(seed=seed, num_blocks=64, max_batch_tokens=batch_tokens)
    model: Any = subject.model
    found = model.generate_batch(
        prompts, generation_config=settings, continuous_batching_config=batching, progress_bar=False
    )
    assert not any(one.error for one in found.values())
    return [one.generated_tokens for one in found.values()]


def speed(write: Callable[[int], int], rounds: int) -> float:
    """Response tokens per second of CPU time."""
    start = time.process_time()
    written = sum(write(seed) for seed in range(rounds))
    return round(written / (time.process_time() - start), 1)


def kept(subject: Subject) -> dict[str, bool]:
    """What of the engine's promises holds."""
    prompts = subject.prompts[:8]
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first = texts(subject, prompts, 5)
    return {
        "the same text again": texts(subject, prompts, 5) == first,
        "in other company": texts(subject, prompts[:3], 5) == first[:3],
        "with a smaller batch": texts(subject, prompts, 5, batch_tokens=64) == first,
        "the random state of the process": torch.equal(torch.get_rng_state(), state),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true", help="fewer prompts; writes nothing")
    small = parser.parse_args().small
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    subject = random_llama("5M", 8192)
    rows: list[dict[str, Any]] = []
    for count in (8,) if small else (32, 128):
        case = Case("5M", 8192, count, count)

        def batched(seed: int, case: Case = case) -> int:
            return sum(map(len, texts(subject, some_prompts(subject, case, seed), seed)))

        def ours(seed: int, case: Case = case) -> int:
            return with_engine(subject, case, seed)

        found = {name: speed(write, 2) for name, write in (("generate_batch", batched), ("engine", ours))}
        rows.append({"prompts": count, **{f"{name}_tokens_per_second": one for name, one in found.items()}})
        print(rows[-1], flush=True)
    rows.append({"keeps": kept(subject)})
    print(rows[-1])
    if not small:
        save(RESULTS, result(rows))


if __name__ == "__main__":
    main()
