"""Whole runs with a teacher that has another tokenizer: training, evaluation, refusals, the verb align."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stillhouse.engines import Sampling, TokenizerInfo, TransformersConfig
from stillhouse.errors import ModelError
from stillhouse.models import TeacherModel, load_teacher, load_tokenizer
from stillhouse.runs.estimate import estimate
from stillhouse.runs.resolve import resolve
from stillhouse.runs.tokenizers import tokenizers
from tests.conftest import shared
from tests.small_runs import in_child, rows_of, tree
from tests.workshop import Workshop

pytestmark = pytest.mark.needs_shared

OPENINGS = ("a girl named Lily", "a boy named Tom", "a big dog", "a red bird", "a small cat", "an old man")
PLACES = ("in the park", "at home", "by the sea", "under a tree")


@pytest.fixture(scope="module")
def stories() -> Path:
    return shared() / "data/models/stories260k"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, stories: Path) -> Path:
    """Story openings, each with what the teacher goes on to say; and a second teacher."""
    made = tmp_path_factory.mktemp("two-tokenizers")
    config = TeacherModel(path=str(stories))
    tokenizer = load_tokenizer(config)
    engine = TransformersConfig().build(load_teacher(config), TokenizerInfo((2,), 2))
    asked = [f"Once upon a time, there was {who} {where}." for who in OPENINGS for where in PLACES]
    done = engine.generate([tokenizer(text)["input_ids"] for text in asked], Sampling(max_tokens=40), seed=1)
    rows = [
        json.dumps({"prompt": text, "response": tokenizer.decode(one.token_ids, skip_special_tokens=True)})
        for text, one in zip(asked, done, strict=True)
    ]
    (made / "train.jsonl").write_text("\n".join(rows[:20]) + "\n")
    (made / "valid.jsonl").write_text("\n".join(rows[20:]) + "\n")
    shutil.copytree(stories, made / "other")
    weights = load_file(made / "other" / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    noisy = {k: v + 0.3 * v.std() * torch.randn(v.shape, generator=generator) for k, v in weights.items()}
    (made / "other" / "model.safetensors").chmod(0o644)
    save_file(noisy, made / "other" / "model.safetensors", metadata={"format": "pt"})
    return made


def config(folder: Path, name: str, teacher: Path, **changes: Any) -> dict[str, Any]:
    made = tree(folder, name, **{"teacher": {"kind": "live", "path": str(teacher)}, **changes})
    made["data"] |= {"max_response": 40}
    train = {"max_steps": 20, "batch_size": 10, "micro_batch_size": 5, "lr": 1e-2, "log_every": 4}
    made["train"] |= {**train, "save_every": "never", "validate_every": 20, **changes.get("train", {})}
    return made


def losses(folder: Path, name: str, phase: str) -> list[float]:
    return [row["loss"] for row in rows_of(folder / name) if row["phase"] == phase]


@pytest.mark.parametrize("recipe", ["uld", "gold", "transport"])
def test_the_loss_falls_and_the_teacher_matters(folder: Path, stories: Path, recipe: str) -> None:
    options: dict[str, Any] = {"recipe": recipe}
    if recipe == "gold":
        options["responses"] = {"kind": "fixed"}
    for name, teacher, steps in (("one", stories, 20), ("other", folder / "other", 1)):
        train = {"max_steps": steps, "log_every": 1}
        assert in_child(config(folder, f"{recipe}-{name}", teacher, train=train, **options)) == 0
    trained = losses(folder, f"{recipe}-one", "train")
    assert sum(trained[-4:]) < 0.9 * sum(trained[:4])
    assert losses(folder, f"{recipe}-other", "train")[0] != trained[0], "of the same student and rows"
    valid = losses(folder, f"{recipe}-one", "valid")
    assert valid[-1] < valid[0] - 0.3, "the teacher's text became more likely"
    row = next(row for row in rows_of(folder / f"{recipe}-one") if row["phase"] == "train")
    assert row["alignment/dropped"] == 0
    assert 0 < row["alignment/one_to_one"] < 1


def test_chains_are_aligned_across_tokenizers(folder: Path, stories: Path) -> None:
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    chains = [{**row, "reasoning": row["prompt"][-12:]} for row in rows]
    (folder / "chains.jsonl").write_text("\n".join(map(json.dumps, chains)) + "\n")
    length = {"max_steps": 3, "batch_size": 4, "micro_batch_size": 4, "validate_every": 3, "log_every": 1}
    ends = []
    for name, teacher in (("one", stories), ("other", folder / "other")):
        run = config(folder, f"chains-{name}", teacher, recipe="cot2align", train=length)
        run["data"] |= {"train": str(folder / "chains.jsonl"), "max_response": 24}
        assert in_child(run) == 0
        ends.append(load_file(folder / f"chains-{name}" / "student" / "model.safetensors"))
    assert any(not torch.equal(ends[0][key], ends[1][key]) for key in ends[0]), "the teacher matters"
    row = next(row for row in rows_of(folder / "chains-one") if row["phase"] == "train")
    assert row["alignment/dropped"] == 0
    assert {"loss/fixed", "loss/direct"} <= row.keys()
    valid = losses(folder, "chains-one", "valid")
    assert valid[-1] < valid[0]


def test_on_policy_text_and_an_interrupted_run_with_its_evaluation(folder: Path, stories: Path) -> None:
    options = {
        "recipe": "gold",
        "responses": {"student_share": 1.0},
        "evaluate": {"sampling": {"max_tokens": 8}},
    }
    run = config(folder, "own", stories, **options, train={"max_steps": 4, "validate_every": "never"})
    run["evaluate"] |= {"teacher": True}
    assert in_child(run) == 0
    assert all(row.get("responses/student", 1.0) == 1.0 for row in rows_of(folder / "own"))
    kept = folder / "own" / "evaluation"
    teacher = json.loads((kept / "teacher.json").read_text())["metrics"]
    student = json.loads((kept / "student-after.json").read_text())["metrics"]
    assert teacher["loss"] < 3.0, "text in its own tokens is likely to it; among 512 ids a guess has 6.2"
    assert "kl" not in " ".join(student), "no divergence between two vocabularies is claimed"
    answers = [json.loads(line) for line in (kept / "teacher.jsonl").read_text().splitlines()]
    assert all(answer["response"] for answer in answers)


def test_text_that_such_a_teacher_writes_is_learnt(folder: Path, stories: Path) -> None:
    run = config(folder, "seqkd", stories, recipe="seqkd", train={"max_steps": 12, "validate_every": 12})
    assert in_child(run) == 0
    valid = losses(folder, "seqkd", "valid")
    assert valid[-1] < valid[0] - 0.3


def refusal(folder: Path, stories: Path, **changes: Any) -> str:
    with pytest.raises(ModelError) as found:
        tokenizers(resolve(config(folder, "no", stories, **changes)).config)
    return str(found.value)


def test_a_further_teacher_reads_the_students_tokens(folder: Path, stories: Path) -> None:
    """Only the main teacher's text is translated, so another tokenizer is refused for any other."""
    for main in (tree(folder, "no")["teacher"], None):
        changes = {"teacher": main, "objective": {"kind": "forward_kl", "teacher_model": "second"}}
        run = tree(folder, "no", **changes, teachers={"second": {"kind": "live", "path": str(stories)}})
        with pytest.raises(ModelError, match=r"^teachers.second: student and teacher have different token"):
            tokenizers(resolve(run).config)


def test_what_needs_one_tokenizer_is_refused_with_the_way_out(folder: Path, stories: Path) -> None:
    for recipe in ("kd", "gkd", "csd"):
        said = refusal(folder, stories, recipe=recipe)
        assert "different tokenizers" in said
        assert "Use objective uld, span or transport, or a teacher with the student's tokenizer" in said
    mixed = {"kind": "sum", "terms": [{"kind": "uld"}, {"kind": "forward_kl"}]}
    assert "Use objective uld" in refusal(folder, stories, objective=mixed)
    help_of_teacher = {"teacher_share": 0.2}
    for responses in (
        {"kind": "speculative"},
        {"kind": "on_policy", **help_of_teacher},
        {"kind": "batched", **help_of_teacher},
        {"kind": "adaptive", "student_share": 0.5, "base": {"kind": "on_policy", **help_of_teacher}},
    ):
        said = refusal(folder, stories, objective="span", responses=responses)
        asks = ".base.kind=on_policy" if "base" in responses else f".kind={responses['kind']}"
        assert f"responses{asks} needs both models to read the same token ids" in said


def test_check_says_how_the_models_are_compared(folder: Path, stories: Path) -> None:
    found = estimate(resolve(config(folder, "check", stories, recipe="uld")).config)["tokenizers"]
    assert (
        "1,024 ids of the student and 512 of the teacher, 357 with the same bytes; compared by sum" in found
    )
    alone = estimate(resolve(tree(folder, "same", recipe="kd")).config)["tokenizers"]
    assert alone == "one for both, 1,024 ids"


@pytest.fixture
def workshop(tmp_path: Path, folder: Path, stories: Path, capsys: pytest.CaptureFixture[str]) -> Workshop:
    made = config(folder, "shown", stories, recipe="uld")
    made["data"]["max_response"] = 120  # so that responses come to their end
    (tmp_path / "run.yaml").write_text(json.dumps(made))
    return Workshop(tmp_path, capsys)


def test_align_shows_groups_in_a_pipe_and_as_json(workshop: Workshop) -> None:
    file = str(workshop.folder / "run.yaml")
    said = workshop.stillhouse("align", file, "--number", "2")
    assert said.code == 0
    assert "train:1" in said.out
    assert "train:2" in said.out
    assert "<end>" in said.out
    assert "\x1b" not in said.out
    found = json.loads(workshop.stillhouse("align", file, "--number", "2", "--json").out)
    assert found["summary"]["share_of_bytes_covered"] == 1.0
    assert 0 < found["summary"]["share_of_student_tokens_one_to_one"] < 1
    for sample in found["samples"]:
        assert sum(group["bytes"] for group in sample["groups"]) == sample["bytes"]
        spelt = "".join(json.loads(t) for group in sample["groups"][:-1] for t in group["student"])
        assert spelt == sample["text"]


def test_align_has_nothing_to_show_for_one_tokenizer(workshop: Workshop) -> None:
    same = "teacher.path=package:stillhouse/demo/teacher"
    said = workshop.stillhouse("align", str(workshop.folder / "run.yaml"), same)
    assert said.code == 2
    assert "the same tokenizer" in said.err
