"""`check --json` of runs, chains and reward models, and what `check` says of each first."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from stillhouse.files import write_jsonl
from stillhouse.runs.check_text import chain_total
from stillhouse.runs.resolve import resolve
from stillhouse.runs.teacher_cache import fill_cache
from stillhouse.teachers.hidden.protocol import KEY
from tests.workshop import Workshop

RUN_KEYS = {
    "prompts", "held_out_prompts", "prompt_tokens", "response_tokens", "steps", "steps_in_an_epoch",
    "longest_sequence", "parameters", "trainable_parameters", "tokens_to_write", "cache_bytes", "device",
    "memory_bytes", "fits",
}  # fmt: skip
REWARD = {
    "model": "student",
    "data": {"train": "pairs.jsonl", "template": "plain", "max_prompt": 96, "max_response": 32},
    "batch_size": 8,
    "micro_batch_size": 4,
}


def asked(workshop: Workshop, *arguments: str) -> dict[str, Any]:
    """What the command prints as JSON."""
    said = workshop.stillhouse("check", *arguments, "--json")
    assert said.code == 0, said.err
    found: dict[str, Any] = json.loads(said.out)
    assert found["version"] == 1
    return found


def test_a_run(workshop: Workshop) -> None:
    found = asked(workshop, "run.yaml", "responses=on_policy", "--gpu-memory", "1MB", "--devices", "2")
    assert set(found) == {"version", "kind", "name", "notes", "size", "details", "values"}
    size = found["size"]
    assert set(size) == RUN_KEYS
    assert (found["kind"], size["prompts"], size["steps"]) == ("run", 24, 6)
    assert size["tokens_to_write"]["student"] == {"responses": 24, "tokens": 192}
    assert size["device"] == {
        "name": "a GPU of 1MB", "memory_bytes": 1_000_000, "count": 2, "parallel": "ddp"
    }  # fmt: skip
    phases = size["memory_bytes"]["phases"]
    assert size["memory_bytes"]["peak"] == pytest.approx(
        max(sum(parts.values()) for parts in phases.values()), abs=20
    )
    assert size["fits"] is False
    assert found["values"]["train.batch_size"] == {"value": 4, "origin": "run.yaml:11"}
    without = asked(workshop, "run.yaml", "--no-sizes", "--no-values")
    assert set(without) == {"version", "kind", "name", "notes"}


def test_a_run_that_does_not_fit_says_first_what_to_change(workshop: Workshop) -> None:
    lines = workshop.stillhouse("check", "run.yaml", "--gpu-memory", "1MB").out.split("\n")
    first = [line.split(maxsplit=1) for line in lines if line.strip()]
    assert first[2][0] == "fits"
    assert first[2][1].startswith("NO")
    assert "student.lora" in lines[4]
    fitting = workshop.stillhouse("check", "run.yaml", "--gpu-memory", "80GB").out
    assert re.search(r"^ *fits +yes: ", fitting, flags=re.MULTILINE)
    assert "to make it fit" not in fitting


def test_servers_that_are_not_up_yet(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    teacher = "teacher={kind: cache, of: {kind: remote, url: ['http://127.0.0.1:9', 'http://127.0.0.1:10']}}"
    without_key = workshop.stillhouse("check", "run.yaml", teacher)
    assert without_key.code != 0
    assert KEY in without_key.err
    assert "--no-servers" in without_key.err
    found = asked(workshop, "run.yaml", teacher, "--no-servers", "--devices", "2", "--gpu-memory", "80GB")
    assert set(found["size"]) == RUN_KEYS
    assert found["size"]["cache_bytes"] == {}
    assert found["details"]["teacher: not asked"].startswith("http://127.0.0.1:9, http://127.0.0.1:10; ")
    assert "--no-servers" in workshop.refused("check", "run.yaml", teacher, "--no-servers", "--measure")


def test_measured_steps(workshop: Workshop) -> None:
    assert "in one process" in workshop.refused("check", "run.yaml", "--measure", "--devices", "2")
    cached = {"kind": "cache", "of": "teacher"}
    fill_cache(resolve("run.yaml", {"teacher": cached}).config)
    tree = yaml.safe_load((workshop.folder / "run.yaml").read_text(encoding="utf-8"))
    cached_only = {**tree, "teacher": {**cached, "on_miss": "error"}}
    (workshop.folder / "cached.yaml").write_text(yaml.safe_dump(cached_only), encoding="utf-8")
    found = asked(workshop, "cached.yaml", "--measure", "--no-values")
    steps = found["two_steps"]
    assert set(steps) == {"predicted", "measured", "share_of_processor"}
    for one in (steps["predicted"], steps["measured"]):
        assert set(one) == {"memory_bytes", "seconds", "processor_seconds", "phases"}
        assert one["memory_bytes"] > 1e8
    assert steps["measured"]["seconds"] > 0
    assert steps["predicted"]["seconds"] is None, "a cache cannot be probed"
    low, high = found["time"]["seconds"]
    assert 0 < low <= high
    assert found["time"]["unknown"] == []
    for phases, whole in (("phases", "seconds"), ("processor_phases", "processor_seconds")):
        ends = [seconds[0] for seconds in found["time"][phases].values()]
        assert sum(ends) == pytest.approx(found["time"][whole][0])


def test_a_chain_starts_once() -> None:
    times = {
        "first": {"seconds": [12.0, 15.0], "unknown": [], "phases": {"starting": [5.0, 5.0]}},
        "quantised": None,
        "second": {"seconds": [26.0, 26.0], "unknown": ["export"], "phases": {"starting": [6.0, 6.0]}},
    }
    assert chain_total({}, times)["time"] == {
        "seconds": [33.0, 36.0],
        "unknown": ["quantised", "second: export"],
    }


def test_a_chain_counts_what_each_stage_writes(workshop: Workshop) -> None:
    tree = yaml.safe_load((workshop.folder / "run.yaml").read_text(encoding="utf-8"))
    shared = {name: tree[name] for name in ("data", "train", "evaluate", "student", "teacher")}
    stages = {
        "written": {"generate": {"by": "teacher", "samples": 2, "limit": 5}},
        "trained": {"recipe": "gkd", "data": {"train": "stage:written"}},
    }
    (workshop.folder / "chain.yaml").write_text(yaml.safe_dump({**shared, "stages": stages}, sort_keys=False))
    found = asked(workshop, "chain.yaml", "--no-values")
    assert set(found) == {"version", "kind", "notes", "stages", "total"}
    written, trained = found["stages"]["written"]["size"], found["stages"]["trained"]["size"]
    assert written["tokens_to_write"] == {"teacher": {"responses": 10, "tokens": 80}}
    assert trained["tokens_to_write"]["student"]["tokens"] == 64
    total = sum(one["tokens"] for one in trained["tokens_to_write"].values()) + 80
    assert found["total"]["tokens_to_write"] == total
    peaks = [one["memory_bytes"]["peak"] for one in (written, trained)]
    assert found["total"]["memory_bytes"]["peak"] == max(peaks)
    said = workshop.stillhouse("check", "chain.yaml", "--no-values").out
    assert re.search(rf"^ *all .* {total}$", said.replace(" \n", "\n"), flags=re.MULTILINE)
    small = asked(workshop, "chain.yaml", "--no-values", "--gpu-memory", "1MB")
    assert small["total"]["fits"] is False


def test_a_reward_model(workshop: Workshop) -> None:
    (workshop.folder / "reward.yaml").write_text(yaml.safe_dump(REWARD), encoding="utf-8")
    found = asked(workshop, "reward.yaml", "lr=1e-3")
    size = found["size"]
    assert (found["kind"], size["pairs"], size["steps"]) == ("reward", 24, 3)
    assert size["fits"] is True
    assert size["memory_bytes"]["peak"] > 0.6e9
    assert found["values"]["lr"] == {"value": 0.001, "origin": "command line"}
    said = workshop.stillhouse("check", "reward.yaml").out
    assert re.search(r"^ *fits +yes: ", said, flags=re.MULTILINE)
    assert re.search(r"^ *training +3 steps, 24 pairs", said, flags=re.MULTILINE)
    assert "is for runs" in workshop.refused("check", "reward.yaml", "--measure")
    assert "one process" in workshop.refused("check", "reward.yaml", "--devices", "2")
    long = [{"prompt": "Where?", "chosen": "and " * 600, "rejected": "here"}]
    write_jsonl(workshop.folder / "long.jsonl", long)
    longer = ("data.train=long.jsonl", "data.max_response=700")
    assert "512, the context of the model" in workshop.refused("check", "reward.yaml", *longer)
    assert "model" in workshop.refused("check", "reward.yaml", "model=nowhere")
