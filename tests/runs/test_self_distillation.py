"""The student as its own teacher: what only the teacher reads, whose weights it has, and exact resume."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stillhouse.core.types import Progress
from stillhouse.errors import ConfigError, DataError
from stillhouse.runs.build import Parts, assemble
from stillhouse.runs.estimate import PEAK_MEMORY, estimate
from stillhouse.runs.folder import RunFolder
from stillhouse.runs.make_step import make_step
from stillhouse.runs.resolve import resolve
from stillhouse.runs.row_views import row_views
from stillhouse.train.step import Step
from tests.conftest import ROOT, script
from tests.small_runs import (
    STUDENT,
    TEACHER,
    differences,
    in_child,
    nth,
    outcome,
    rows_of,
    tree,
    tree_of_recipe,
    write_data,
)

HINT = "{prompt}\nAnswer: {response}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("self")
    write_data(made)
    return made


@pytest.fixture(scope="module")
def straight(folder: Path) -> Any:
    """The outcome of a run that nothing interrupts, by whose weights its teacher has."""

    @functools.cache
    def made(weights: str) -> dict[str, Any]:
        assert in_child(config_of(folder, f"{weights}-straight", weights)) == 0
        return outcome(folder / f"{weights}-straight")

    return made


def config_of(folder: Path, name: str, weights: str, context: Any = HINT, **changes: Any) -> dict[str, Any]:
    data = {**({} if context is None else {"teacher_context": context}), **changes.pop("data", {})}
    given = {"objective": "reverse_kl", "responses": {"kind": "mixed", "student_share": 0.5}, **changes}
    config = tree(folder, name, data=data, **given)
    config["teacher"] = {"kind": "student", "weights": weights}
    if weights == "ema":
        config["teacher"] |= {"every": 2, "decay": 0.5}
    return config


def made(config: dict[str, Any], folder: Path) -> tuple[Parts, Step]:
    parts = assemble(resolve(config).config)
    return parts, make_step(parts, RunFolder(folder / config["name"]))


def gradients(parts: Parts, step: Step) -> torch.Tensor:
    """Of one step on four prompts, without dropout."""
    parts.student.zero_grad()
    parts.student.eval()
    prepared = step.prepare(parts.data.train[:4], Progress(0, 9, 0.0, 1.8), 2)
    for micro in prepared.micro_batches:
        step.loss(parts.student, micro).loss.backward()
    return torch.cat([p.grad.flatten() for p in parts.student.parameters() if p.grad is not None])


def test_the_teacher_alone_reads_the_context(folder: Path) -> None:
    config = resolve(config_of(folder, "read", "frozen")).config
    first = next(iter(row_views(config)))
    reference = json.loads((folder / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])["outputs"][0]
    assert first.teacher_prompt == f"{first.prompt}Answer: {reference}\n"
    assert reference not in first.prompt


def test_columns_and_the_row_before_are_shown(folder: Path) -> None:
    rows = [{"prompt": f"Question {n}?", "response": f"Answer {n}.", "found": f"Fact {n}."} for n in range(3)]
    (folder / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    context = {"main": "{found} {prompt}", "wrong": "{other_prompt} {other_response} {prompt}"}
    config = config_of(folder, "columns", "frozen", context, data={"train": str(folder / "facts.jsonl")})
    wrong = {"kind": "forward_kl", "teacher_model": "wrong"}
    config["objective"] = {"kind": "sum", "terms": ["forward_kl", wrong]}
    config["teachers"] = {"wrong": {"kind": "student"}}
    parts, step = made(config, folder)
    assert parts.data.report["sets"][0]["dropped"] == {"no row before it for the teacher's context": 1}
    prompt = parts.data.train[1]
    assert parts.decode(prompt.teacher_ids or ()) == "Fact 2. Question 2?\n"
    assert parts.decode(prompt.context_ids["wrong"]) == "Question 1? Answer 1. Question 2?\n"
    prepared = step.prepare(parts.data.train, Progress(0, 9, 0.0, 1.8), 1)
    read = prepared.micro_batches[0].read_by("wrong")
    assert [ids[:n] for ids, n in zip(read.token_ids, read.prompt_lengths, strict=True)] == [
        one.context_ids["wrong"] for one in (r.prompt for r in prepared.micro_batches[0].batch.responses)
    ]
    assert step.teachers["main"] is step.teachers["wrong"], "one copy of the weights for both contexts"


def test_live_weights_are_the_student_s_own_and_learn_nothing_from_themselves(folder: Path) -> None:
    """Gradients as from a frozen copy of the same weights, without that copy."""
    frozen, live = (gradients(*made(config_of(folder, w, w), folder)) for w in ("frozen", "live"))
    assert torch.equal(frozen, live)
    assert frozen.abs().max() > 1e-4
    parts, step = made(config_of(folder, "live", "live"), folder)
    assert step.teachers["main"].model is parts.student
    with pytest.raises(ConfigError, match=r"teacher\.weights.*: live weights that read the student's prompt"):
        resolve(config_of(folder, "nothing", "live", context=None))


def test_live_weights_are_read_without_dropout_which_comes_back(folder: Path) -> None:
    parts, step = made(config_of(folder, "dropout", "live"), folder)
    parts.student.train()
    (micro,) = step.prepare(parts.data.train[:2], Progress(0, 9, 0.0, 1.8), 1).micro_batches
    teacher = step.teachers["main"]
    assert torch.equal(teacher.hidden(micro.batch), teacher.hidden(micro.batch))
    assert parts.student.training


def test_an_average_moves_every_k_steps(folder: Path) -> None:
    parts, step = made(config_of(folder, "average", "ema"), folder)
    teacher = step.teachers["main"]
    name, weights = next(iter(parts.student.named_parameters()))
    average = dict(teacher.model.named_parameters())[name]
    start = average.clone()
    with torch.no_grad():
        weights += 1.0
    teacher.follow(1)
    assert torch.equal(average, start)
    teacher.follow(2)
    torch.testing.assert_close(average, start + 0.5)
    assert not average.requires_grad


def test_of_a_student_with_adapters_only_those_are_averaged(folder: Path) -> None:
    config = config_of(folder, "lora", "ema")
    config["student"] = {"path": TEACHER, "lora": {"rank": 2, "targets": ["q_proj"]}}
    parts, step = made(config, folder)
    teacher = step.teachers["main"]
    ours, theirs = dict(parts.student.named_parameters()), dict(teacher.model.named_parameters())
    assert ours.keys() == theirs.keys()
    shared = {name for name in ours if ours[name] is theirs[name]}
    assert shared == {name for name, one in ours.items() if not one.requires_grad}
    assert teacher.state_dict().keys() == ours.keys() - shared != set()


@pytest.mark.parametrize("weights", ["live", "ema"])
def test_resumed_is_as_straight(folder: Path, straight: Any, weights: str) -> None:
    wanted = straight(weights)
    killed = config_of(folder, f"{weights}-killed", weights)
    assert in_child(killed, die=nth(1, "open", "checkpoint-6/trainer_state.json")) == -9
    assert in_child(killed, resume=True) == 0
    assert differences(wanted, outcome(folder / f"{weights}-killed")) == []
    losses = [row["loss"] for row in rows_of(folder / f"{weights}-straight") if row["phase"] == "train"]
    assert min(losses) > 0


def test_whose_weights_it_has_changes_the_outcome(straight: Any) -> None:
    assert differences(straight("live"), straight("ema")) != []


def test_a_student_with_adapters_resumes_with_their_average(folder: Path) -> None:
    def config(name: str) -> dict[str, Any]:
        found = config_of(folder, name, "ema", train={"max_steps": 5})
        return found | {"student": {"path": TEACHER, "lora": {"rank": 2, "targets": ["q_proj"]}}}

    assert in_child(config("lora-straight")) == 0
    assert in_child(config("lora-killed"), die=nth(1, "open", "checkpoint-4/trainer_state.json")) == -9
    assert in_child(config("lora-killed"), resume=True) == 0
    assert differences(outcome(folder / "lora-straight"), outcome(folder / "lora-killed")) == []


def test_unisd_resumes_with_one_average_for_all_contexts(folder: Path) -> None:
    def config(name: str) -> dict[str, Any]:
        found = tree_of_recipe(folder, "unisd", train={"max_steps": 4, "warmup": 0.0})
        wide = {"tokenizer": TEACHER, "from_config": {**STUDENT, "n_positions": 256}}  # room for contexts
        found["student"] = wide
        return found | {"name": name, "output": {"folder": str(folder / name), "report": False}}

    changed = {"every": 1}
    straight, killed = (config(name) for name in ("unisd-straight", "unisd-killed"))
    for one in (straight, killed):
        one["teacher"] = changed
        one["teachers"] = dict.fromkeys(("second", "third", "wrong"), changed)
    assert in_child(straight) == 0
    assert in_child(killed, die=nth(1, "open", "checkpoint-4/trainer_state.json")) == -9
    assert in_child(killed, resume=True) == 0
    assert differences(outcome(folder / "unisd-straight"), outcome(folder / "unisd-killed")) == []
    newest = folder / "unisd-straight" / "checkpoints" / "checkpoint-4" / "stillhouse.pt"
    assert torch.load(newest, weights_only=True)["step"]["teachers"].keys() == {"main"}


def test_what_is_wrong_is_said(folder: Path) -> None:
    def refused(match: str, **changes: Any) -> None:
        with pytest.raises((ConfigError, DataError), match=match):
            assemble(resolve(config_of(folder, "wrong", "frozen", **changes)).config)

    refused(r"data\.teacher_context.*: no teacher is called 'man'", context={"man": HINT})
    refused(r"data\.teacher_context.*must contain \{prompt\}", context="{response}")
    refused(r"train\.jsonl:1: data\.teacher_context shows \{hint\}, of which", context="{prompt} {hint}")
    refused(r"write a text together", responses={"kind": "speculative"})
    none = config_of(folder, "none", "frozen", recipe="sft", objective="cross_entropy", responses="fixed")
    del none["teacher"]
    with pytest.raises(ConfigError, match=r"no teacher is called 'main'"):
        resolve(none)


def test_a_copy_counts_in_the_estimate(folder: Path) -> None:
    wide = {"tokenizer": TEACHER, "from_config": {**STUDENT, "n_embd": 1024, "n_layer": 8}}
    found = {
        weights: estimate(resolve(config_of(folder, weights, weights) | {"student": wide}).config)
        for weights in ("live", "frozen")
    }
    assert found["frozen"][PEAK_MEMORY] > found["live"][PEAK_MEMORY]


def test_a_context_too_long_for_the_student_is_dropped(folder: Path) -> None:
    with pytest.raises(DataError, match="prompt too long for the teacher"):
        assemble(resolve(config_of(folder, "long", "frozen", "{prompt}" + " very long" * 60)).config)


@pytest.mark.parametrize("name", ["own", "contexts", "unisd"])
def test_the_page_trains_as_it_stands(
    folder: Path, straight: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every YAML file of docs/self-distillation.md, from the student of the run above."""
    page = (Path(__file__).parents[2] / "docs" / "self-distillation.md").read_text(encoding="utf-8")
    (text,) = re.findall(rf"```yaml\n# {name}\.yaml\n(.*?)```", page, flags=re.DOTALL)
    straight("live")
    monkeypatch.chdir(folder)
    if not Path("student").exists():
        Path("student").symlink_to(folder / "live-straight" / "student", target_is_directory=True)
    assert in_child(yaml.safe_load(text)) == 0
    assert [row["phase"] for row in rows_of(folder / "runs" / name)] == ["train"]


def test_the_table_of_the_page_is_that_of_the_result() -> None:
    (page,) = script(ROOT / "docs" / "build_self_distillation.py").pages().values()
    assert page == (ROOT / "docs" / "self-distillation.md").read_text(encoding="utf-8"), "run: make docs"
