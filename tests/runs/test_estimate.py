"""What `check` says about size is what a run then has."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import yaml

from stillhouse.runs.estimate import estimate, model_size
from stillhouse.runs.execute import execute
from stillhouse.runs.memory import ModelSize, peak_memory
from stillhouse.runs.resolve import resolve
from tests.workshop import Workshop

STARTS: dict[str, dict[str, Any]] = {
    "path": {"path": "student"},
    "layers of the teacher": {"from_teacher": {"layers": [1]}},
    "random weights": {
        "from_config": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128}
    },
}


@pytest.mark.parametrize("start", STARTS)
def test_counts_are_those_of_the_run(workshop: Workshop, start: str) -> None:
    overrides = {"student": STARTS[start], "train.epochs": 1.5, "train.log_every": 1}
    tree = yaml.safe_load((workshop.folder / "run.yaml").read_text(encoding="utf-8"))
    resolved = resolve({**tree, "student": {}}, overrides)
    said = estimate(resolved.config)
    result = execute(resolved)
    models = json.loads((result.folder / "models.json").read_text(encoding="utf-8"))
    data = json.loads((result.folder / "data.json").read_text(encoding="utf-8"))["sets"][0]
    log = (result.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line)["step"] for line in log if '"train"' in line]
    assert said["student parameters"] == models["student"]["parameters"]
    assert said["teacher parameters"] == models["teacher"]["parameters"]
    assert said["prompts"] == data["kept"]
    assert said["prompt tokens"] == data["prompt_tokens"]
    assert said["response tokens"] == data["response_tokens"]
    assert said["optimiser steps"] == steps[-1] == 9


def test_the_memory_grows_with_what_needs_it_and_shrinks_with_what_saves_it(workshop: Workshop) -> None:
    def peak(**overrides: Any) -> float:
        student = ModelSize(10**8, layers=12, hidden_size=768, vocab=32_000, dtype_bytes=4, context=2048)
        teacher = replace(student, parameters=10**9, dtype_bytes=2)
        values = {
            name.replace("__", "."): value for name, value in overrides.items() if name != "generated_rows"
        }
        config = resolve("run.yaml", values).config
        if config.student.lora is not None:
            student = replace(student, trainable=10**6, adapter=10**6)
        rows = overrides.get("generated_rows", 16)
        return peak_memory(config, student, (teacher,), length=64, generated_rows=rows)

    plain = peak(train__micro_batch_size=4)  # wide enough that a step takes more than writing does
    weights_and_adam = 4 * 4 * 10**8 + 2 * 10**9
    assert plain > weights_and_adam
    assert peak(train__micro_batch_size=2) < plain
    assert peak(train__micro_batch_size=4, student__gradient_checkpointing=True) < plain
    assert peak(train__micro_batch_size=4, student__lora={"rank": 8}) < plain - 10**9
    assert peak(train__micro_batch_size=4, train__precision="bfloat16") < plain
    assert peak(train__micro_batch_size=4, train__fused={"memory_budget": "1MB"}) < plain
    assert peak(train__micro_batch_tokens=4 * 64) == plain
    assert peak(train__micro_batch_tokens=64) == peak(train__micro_batch_tokens=1) < plain
    writing = peak(train__micro_batch_size=4, generated_rows=4096)
    assert writing > plain


def test_further_teachers_count(workshop: Workshop) -> None:
    plain = estimate(resolve("run.yaml").config)
    reference = {
        "teachers.reference": {"kind": "live", "path": "teacher"},
        "objective": {"kind": "advantage"},
    }
    more = estimate(resolve("run.yaml", reference).config)
    assert more["teachers.reference parameters"] == plain["teacher parameters"]
    name = "peak memory, estimated (GB)"
    assert more[name] > plain[name]


def test_model_size_reads_no_weights(workshop: Workshop) -> None:
    (workshop.folder / "bare").mkdir()
    config = (workshop.folder / "teacher" / "config.json").read_text(encoding="utf-8")
    (workshop.folder / "bare" / "config.json").write_text(config, encoding="utf-8")
    model = resolve("run.yaml", {"teacher.path": "bare"}).config.teacher.model_to_load()
    size = model_size(model)
    assert (size.layers, size.hidden_size, size.vocab, size.context) == (2, 32, 1024, 512)


def test_adapters_are_counted_as_trainable(workshop: Workshop) -> None:
    overrides = {"student.lora": {"rank": 4}, "train.max_steps": 1}
    tree = yaml.safe_load((workshop.folder / "run.yaml").read_text(encoding="utf-8"))
    resolved = resolve(tree, overrides)
    said = estimate(resolved.config)
    result = execute(resolved)
    facts = json.loads((result.folder / "models.json").read_text(encoding="utf-8"))["student"]
    assert said["trainable parameters"] == facts["trainable"] == facts["adapter"]
    assert said["student parameters"] == facts["parameters"]


@pytest.mark.parametrize("recipe", ["kd", "imitkd", "gkd", "seqkd", "distillm2"])
def test_no_more_responses_are_generated_than_said(workshop: Workshop, recipe: str) -> None:
    tree = yaml.safe_load((workshop.folder / "run.yaml").read_text(encoding="utf-8"))
    tree.pop("objective", None)
    tree.pop("responses", None)
    overrides = {"recipe": recipe, "train.max_steps": 3, "train.log_every": 1, "data.max_response": 4}
    if recipe == "distillm2":
        overrides["objective.alpha_rule"] = "fixed"  # three steps are less than the rule's first epoch
    resolved = resolve(tree, overrides)
    said = sum(count for name, count in estimate(resolved.config).items() if "to generate" in name)
    result = execute(resolved)
    rows = map(json.loads, (result.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    tokens = sum(row.get("tokens/generate", 0) for row in rows)
    assert tokens <= said * 4
    assert (tokens > 0) == (said > 0)


def test_two_steps_aside_are_measured(workshop: Workshop) -> None:
    from stillhouse.runs.measure import measure

    before = sorted(path.name for path in workshop.folder.iterdir())
    taken = measure(resolve("run.yaml"))
    assert 1e8 < taken.peak_memory < 4e9
    assert taken.seconds_per_step > 0
    assert sorted(path.name for path in workshop.folder.iterdir()) == before
