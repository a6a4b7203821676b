"""Seconds of an optimiser step of forward KL: precision, casts of weights kept for the step, compiled layers.

A student of 11M and a teacher of 42M parameters with random weights, V = 32,000, four micro-batches of two
sequences of 64 and 128 tokens, AdamW. Medians of processor seconds; one thread.

    python benchmarks/training_step.py            # minutes
    python benchmarks/training_step.py --small    # tiny models, without the compiler; writes nothing

Writes benchmarks/results/training_step.json. What a GPU gains is measured by benchmarks/gpu.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _result import result, save
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from stillhouse.core.types import Progress, Prompt
from stillhouse.models import compile_layers
from stillhouse.objectives import build
from stillhouse.rollouts.fixed import FixedConfig, FixedPolicy
from stillhouse.teachers.live import LiveTeacher
from stillhouse.train.driver import StepDriver
from stillhouse.train.step import Method, Step

RESULT = Path(__file__).parent / "results" / "training_step.json"
MICRO, EACH = 4, 2
NOW = Progress(step=3, max_steps=10, epoch=0.3, epochs=1.0)


@dataclass(frozen=True)
class Variant:
    """How a step is computed."""

    name: str
    mixed: bool = False
    keep_casts: bool = True
    compiled: bool = False


VARIANTS = (
    Variant("float32"),
    Variant("bfloat16, weights cast for each micro-batch", mixed=True, keep_casts=False),
    Variant("bfloat16, weights cast once a step", mixed=True),
    Variant("float32, compiled", compiled=True),
)


def main() -> None:
    """Time every variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny models, no compiler; writes nothing")
    small = parser.parse_args().small
    variants = [one for one in VARIANTS if not (small and one.compiled)]
    prepared = {one.name: Prepared(one, small) for one in variants}
    seconds: dict[str, list[float]] = {one.name: [] for one in variants}
    for number in range(
        4 if small else 9
    ):  # in turn, so that whatever else the machine does meets all of them
        for name, one in prepared.items():
            spent = one.step()
            if number >= 2:
                seconds[name].append(spent)
    rows = [
        {"variant": name, "seconds": float(f"{statistics.median(spent):.3g}")}
        for name, spent in seconds.items()
    ]
    print("\n".join(map(json.dumps, rows)))
    if not small:
        save(RESULT, result(rows, ("transformers", "accelerate")))


class Prepared:
    """Models, optimiser and driver of a variant."""

    def __init__(self, variant: Variant, small: bool) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, mixed_precision="bf16" if variant.mixed else "no")
        width, vocab = (64, 512) if small else (192, 32_000)
        student: nn.Module = llama(width, 2 if small else 6, vocab, 1)
        teacher = llama(2 * width, 2 if small else 8, vocab, 2).requires_grad_(False).eval()
        for model in (student, teacher) if variant.compiled else ():
            compile_layers(model)
        self.student = accelerator.prepare_model(student).train()
        self.optimiser = torch.optim.AdamW(self.student.parameters(), lr=1e-5, fused=True)
        method = Method(FixedConfig(), build("forward_kl"), "token")
        step = Step(method, FixedPolicy(), {"main": LiveTeacher(teacher, vocab)}, 0, vocab)
        self.driver = StepDriver(step, keep_casts=variant.keep_casts)
        self.prompts = prompts(vocab)

    def step(self) -> float:
        """Take one; the processor's seconds."""
        start = time.process_time()
        for micro in self.driver.begin(self.student, self.prompts, NOW, MICRO, nullcontext()):
            self.driver.loss(self.student, micro).backward()
        self.driver.on_pre_optimizer_step(None, None, None)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return time.process_time() - start


def prompts(vocab: int) -> list[Prompt]:
    """Sequences of 64 and of 128 tokens, half of each prompt and half response."""
    draw, made = torch.Generator().manual_seed(0), []
    for index in range(MICRO * EACH):
        length = 64 * (1 + index % 2)
        ids = torch.randint(2, vocab, (length,), generator=draw).tolist()
        half = length // 2
        made.append(Prompt(f"train:{index}", tuple(ids[:half]), text="", response_ids=tuple(ids[half:])))
    return made


def llama(width: int, layers: int, vocab: int, seed: int) -> Any:
    """A Llama with random weights."""
    torch.manual_seed(seed)
    heads = width // 32
    config = AutoConfig.for_model(
        "llama", hidden_size=width, num_hidden_layers=layers, vocab_size=vocab, intermediate_size=3 * width,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=256,
        tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).float()


if __name__ == "__main__":
    main()
