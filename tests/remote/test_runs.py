"""Whole runs with a teacher on a server: they learn, ask nothing twice, and keep the key to themselves."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.errors import ConfigError, ServerError, StillhouseError
from stillhouse.models import TeacherModel, load_tokenizer
from stillhouse.runs.execute import execute
from stillhouse.runs.generate import GenerateArguments, generate
from stillhouse.runs.resolve import resolve
from tests.servers import Service, broken, smollm2
from tests.small_runs import in_child, nth, rows_of, tree, write_data
from tests.vllm_like import demo_server

KEY = "sk-do-not-write-me"


@pytest.fixture
def service() -> Iterator[Service]:
    with demo_server() as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_data(tmp_path)
    return tmp_path


def server(service: Service, **more: Any) -> dict[str, Any]:
    return {"kind": "server", "url": service.url, "backoff": 0.001, **more}


def asked(service: Service, field: str = "seed") -> Counter[str]:
    """How often each question was put: texts have a seed, scores `prompt_logprobs`; probes are left out."""
    bodies = service.bodies("/v1/completions")
    return Counter(
        json.dumps(b)
        for b in bodies
        if field in b and b.get("prompt_logprobs") in (None, 20) and len(b["prompt"]) > 3
    )


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows_of(folder) if "loss" in row]


def test_kd_from_top_20_log_probabilities_learns_and_hides_the_key(
    service: Service, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    teacher = server(service, k=20, key_env="TEACHER_KEY", cache=str(folder / "kd-store"))
    execute(resolve(tree(folder, "kd", teacher=teacher, recipe="kd", train={"max_steps": 12, "lr": 1e-2})))
    found = losses(folder / "kd")
    assert found[-1] < 0.8 * found[0]
    assert service.headers[-1]["authorization"] == f"Bearer {KEY}"
    for file in (folder / "kd").rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file
    assert (
        json.loads((folder / "kd" / "servers.json").read_text())["teacher's log-probabilities"]["requests"]
        > 0
    )


def test_top_k_losses_are_at_most_those_over_whole_distributions(service: Service, folder: Path) -> None:
    plan: dict[str, Any] = {"recipe": "kd", "train": {"max_steps": 2, "log_every": 1}}
    execute(resolve(tree(folder, "live", **plan)))
    execute(resolve(tree(folder, "served", teacher=server(service, k=20, cache=None), **plan)))
    whole, top = losses(folder / "live")[0], losses(folder / "served")[0]
    assert 0.9 * whole < top <= whole + 1e-6


def test_seqkd_learns_from_the_text_of_llama_cpp(llama_server: str, tmp_path: Path) -> None:
    folder, file = tmp_path, smollm2()
    write_data(folder, rows=5, valid=2)
    load_tokenizer(TeacherModel(path=str(file.parent), gguf_file=file.name)).save_pretrained(
        folder / "tokens"
    )
    plan = tree(
        folder,
        "seqkd",
        recipe="seqkd",
        student={
            "tokenizer": str(folder / "tokens"),
            "from_config": {
                "model_type": "gpt2",
                "n_embd": 32,
                "n_layer": 1,
                "n_head": 2,
                "n_positions": 160,
            },
        },
        teacher={"kind": "server", "url": llama_server, "concurrency": 2},
        engine={"sampling": {"temperature": 0.0, "max_tokens": 4}},
        train={"max_steps": 12, "lr": 5e-2},
    )
    execute(resolve(plan))
    found = losses(folder / "seqkd")
    assert found[-1] < 0.8 * found[0]
    answers = (folder / "seqkd" / "responses" / "answers.jsonl").read_text().splitlines()
    assert len(answers) == 5


def test_a_run_that_was_killed_while_the_teacher_wrote_asks_nothing_twice(
    service: Service, folder: Path
) -> None:
    teacher = server(service, concurrency=1)
    plan = tree(folder, "seqkd", teacher=teacher, recipe="seqkd", engine={"sampling": {"max_tokens": 6}})
    assert in_child(plan, die=nth(7, "open", "answers.jsonl")) == -signal.SIGKILL
    half = asked(service)
    assert 0 < len(half) < 18
    assert in_child(plan, resume=True) == 0
    questions = asked(service)
    # What was answered and kept is not asked for again: only the answer that the process died with, and the
    # request that was under way.
    assert len(questions) == 18
    assert sum(questions.values()) <= 18 + 2


def test_scores_are_asked_for_once_by_runs_that_share_a_store(service: Service, folder: Path) -> None:
    teacher = server(service, cache=str(folder / "store"), concurrency=4)
    plan = tree(folder, "kd", teacher=teacher, recipe="kd", train={"save_every": 2})
    assert in_child(plan, die=nth(2, "open", "metrics.jsonl")) == -signal.SIGKILL
    begun = asked(service, "prompt_logprobs")
    assert 0 < len(begun) < 18
    assert in_child(plan, resume=True) == 0
    assert (
        in_child({**plan, "name": "jsd", "objective": "jsd", "output": {"folder": str(folder / "jsd")}}) == 0
    )
    questions = asked(service, "prompt_logprobs")
    assert len(questions) == 18
    assert set(questions.values()) == {1}


def test_generate_lets_a_server_write_and_goes_on_where_it_broke(service: Service, folder: Path) -> None:
    broken_down = [True]
    with broken(
        service.url, lambda n: (500, {}) if broken_down[0] and len(asked(service)) >= 8 else None
    ) as proxy:
        teacher = {"kind": "server", "url": proxy.url, "backoff": 0.001, "retries": 0, "concurrency": 1}
        plan = tree(folder, "g", teacher=teacher, recipe="seqkd", engine={"sampling": {"max_tokens": 5}})
        config, arguments = resolve(plan).config, GenerateArguments(folder / "teacher.jsonl")
        with pytest.raises(ServerError, match="not answered"):
            generate(config, arguments)
        half = asked(service)
        assert 0 < len(half) < 18
        broken_down[0] = False
        written = generate(config, arguments)
    assert written.finished == 18
    assert set(asked(service).values()) == {1}
    assert len((folder / "teacher.jsonl").read_text(encoding="utf-8").splitlines()) == 1 + 18


@pytest.mark.parametrize("objective", ["csd", "dld"])
def test_csd_needs_the_whole_distribution(service: Service, folder: Path, objective: str) -> None:
    with pytest.raises(ConfigError, match=rf"{objective} cannot be computed from the most probable tokens"):
        resolve(tree(folder, "x", teacher=server(service), recipe=objective))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"responses": {"kind": "speculative"}}, "needs a model in this process"),
        (
            {"responses": {"kind": "on_policy", "teacher_share": 0.2}},
            "needs a model in this process",
        ),
        (
            {"responses": {"kind": "batched", "teacher_share": 0.2}},
            "needs a model in this process",
        ),
        (
            {"responses": {"kind": "mixed", "base": {"kind": "speculative"}}},
            "needs a model in this process",
        ),
        ({"student": {"from_teacher": {"layers": [0]}}}, "needs a model in this process"),
    ],
)
def test_what_needs_the_teachers_weights_is_refused(
    service: Service, folder: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve(tree(folder, "x", teacher=server(service), objective="forward_kl", **changes))


def test_a_server_without_prompt_log_probabilities_is_refused_before_the_run(folder: Path) -> None:
    with demo_server(prompt_logprobs=False) as plain:
        plan = tree(folder, "x", teacher=server(plain), recipe="kd")
        with pytest.raises(StillhouseError, match=r"no log-probabilities of given text.*recipe seqkd"):
            execute(resolve(plan))
    with demo_server(most=5) as few, pytest.raises(StillhouseError, match="max-logprobs"):
        execute(resolve(tree(folder, "x", teacher=server(few), recipe="kd")))
    with demo_server(context=40) as short, pytest.raises(StillhouseError, match="takes 40 tokens at once"):
        execute(resolve(tree(folder, "x", teacher=server(short), recipe="kd")))
    assert not (folder / "x").exists()


def test_the_engine_may_be_a_server_beside_a_live_teacher(service: Service, folder: Path) -> None:
    plan = tree(
        folder,
        "pairs",
        recipe="distillm2",
        objective={"alpha_rule": "fixed"},  # two steps are less than the rule's first epoch
        engine={**server(service), "sampling": {"max_tokens": 6}, "student": {"batch_size": 8}},
        train={"max_steps": 2},
    )
    execute(resolve(plan))
    assert len(asked(service)) == 18  # the teacher's side; the student writes here
