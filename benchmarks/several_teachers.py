"""Two teachers of which each knows half of a task, and one student of both.

The task is SCAN (Lake and Baroni 2018, arXiv 1711.00350): commands of a small grammar into sequences of
actions. Its sentences are written here by the grammar of the paper's appendix; actions are named without I_
and TURN_. One teacher is fine-tuned on commands that say left and never right, the other the other way round;
both see commands without a direction. The student is compared with the teachers' distributions on other
commands of both halves, with nothing else. Measured is the exact match of greedy answers to other commands.

    python benchmarks/several_teachers.py --output benchmarks/results/several_teachers.json
    python benchmarks/several_teachers.py --small
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from _result import result, save

from stillhouse.files import write_jsonl

VERBS = ("walk", "look", "run", "jump")
TIMES = {"": 1, " twice": 2, " thrice": 3}
LONGEST = 8
"""Actions of the longest answer."""
HALVES = ("left", "right")
STUDENT = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
           "intermediate_size": 128, "max_position_embeddings": 128}  # fmt: skip
STEPS, BATCH, ROWS, HELD_OUT, SEEDS = 260, 64, 500, 100, (0, 1, 2)
METHODS: dict[str, dict[str, Any]] = {
    "each its own rows": {
        "objective": {"kind": "by_teacher", "objectives": {"main": "forward_kl", "right": "forward_kl"}},
        "row_teacher": {"column": "domain", "teachers": {"left": "main", "right": "right"}},
    },
    "a mixture of both on all rows": {
        "objective": {
            "kind": "teacher_mixture",
            "weights": {"main": 0.5, "right": 0.5},
            "objective": "forward_kl",
        },
    },
}


def phrases() -> Iterator[tuple[str, list[str]]]:
    """Every phrase of the grammar without a conjunction, with its actions."""
    for verb, direction in itertools.product((*VERBS, "turn"), ("", *HALVES)):
        act = [] if verb == "turn" else [verb.upper()]
        turn = [direction.upper()] if direction else []
        ways = {"": turn + act}
        if direction:
            ways |= {"opposite ": turn * 2 + act, "around ": (turn + act) * 4}
        elif verb == "turn":
            continue
        for (way, once), (times, count) in itertools.product(ways.items(), TIMES.items()):
            command = f"{verb} {way}{direction}".strip() if direction else verb
            yield command + times, once * count


def commands() -> list[dict[str, str]]:
    """Every command with an answer of at most `LONGEST` actions, and the half that it belongs to."""
    simple = list(phrases())
    pairs = [(text, actions) for text, actions in simple]
    for (one, first), (two, second) in itertools.product(simple, simple):
        pairs.append((f"{one} and {two}", first + second))
        pairs.append((f"{one} after {two}", second + first))
    found = []
    for text, actions in pairs:
        said = [half for half in HALVES if half in text.split()]
        if len(said) <= 1 and len(actions) <= LONGEST:
            found.append({"prompt": text, "response": " ".join(actions), "domain": (*said, "none")[0]})
    return found


def write_data(folder: Path, seed: int, rows: int, held_out: int) -> None:
    """Files for each teacher, for the student, and held out; no command is in two of them but neutral."""
    drawn = random.Random(seed)
    by_half = {half: [row for row in commands() if row["domain"] == half] for half in (*HALVES, "none")}
    student, neutral = [], by_half["none"]
    for half in HALVES:
        drawn.shuffle(by_half[half])
        test, rest = by_half[half][:held_out], by_half[half][held_out:]
        teacher, own = rest[:rows], rest[rows : rows + rows // 2]
        write_jsonl(folder / f"test-{half}.jsonl", test)
        write_jsonl(folder / f"{half}.jsonl", [*teacher, *neutral])
        student += own
    write_jsonl(folder / "student.jsonl", student)


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with about a token for each word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<end>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([f"{row['prompt']}\n{row['response']}" for row in commands()], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")
    wrapped.save_pretrained(folder)


def trained(folder: Path, name: str, seed: int, steps: int, **changes: Any) -> dict[str, float]:
    """Run a configuration and return the exact match on each half."""
    from stillhouse.runs.execute import execute
    from stillhouse.runs.resolve import resolve

    data = {"template": {"kind": "plain"}, "max_prompt": 40, "max_response": 40, **changes.pop("data")}
    tasks = [
        {"kind": "exact_match", "name": half, "data": str(folder / f"test-{half}.jsonl"), "strict": True}
        for half in HALVES
    ]
    tree = {
        "name": name,
        "student": {"tokenizer": str(folder / "tokenizer"), "from_config": STUDENT},
        "data": data,
        "train": {
            "max_steps": steps, "batch_size": BATCH, "micro_batch_size": BATCH, "lr": 5e-3, "warmup": 0.05,
            "seed": seed, "keep": "last", "validate_every": "never", "save_every": "never",
        },
        "evaluate": {"before": False, "teacher": False, "tasks": tasks, "batch_size": 150},
        "output": {"folder": str(folder / name), "report": False},
        **changes,
    }  # fmt: skip
    result = execute(resolve(tree))
    files = [json.loads(path.read_text(encoding="utf-8")) for path in result.folder.glob("evaluation/*.json")]
    return {one["task"]: one["metrics"]["exact_match"] for one in files}


def of_seed(folder: Path, seed: int, steps: int, rows: int, held_out: int) -> dict[str, dict[str, float]]:
    """System -> exact match on each half."""
    write_data(folder, seed, rows, held_out)
    write_tokenizer(folder / "tokenizer")
    found = {}
    for half in HALVES:
        found[f"teacher of {half}"] = trained(
            folder,
            f"teacher-{half}",
            seed,
            steps,
            recipe="sft",
            data={"train": str(folder / f"{half}.jsonl")},
        )
    paths = {half: str(folder / f"teacher-{half}" / "student") for half in HALVES}
    known = {"main": paths["left"], "right": paths["right"]}
    for name, method in METHODS.items():
        data: dict[str, Any] = {"train": str(folder / "student.jsonl")}
        if "row_teacher" in method:
            data["row_teacher"] = method["row_teacher"]
        else:
            data["ignore"] = ["domain"]
        teachers = {one: {"kind": "live", "path": known[one]} for one in known}
        place = f"student-{list(METHODS).index(name)}"
        found[f"student, {name}"] = trained(
            folder, place, seed, steps, data=data, teachers=teachers, objective=method["objective"]
        )
    return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, of shares in percent."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return round(100 * statistics.mean(values), 1), round(100 * error, 1)


def main() -> None:
    """Train all of it and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a few steps of one seed")
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    seeds = SEEDS[:1] if options.small else SEEDS
    sizes = (12, 60, 10) if options.small else (STEPS, ROWS, HELD_OUT)
    results = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as place:
            results.append(of_seed(Path(place), seed, *sizes))
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    rows = []
    for system in results[0]:
        row: dict[str, Any] = {"system": system}
        for half in HALVES:
            row[half], row[f"{half}_error"] = mean_and_error([one[system][half] for one in results])
        row["both"], row["both_error"] = mean_and_error(
            [statistics.mean(one[system].values()) for one in results]
        )
        rows.append(row)
    found = result(rows, seeds=list(seeds), steps=sizes[0])
    print(json.dumps(found, indent=2))
    save(options.output, found)


if __name__ == "__main__":
    main()
