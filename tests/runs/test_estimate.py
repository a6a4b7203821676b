"""What `check` says about size is what a run then has."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import yaml

from stillhouse.runs.estimate import estimate, run_size
from stillhouse.runs.execute import execute
from stillhouse.runs.memory import GpuSize, Workload, memory_by_phase, most_memory
from stillhouse.runs.model_sizes import ModelSize, model_size
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
        return most_memory(memory_by_phase(config, student, (teacher,), Workload(64, generated=rows)))

    plain = peak(train__micro_batch_size=4)  # wide enough that a step takes more than writing does
    weights_and_adam = 4 * 4 * 10**8 + 2 * 10**9
    assert plain > weights_and_adam
    assert peak(train__micro_batch_size=2) < plain
    assert peak(train__micro_batch_size=4, student__gradient_checkpointing=True) < plain
    assert peak(train__micro_batch_size=4, student__lora={"rank": 8}) < plain - 9 * 10**8
    wide = {"train__batch_size": 32, "train__micro_batch_size": 32}
    assert peak(**wide, train__precision="bfloat16") < peak(**wide)
    mixed = peak(train__micro_batch_size=4, train__precision="bfloat16")
    assert mixed > plain, "few activations are saved, and the weights are there twice"
    assert peak(train__micro_batch_size=4, train__fused={"memory_budget": "1MB"}) < plain
    assert peak(train__micro_batch_tokens=4 * 64) == plain
    assert peak(train__micro_batch_tokens=64) == peak(train__micro_batch_tokens=1) < plain
    writing = peak(train__micro_batch_size=4, generated_rows=4096)
    assert writing > plain
    kept = peak(engine__kv_cache="static", engine__batch_size=4096, generated_rows=4096)
    grown = peak(engine__kv_cache="growing", engine__batch_size=4096, generated_rows=4096)
    # 64 tokens take 128 slots of keys and values in fp32 at 12 layers.
    assert kept - grown == pytest.approx(4096 * 128 * 12 * 2 * 768 * 4)


MEASURED_ON_AN_H100 = {16: 32.3, 4: 20.1}
"""Micro-batch -> peak in GiB: 16 prompts of up to 256 and responses of up to 512 tokens, off-policy, in mixed
precision; torch 2.11, chunks of 192 MiB."""


@pytest.mark.parametrize("micro_batch", MEASURED_ON_AN_H100)
def test_the_estimate_for_a_gpu_is_what_one_took(workshop: Workshop, micro_batch: int) -> None:
    student = ModelSize(
        494_032_768, 24, 896, vocab=151_936, dtype_bytes=4, context=32_768, key_value_size=128
    )
    teacher = ModelSize(
        3_085_938_688, 36, 2048, vocab=151_936, dtype_bytes=2, context=32_768, key_value_size=256
    )
    values = {
        "train.batch_size": 16,
        "train.micro_batch_size": micro_batch,
        "train.precision": "bfloat16",
        "train.fused.memory_budget": "192MiB",
    }
    config = resolve("run.yaml", values).config
    card = GpuSize("NVIDIA H100 80GB HBM3", 80 * 2**30)
    estimated = most_memory(memory_by_phase(config, student, (teacher,), Workload(768), card))
    assert estimated / 2**30 == pytest.approx(MEASURED_ON_AN_H100[micro_batch], rel=0.05)


def test_a_gpu_takes_larger_chunks_of_logits_and_no_process(workshop: Workshop) -> None:
    student = ModelSize(10**8, layers=12, hidden_size=768, vocab=150_000, dtype_bytes=4, context=2048)
    config = resolve("run.yaml", {"train.micro_batch_size": 4}).config
    sizes = [
        most_memory(memory_by_phase(config, student, (), Workload(2048), gpu))
        for gpu in (None, GpuSize("small", 4 * 2**30), GpuSize("large", 80 * 2**30))
    ]
    assert sizes[1] < sizes[0] * 1.05, "blocks that do not fit, but no process"
    assert sizes[2] - sizes[1] > 10**9


def test_check_estimates_for_a_gpu_that_is_not_there(workshop: Workshop) -> None:
    said = workshop.stillhouse("check", "run.yaml", "--gpu-memory", "24GB").out
    assert "a GPU of 24GB" in said
    assert "lower train.micro_batch_size" not in said
    assert re.search(r"memory of the GPU \(GB\) +24 *$", said, flags=re.MULTILINE), said
    assert re.search(r"estimated \(GB\) +0\.0*[1-9]\d? *$", said, flags=re.MULTILINE), "no tail of zeros"
    said = workshop.stillhouse("check", "run.yaml", "--gpu-memory", "1MB").out
    assert said.count("lower train.micro_batch_size") == 1, "what to do is said once"
    for value in ("80", "0GB"):
        assert "Say the unit" in workshop.refused("check", "run.yaml", "--gpu-memory", value)
    assert "data.token_cache (command line): is empty" in workshop.refused(
        "check", "run.yaml", "data.token_cache=''"
    )
    assert "--gpu-memory: is a size such as 500MB" in workshop.refused(
        "check", "run.yaml", "--gpu-memory", "x"
    )


def test_further_teachers_count(workshop: Workshop) -> None:
    reference = {
        "teachers.reference": {"kind": "live", "path": "teacher"},
        "objective": {"kind": "advantage"},
    }
    alone, both = resolve("run.yaml").config, resolve("run.yaml", reference).config
    plain, more = estimate(alone), estimate(both)
    assert more["teachers.reference parameters"] == plain["teacher parameters"]
    assert most_memory(run_size(both).memory) > most_memory(run_size(alone).memory)


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
