"""What `stillhouse check --measure` predicts and what two steps then take: memory and time, at several sizes.

Each case is a run of two steps in a process of its own, with validation, export and evaluation; its memory is
the largest resident memory of that process, or on a GPU what its tensors held. Time is that of the second
step, in seconds of the processor: on a machine that others use too the clock says little. It is predicted by
the probe of `--measure`, which runs models of one and of three layers. Random weights: they do not matter.

    python benchmarks/estimates.py            # minutes; one thread
    python benchmarks/estimates.py --only int4
    python benchmarks/estimates.py --small    # the smallest case; writes nothing

Writes benchmarks/results/estimates.json, case by case.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from _result import result, save
from transformers import AutoConfig, AutoModelForCausalLM

from stillhouse.models import StudentConfig, load_tokenizer
from stillhouse.runs.estimate import peak_of_steps, run_size
from stillhouse.runs.measure import measure, predict
from stillhouse.runs.resolve import resolve

TOKENIZER = "package:stillhouse/demo/teacher"
RESULT = Path(__file__).parent / "results" / "estimates.json"


def llama(width: int, layers: int, vocab: int) -> dict[str, Any]:
    """A Llama configuration."""
    heads = width // 64
    return {
        "model_type": "llama", "hidden_size": width, "num_hidden_layers": layers, "vocab_size": vocab,
        "num_attention_heads": heads, "num_key_value_heads": heads, "intermediate_size": width * 11 // 4,
        "max_position_embeddings": 1024,
    }  # fmt: skip


TINY = llama(128, 4, 8192), llama(256, 6, 8192)
SMALL = llama(256, 6, 8192), llama(512, 8, 8192)
MIDDLE = llama(384, 8, 32000), llama(512, 12, 32000)
LARGE = llama(768, 8, 49152), llama(1024, 10, 49152)
ADAPTERS = {"rank": 16, "merge": False}
PACKAGES = ("torch", "transformers", "accelerate", "peft", "torchao", "bitsandbytes")
CASES: dict[str, tuple[tuple[dict[str, Any], dict[str, Any]], dict[str, Any]]] = {
    "kd, 3M": (TINY, {"recipe": "kd"}),
    "kd, 9M": (SMALL, {"recipe": "kd"}),
    "kd, 39M": (MIDDLE, {"recipe": "kd"}),
    "kd, 133M": (LARGE, {"recipe": "kd"}),
    **{
        f"{recipe}, {size}": (models, {"recipe": recipe, "batch": 4})
        for recipe in ("gkd", "distillm", "distillm2", "csd")
        for size, models in (("9M", SMALL), ("39M", MIDDLE))
    },
    **{
        f"kd, {size}, {name}": (models, {"recipe": "kd", "batch": 4, **changes})
        for name, changes in (
            ("LoRA", {"student": {"lora": {"rank": 16}}}),
            ("checkpointed", {"student": {"gradient_checkpointing": True}}),
            ("cached teacher", {"cached": True}),
        )
        for size, models in (("9M", SMALL), ("39M", MIDDLE))
    },
    "kd, 133M, LoRA": (LARGE, {"recipe": "kd", "student": {"lora": {"rank": 16}}}),
    "kd, 133M, checkpointed": (LARGE, {"recipe": "kd", "student": {"gradient_checkpointing": True}}),
    "sft, 133M": (LARGE, {"recipe": "sft", "teacher": None}),
    **{
        f"kd, 133M, {weights} under adapters": (
            LARGE, {"recipe": "kd", "student": {"quantise": {"weights": weights}, "lora": ADAPTERS}},
        )
        for weights in ("int8", "int4", "nf4")
    },
    "kd, 133M, int4, QAT": (
        LARGE, {"recipe": "kd", "student": {"quantise": {"weights": "int4", "qat": True}}},
    ),
}  # fmt: skip


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the smallest case only; writes nothing")
    parser.add_argument("--only", help="cases with this in their names; the others keep their rows")
    options = parser.parse_args()
    small, only = options.small, options.only or ""
    before = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if only else []
    rows: dict[str, dict[str, Any]] = {row["case"]: row for row in before}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_data(folder)
        wanted = [name for name in CASES if only in name]
        for name in wanted[: 1 if small else None]:
            rows[name] = case(folder, name, *CASES[name])
            print(json.dumps(rows[name]), flush=True)
            if not small:
                write([*rows.values()])


def write(rows: list[dict[str, Any]]) -> None:
    """The result so far; the command is the one that makes all rows, also where `--only` made some anew."""
    save(RESULT, result(rows, PACKAGES, device=device(), command="python benchmarks/estimates.py"))


def device() -> str:
    """The GPU that runs take, or the CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def write_data(folder: Path) -> None:
    """32 rows whose prompt and response reach their limits."""
    row = {"prompt": "Describe the restaurant by the river. " * 12, "response": "It serves good food. " * 60}
    text = (json.dumps(row) + "\n") * 32
    for name in ("train", "valid"):
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def case(
    folder: Path, name: str, models: tuple[dict[str, Any], dict[str, Any]], changes: dict[str, Any]
) -> dict[str, Any]:
    """Estimate and truth of one run."""
    student, teacher = models
    tree: dict[str, Any] = {
        "recipe": changes["recipe"],
        "student": {"from_config": student, "tokenizer": TOKENIZER, **changes.get("student", {})},
        "data": {
            "train": str(folder / "train.jsonl"), "valid": {"path": str(folder / "valid.jsonl"), "limit": 4},
            "template": {"kind": "plain"}, "max_prompt": 128, "max_response": 128,
            "too_long": {"prompt": "truncate_right"},
        },
        "train": {
            "max_steps": 2, "batch_size": changes.get("batch", 8), "micro_batch_size": 4,
            "validate_rouge": False,
        },
        "evaluate": {"before": False, "teacher": False},
    }  # fmt: skip
    if "teacher" not in changes:
        path = str(saved(folder, teacher))
        live = {"kind": "live", "path": path}
        cache = {"kind": "cache", "of": path, "folder": str(folder / "cache")}
        tree["teacher"] = cache if changes.get("cached") else live
    resolved = resolve(tree)
    size, probed, taken = (
        run_size(resolved.config),
        predict(resolved.config),
        measure(resolved.config),
    )
    assert probed is not None
    said = probed.for_tokens(taken.step.tokens)
    memory = peak_of_steps(resolved.config, size, taken.tokens)
    return {
        "case": name,
        "student parameters": size.rows["student parameters"],
        "estimated GB": round(memory / 1e9, 2),
        "measured GB": round(taken.peak_memory / 1e9, 2),
        "ratio": round(memory / taken.peak_memory, 2),
        "predicted seconds": round(said.processor, 2),
        "measured seconds": round(taken.step.processor, 2),
        "ratio of seconds": round(said.processor / taken.step.processor, 2),
        "share of the processor": round(taken.share_of_processor, 2),
    }


def saved(folder: Path, config: dict[str, Any]) -> Path:
    """A folder with a random model of this configuration and the tokenizer."""
    path = folder / f"teacher-{config['hidden_size']}"
    if not path.exists():
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(path)
        load_tokenizer(StudentConfig(path=TOKENIZER)).save_pretrained(path)
    return path


if __name__ == "__main__":
    main()
