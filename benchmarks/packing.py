"""Packed against padded sequences: which architectures give the same hidden states, and what it costs a CPU.

    python benchmarks/packing.py            # all causal architectures and the timings, minutes
    python benchmarks/packing.py --small    # a few of both; writes nothing

Architectures are built with random weights as in heads.py, with windows of 8 tokens where they have some,
and tried as a run tries them (`choose_packing`), in float32 and under bfloat16 autocast. `error` is that of
packed hidden states of three sequences of 41, 17 and 5 tokens, relative to padded ones: what the trial let
pass must not be wrong. Timings are of forward and backward of a Llama (4M), one thread, in float32; a step
of 32 sequences is split by length into micro-batches as in training. `over_padded` below 1 is faster than
padding.

Writes benchmarks/results/packing.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import heads
import torch
import transformers
from _result import result, save
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from stillhouse.core.batch import TokenBatch
from stillhouse.models import choose_packing, hidden_rows
from stillhouse.models.packing import Packing, set_packing

RESULT = Path(__file__).parent / "results" / "packing.json"
SMALL = ("llama", "gpt2", "mistral", "gemma2", "qwen3_next", "falcon")
WINDOWS = {"sliding_window": 8, "attention_chunk_size": 8}
SECONDS = 60
"""An architecture that takes longer is left out."""
PARTS = ("rows", "architectures")
LENGTHS = {"Dolly": (4.75, 0.7, 40, 512)}
"""Tokens of whole sequences: mean and deviation of the logarithm, least and most."""
WAYS = {
    "one call for each sequence": Packing("variable-length", torch.float32, only_by_kernel=False),
    "block-diagonal mask": Packing("block-diagonal", torch.float32, only_by_kernel=False),
}


def main() -> None:
    """Both parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a few; writes nothing")
    parser.add_argument("--only", choices=PARTS, help="this part; the other one is kept")
    options = parser.parse_args()
    small, parts = options.small, [options.only] if options.only else PARTS
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    heads.TINY |= WINDOWS
    signal.signal(signal.SIGALRM, heads.give_up)
    found = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    if "rows" in parts:
        found["rows"] = list(said(timed(small)))
    if "architectures" in parts:
        names = SMALL if small else sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        rows = list(said(row for name in names if (row := tried(name)) is not None))
        counts = Counter((row.get("float32", "none"), row.get("bfloat16", "none")) for row in rows)
        print({f"float32 {a}, bfloat16 {b}": count for (a, b), count in counts.most_common()})
        found["architectures"] = rows
    if not small:
        kept = {name: found[name] for name in PARTS if name in found}
        save(RESULT, {**result([]), **kept})


def said(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each row on a line as it comes."""
    for row in rows:
        print(json.dumps(row), flush=True)
        yield row


def tried(name: str) -> dict[str, Any] | None:
    """What an architecture may do; None if it cannot be built this small or does not run."""
    signal.alarm(SECONDS)
    try:
        return outcome(name, heads.build(name))
    except Exception:  # noqa: BLE001 - heads.py says what transformers cannot build
        return None
    finally:
        signal.alarm(0)


@torch.no_grad()
def outcome(name: str, model: nn.Module) -> dict[str, Any]:
    """Which precisions pack, the largest error of those that do, and the reason of those that do not."""
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 60, (length,), generator=draw).tolist() for length in (41, 17, 5)]
    batch = TokenBatch.of(ids, [3, 1, 2], pad_id=0)
    padded = hidden_rows(model, batch)
    row: dict[str, Any] = {"architecture": name, "attention": model.config._attn_implementation}
    for dtype in (torch.float32, torch.bfloat16):
        word = str(dtype).removeprefix("torch.")
        note = choose_packing(model, "on", None if dtype == torch.float32 else dtype)
        if note is not None:
            row[f"{word}_refused"] = note.partition("cannot pack ")[2][:200]
            continue
        found = hidden_rows(model, batch)
        row[word] = "packs"
        error = float(f"{(found - padded).norm() / padded.norm():.1e}")
        row["error"] = max(row.get("error", 0.0), error)
    return row


def timed(small: bool) -> Iterator[dict[str, Any]]:
    """Rows of timings."""
    config = LlamaConfig(
        vocab_size=1024, hidden_size=64 if small else 256, intermediate_size=256 if small else 1024,
        num_hidden_layers=2 if small else 4, num_attention_heads=4, num_key_value_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    for name, shape in LENGTHS.items():
        for size in (8,) if small else (4, 16):
            batches = micro_batches(shape, 32, size, divide=8 if small else 1)
            yield from compared(model, batches, {"lengths": name, "micro_batch": size}, 1 if small else 3)


def compared(
    model: nn.Module, batches: Sequence[TokenBatch], facts: dict[str, Any], rounds: int
) -> Iterator[dict[str, Any]]:
    """Each way in turn with padding just before; medians of the ratios."""
    tokens = sum(batch.num_tokens for batch in batches)
    padding = 1 - tokens / sum(batch.input_ids.numel() for batch in batches)
    for way, packing in WAYS.items():
        seconds, ratios = [], []
        for _ in range(rounds):
            set_packing(model, None)
            before = one_step(model, batches)
            set_packing(model, packing)
            seconds.append(one_step(model, batches))
            ratios.append(seconds[-1] / before)
        set_packing(model, None)
        figures = {"seconds": statistics.median(seconds), "over_padded": statistics.median(ratios)}
        yield {
            **facts, "padding": round(padding, 3), "way": way,
            **{name: round(value, 3) for name, value in figures.items()},
        }  # fmt: skip


def one_step(model: nn.Module, batches: Sequence[TokenBatch]) -> float:
    """Processor seconds of forward and backward of all micro-batches."""
    start = time.process_time()
    for batch in batches:
        hidden_rows(model, batch).sum().backward()
    model.zero_grad()
    return time.process_time() - start


def micro_batches(
    shape: tuple[float, float, int, int], count: int, size: int, divide: int
) -> list[TokenBatch]:
    """A step's sequences of log-normal lengths, those of like length together."""
    draw = random.Random(0)
    mean, deviation, least, most = shape
    drawn = (draw.lognormvariate(mean, deviation) for _ in range(count))
    lengths = sorted(int(min(max(length, least), most)) // divide for length in drawn)
    ids = [[draw.randrange(1024) for _ in range(length)] for length in lengths]
    parts = [ids[start : start + size] for start in range(0, count, size)]
    return [TokenBatch.of(part, [len(one) // 2 for one in part], pad_id=0) for part in parts]


if __name__ == "__main__":
    main()
