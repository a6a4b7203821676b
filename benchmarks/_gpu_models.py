"""Random models of known shapes with a tokenizer of their height, rows of known lengths, a device's clock."""

from __future__ import annotations

import gc
import json
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stillhouse.files import locate

QWEN = {"model_type": "qwen2", "tie_word_embeddings": True, "max_position_embeddings": 4096}


@dataclass(frozen=True)
class Shape:
    """A model by its configuration; `small` is what stands for it on a CPU."""

    config: dict[str, Any]
    vocab: int
    small: dict[str, Any]


TINY_QWEN = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 64,
}  # fmt: skip
SHAPES = {
    "0.5B": Shape(
        QWEN | {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
                "num_key_value_heads": 2, "intermediate_size": 4864}, 151_936, TINY_QWEN),
    "3B": Shape(
        QWEN | {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
                "num_key_value_heads": 2, "intermediate_size": 11_008}, 151_936,
        TINY_QWEN | {"hidden_size": 48}),
    "GPT-2": Shape({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12}, 50_257,
                   {"n_embd": 32, "n_layer": 2, "n_head": 2}),
    "GPT-2 XL": Shape({"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25}, 50_257,
                      {"n_embd": 48, "n_layer": 2, "n_head": 2}),
}  # fmt: skip
SMALL_VOCAB = 1031
"""Odd, as that of GPT-2."""


@dataclass(frozen=True)
class Place:
    """Where a stage runs: its device, its folder, and whether everything is small."""

    device: torch.device
    folder: Path
    small: bool

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def now(self) -> float:
        """Seconds, after all that is queued."""
        self.synchronise()
        return time.perf_counter()

    def forget(self) -> None:
        """Free what nothing holds, and begin a new peak of memory."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self, before: int = 0) -> dict[str, float]:
        """GiB at the highest point since `forget`, above `before` bytes; nothing on a CPU."""
        highest = torch.cuda.max_memory_allocated() if self.cuda else 0
        return {"peak_gib": round((highest - before) / 2**30, 2)} if self.cuda else {}

    def held(self) -> int:
        """Bytes in use on a GPU."""
        return int(torch.cuda.memory_allocated()) if self.cuda else 0


def tokenizer_of(vocab: int) -> Any:
    """The demonstration's byte-level tokenizer, with tokens that no text has up to a height."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    path = Path(locate("package:stillhouse/demo/teacher")) / "tokenizer.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    known = tree["model"]["vocab"]
    known |= {f"<unused{index}>": index for index in range(len(known), vocab)}
    whole = Tokenizer.from_str(json.dumps(tree))
    return PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="<pad>", eos_token="<end>")


def saved(place: Place, name: str, dtype: torch.dtype) -> Path:
    """A folder with a model of random weights and its tokenizer; one that is there is taken."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = place.folder / f"{name.replace(' ', '-')}-{str(dtype).removeprefix('torch.')}"
    if (folder / "config.json").exists():
        return folder
    shape = SHAPES[name]
    vocab = SMALL_VOCAB if place.small else shape.vocab
    options = {**shape.config, **(shape.small if place.small else {}), "vocab_size": vocab}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 1, 0
    torch.manual_seed(0)
    with place.device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    tokenizer_of(vocab).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompt and response: uniform between two numbers, or log-normal within them."""

    prompt: tuple[int, int]
    response: tuple[int, int]
    log_prompt: tuple[float, float] | None = None
    log_response: tuple[float, float] | None = None

    def divided(self, by: int) -> Lengths:
        """All of them shorter."""
        bounds = {"prompt": self.prompt, "response": self.response}
        less: dict[str, Any] = {name: (max(2, a // by), max(4, b // by)) for name, (a, b) in bounds.items()}
        for name in ("log_prompt", "log_response"):
            shape = getattr(self, name)
            less[name] = None if shape is None else (shape[0] - math.log(by), shape[1])
        return replace(self, **less)


def write_rows(file: Path, count: int, lengths: Lengths) -> Path:
    """Rows of text whose tokens are about as many as `lengths` says, the same each time."""
    tokenizer = tokenizer_of(SMALL_VOCAB)
    demo = Path(locate("package:stillhouse/demo/data/train.jsonl")).read_text(encoding="utf-8")
    ids = tokenizer(" ".join(json.loads(line)["outputs"][0] for line in demo.splitlines()[:400]))["input_ids"]
    draw = random.Random(0)

    def text(bounds: tuple[int, int], shape: tuple[float, float] | None) -> str:
        drawn = draw.uniform(*bounds) if shape is None else draw.lognormvariate(*shape)
        length = int(min(max(drawn, bounds[0]), bounds[1]))
        start = draw.randrange(len(ids) - length)
        return str(tokenizer.decode(ids[start : start + length]))

    rows = [
        {"prompt": text(lengths.prompt, lengths.log_prompt),
         "response": text(lengths.response, lengths.log_response)}
        for _ in range(count)
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@contextmanager
def attempt(row: dict[str, Any]) -> Iterator[None]:
    """Put what goes wrong into the row: out of memory, a missing kernel; the next row is measured."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is the finding
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
