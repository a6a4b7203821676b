"""What a teacher cache saves and costs: time of three epochs, bytes and error of each store, rate of filling.

Seconds are processor seconds of one thread: wall-clock on an idle machine, and on a shared one not dependent
on others. What is compared takes turns in one process; the ratio is that of the medians.

    python benchmarks/teachers.py            # about a minute of processor time
    python benchmarks/teachers.py --small    # a check that it runs; writes nothing

Writes benchmarks/results/teachers.json.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from _result import result, save
from transformers import AutoConfig, AutoModelForCausalLM

from stillhouse.core.types import Progress, Prompt
from stillhouse.data import DataConfig, load_data
from stillhouse.data.collate import collate
from stillhouse.models import TeacherModel, load_teacher, load_tokenizer
from stillhouse.objectives import build
from stillhouse.rollouts.fixed import FixedConfig, FixedPolicy, reference_response
from stillhouse.runs.resolve import resolve
from stillhouse.runs.teacher_cache import measure_bias
from stillhouse.teachers.cached_teachers import CachedTeacher
from stillhouse.teachers.live import LiveTeacher
from stillhouse.teachers.store import Manifest, Store
from stillhouse.teachers.store.codecs import HiddenCodec
from stillhouse.train.step import Method, Step

DEMO = "package:stillhouse/demo"
RESULT = Path(__file__).parent / "results" / "teachers.json"
EPOCHS = 3


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    prompts: int = 96
    repeats: int = 3
    bias_prompts: int = 12
    build_prompts: int = 192


SMALL = Size(prompts=8, repeats=1, bias_prompts=2, build_prompts=8)


def llama(width: int, layers: int, vocab: int, seed: int) -> torch.nn.Module:
    """A model with random weights."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama", vocab_size=vocab, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=width // 32, num_key_value_heads=width // 32,
        intermediate_size=width * 8 // 3, max_position_embeddings=256,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).float()


def pairs(vocab: int) -> Iterator[tuple[str, torch.nn.Module, Callable[[], torch.nn.Module]]]:
    """Name, teacher, and what makes the student afresh."""
    demo = load_teacher(TeacherModel(path=f"{DEMO}/teacher", dtype="float32"))
    yield "demo teacher, small student", demo, lambda: llama(64, 2, vocab, 1)
    yield "random weights", llama(256, 5, vocab, 2).eval(), lambda: llama(128, 4, vocab, 1)


def three_epochs(
    student: torch.nn.Module, teacher: Any, prompts: Sequence[Prompt], vocab: int
) -> tuple[float, list[float]]:
    """Processor seconds of three epochs of KD, and the loss of each step. Every epoch has an order of its
    own."""
    step = Step(
        Method(FixedConfig(), build("forward_kl"), "token"), FixedPolicy(), {"main": teacher}, 0, vocab
    )
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses, size = [], 16
    per_epoch = -(-len(prompts) // size)
    begun = time.process_time()
    for epoch in range(EPOCHS):
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(epoch)).tolist()
        for number, start in enumerate(range(0, len(prompts), size)):
            done = epoch * per_epoch + number
            progress = Progress(done, EPOCHS * per_epoch, done / per_epoch, float(EPOCHS))
            prepared = step.prepare([prompts[i] for i in order[start : start + size]], progress, 2)
            found = []
            for micro in prepared.micro_batches:
                found.append(step.loss(student, micro))
                found[-1].loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            step.finish(prepared, found)
            losses.append(step.last_loss)
    seconds = time.process_time() - begun
    step.close()
    return seconds, losses


def times(size: Size, prompts: Sequence[Prompt], vocab: int) -> Iterator[dict[str, Any]]:
    """Three epochs with the live teacher, with a cache that they fill, and with one filled before."""
    for name, teacher, student in pairs(vocab):
        seconds: dict[str, list[float]] = {"live": [], "filled by the run": [], "filled before": []}
        losses: dict[str, list[float]] = {}
        for _ in range(size.repeats):
            with tempfile.TemporaryDirectory() as place:
                for kind in seconds:
                    signal: Any = LiveTeacher(teacher, vocab)
                    if kind != "live":
                        codec = HiddenCodec("float32")
                        store = Store(Path(place), Manifest(codec.name, ""))
                        signal = CachedTeacher(store, codec, signal.head, signal)
                    taken, losses[kind] = three_epochs(student(), signal, prompts[: size.prompts], vocab)
                    seconds[kind].append(taken)
        medians = {kind: statistics.median(found) for kind, found in seconds.items()}
        sizes = [sum(p.numel() for p in model.parameters()) for model in (teacher, student())]
        for kind, median in medians.items():
            gaps = [abs(a - b) for a, b in zip(losses[kind], losses["live"], strict=True)]
            yield {
                "what": "three epochs of KD, fp32", "pair": name, "teacher_parameters": sizes[0],
                "student_parameters": sizes[1], "teacher": kind, "seconds": round(median, 3),
                "times_faster": round(medians["live"] / median, 2), "wanted": 1.5,
                "largest_loss_difference": max(gaps), "last_loss": losses[kind][-1],
            }  # fmt: skip


def filling(size: Size, prompts: Sequence[Prompt], vocab: int) -> Iterator[dict[str, Any]]:
    """Tokens per second of filling a cache, against the bare forward passes on the same batches."""
    teacher = LiveTeacher(load_teacher(TeacherModel(path=f"{DEMO}/teacher", dtype="float32")), vocab)
    chosen = sorted(map(reference_response, prompts[: size.build_prompts]), key=lambda r: len(r.token_ids))
    batches = [collate(chosen[at : at + 16], 0) for at in range(0, len(chosen), 16)]
    tokens = sum(len(response.token_ids) for response in chosen)
    seconds: dict[str, list[float]] = {"bare": [], "filling": []}
    for _ in range(size.repeats + 2):
        with tempfile.TemporaryDirectory() as place:
            codec = HiddenCodec("float32")
            store = Store(Path(place), Manifest(codec.name, ""))
            cache = CachedTeacher(store, codec, teacher.head, teacher)
            for kind, source in (("bare", teacher), ("filling", cache)):
                begun = time.process_time()
                for batch in batches:
                    source.hidden(batch)
                seconds[kind].append(time.process_time() - begun)
            cache.close()
    rates = {kind: tokens / statistics.median(found[1:] or found) for kind, found in seconds.items()}
    yield {
        "what": "filling a cache", "bare_tokens_per_second": round(rates["bare"]),
        "filling_tokens_per_second": round(rates["filling"]),
        "share_of_bare": round(rates["filling"] / rates["bare"], 3), "wanted": 0.9,
    }  # fmt: skip


def stores(size: Size) -> Iterator[dict[str, Any]]:
    """Bytes and error of each kind of store: demo teacher, a student of two of its layers, forward KL."""
    tree = {
        "student": {"from_teacher": {"layers": [0, 3]}},
        "teacher": {"kind": "cache", "of": f"{DEMO}/teacher"},
        "objective": "forward_kl",
        "data": {
            "train": {"kind": "jsonl", "path": f"{DEMO}/data/train.jsonl", "limit": 200},
            "template": {"kind": "plain"}, "max_prompt": 128, "max_response": 96, "no_response": "drop",
        },
        "train": {"micro_batch_size": 8, "batch_size": 8},
        "evaluate": {"before": False, "teacher": False},
    }  # fmt: skip
    loss, rows, _ = measure_bias(resolve(tree).config, size.bias_prompts)
    for row in rows:
        yield {
            "what": "store", "store": row.name, "bytes_per_token": round(row.bytes_per_token, 1),
            "live_loss": loss, "loss_error": row.loss_error, "loss_noise": row.loss_noise,
            "gradient_cosine": row.cosine, "gradient_error": row.gradient_error,
            "gradient_error_of_mean": row.mean_gradient_error,
        }  # fmt: skip


def main() -> None:
    """Measure everything and write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="check that it runs")
    small = parser.parse_args().small
    size = SMALL if small else Size()
    torch.set_num_threads(1)
    model = TeacherModel(path=f"{DEMO}/teacher")
    tokenizer = load_tokenizer(model)
    data = load_data(
        DataConfig(
            train={"kind": "jsonl", "path": f"{DEMO}/data/train.jsonl", "limit": 1000},  # type: ignore[arg-type]
            template={"kind": "plain"},  # type: ignore[arg-type]
            max_prompt=128,
            max_response=96,
            no_response="drop",
        ),
        tokenizer,
        needs={"responses"},
    )
    rows: list[dict[str, Any]] = []
    vocab = len(tokenizer)
    for row in itertools.chain(
        stores(size), filling(size, data.train, vocab), times(size, data.train, vocab)
    ):
        print(row, flush=True)
        rows.append(row)
        if not small:  # after each row, so that an interruption loses none
            note = "processor seconds of one thread"
            save(RESULT, result(rows, ("transformers", "numpy"), seconds=note))


if __name__ == "__main__":
    main()
