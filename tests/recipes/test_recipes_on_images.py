"""Every recipe trains a vision-language student on rows with images, with a teacher of another tower."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import ROOT
from tests.recipe_steps import AHEAD
from tests.small_runs import differences, in_child, nth, outcome, tree, tree_of_recipe
from tests.vision_models import picture, vision_model

from stillhouse import recipes
from stillhouse.core.types import Progress
from stillhouse.errors import ConfigError, DataError
from stillhouse.evaluate.judge_answers import find_answers, pair_answers
from stillhouse.files import read_jsonl
from stillhouse.runs.build import assemble
from stillhouse.runs.execute import execute
from stillhouse.runs.folder import RunFolder
from stillhouse.runs.make_step import make_step
from stillhouse.runs.resolve import resolve

NAMES = [recipe.name for recipe in recipes.all_recipes()]
LATE = Progress(step=8, max_steps=9, epoch=1.6, epochs=1.8)
"""Rules that begin later have begun."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and rows: one image, none, two."""
    made = tmp_path_factory.mktemp("images")
    vision_model(made / "student", "llava", seed=1, tower=12)
    vision_model(made / "teacher", "llava", seed=2)
    vision_model(made / "tiles", "idefics3", seed=3)
    rows = []
    for number in range(9):
        shown = [f"{number}-{place}.png" for place in range((1, 0, 2)[number % 3])]
        for place, name in enumerate(shown):
            picture(10 * number + place).save(made / name)
        rows.append({"prompt": "<image>" * len(shown) + f"what is {number}?", "images": shown})
    write(made / "train.jsonl", [{**row, "response": f"a {n}"} for n, row in enumerate(rows)])
    write(made / "valid.jsonl", [{**row, "response": f"a {n}"} for n, row in enumerate(rows[:3])])
    write(made / "pairs.jsonl", [{**row, "chosen": f"a {n}", "rejected": "no"} for n, row in enumerate(rows)])
    chains = [{**row, "response": f"a {n}", "reasoning": "I see"} for n, row in enumerate(rows)]
    write(made / "chains.jsonl", chains)
    return made


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def models(folder: Path, teacher: str = "teacher") -> dict[str, Any]:
    return {
        "student": {"path": str(folder / "student"), "tower": "trained"},
        "teacher": {"kind": "live", "path": str(folder / teacher)},
    }


def trained(folder: Path, config: dict[str, Any]) -> None:
    """A step on four prompts: finite, and down to the student's tower."""
    parts = assemble(resolve(config).config)
    step = make_step(parts, RunFolder(folder / config["name"]))
    parts.student.train()
    made = step.with_batch_statistics(parts.student, step.prepare(parts.data.train[:4], LATE, 2))
    losses = [step.loss(parts.student, micro) for micro in made.micro_batches]
    for loss in losses:
        loss.loss.backward()
    step.finish(made, losses)
    assert all(math.isfinite(float(loss.loss)) for loss in losses)
    grads = {name: one.grad for name, one in parts.student.named_parameters() if "vision" in name}
    assert any(grad is not None and bool(grad.any()) for grad in grads.values())


@pytest.mark.parametrize("name", NAMES)
def test_trains_down_to_the_tower(folder: Path, name: str) -> None:
    other = str(folder / "teacher")
    config = tree_of_recipe(folder, name, other, **AHEAD.get(name, {}), **models(folder))
    trained(folder, config)


@pytest.mark.parametrize("name", ["kd", "gkd", "distillm2"])
def test_a_teacher_of_tiles_reads_the_picture_as_other_tokens(folder: Path, name: str) -> None:
    config = tree_of_recipe(folder, name, **models(folder, "tiles"))
    parts = assemble(resolve(config).config)
    (first, *_) = parts.data.train
    assert first.teacher_ids is not None
    assert len(first.teacher_ids) != len(first.token_ids)
    trained(folder, config)


@pytest.mark.parametrize("name", ["skd", "minillm"])
def test_a_text_that_both_write_needs_images_of_as_many_tokens(folder: Path, name: str) -> None:
    config = tree_of_recipe(folder, name, **models(folder, "tiles"))
    with pytest.raises(DataError, match="write a text together"):
        assemble(resolve(config).config)


ADAPTIVE = {
    "objective": {"teacher": "skew_rkl", "student": "skew_rkl"},
    "responses": {
        "kind": "adaptive", "capacity": 8, "cache_teacher_hidden": True,
        "student_share": {"kind": "dev_loss", "start": 0.6, "step": 0.2, "against": "last"},
        "base": {"kind": "generated", "by": "teacher"},
    },
}  # fmt: skip


def documented() -> dict[str, Any]:
    """The configuration of docs/vision.md with methods."""
    page = (ROOT / "docs" / "vision.md").read_text(encoding="utf-8").split("## Methods", 1)[1]
    found: dict[str, Any] = yaml.safe_load(page.split("```yaml\n", 1)[1].split("```", 1)[0])
    return found


def test_the_page_runs_and_its_answers_are_scored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    steps = {"max_steps": 3, "batch_size": 6, "micro_batch_size": 3, "save_every": "never"}
    short = {"train": steps, "output": {"folder": str(folder / "page"), "report": False}, "name": "page"}
    config = documented()
    config["data"]["max_response"] = 8
    execute(resolve({**config, **short}))
    files = (folder / "page" / "evaluation").glob("student-after*.json")
    metrics = set().union(*(json.loads(one.read_text(encoding="utf-8"))["metrics"] for one in files))
    assert {"vqa_accuracy", "exact_match", "rouge_l", "kl_to_teacher"} <= metrics
    # Every file of answers has the images of its questions: small for the page, and where a judge opens them.
    kept = sorted((folder / "page" / "evaluation").glob("student-after*.jsonl"))
    assert len(kept) == 3
    for answers in kept:
        assert answers.read_text(encoding="utf-8").count('"thumbnail": "data:image/jpeg;base64,') == 3
        (folder / "others.jsonl").write_bytes(answers.read_bytes())
        one, other = (find_answers(path, None, "A") for path in (answers, folder / "others.jsonl"))
        pairs = pair_answers(one, other, None)
        assert [(pair.question.count("<image>"), len(pair.images)) for pair in pairs] == [
            (1, 1), (0, 0), (2, 2),
        ]  # fmt: skip


def test_shards_that_some_processes_would_not_gather_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tree_of_recipe(folder, "kd", **models(folder), train={"hf": {"fsdp": "full_shard"}})
    with pytest.raises(ConfigError, match=r"train\.hf\.fsdp: .*got 6 of 9 rows with images"):
        assemble(resolve(config).config)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch` does
    config = tree_of_recipe(folder, "kd", **models(folder))
    with pytest.raises(ConfigError, match="ACCELERATE_USE_FSDP: "):
        assemble(resolve(config).config)
    rows = [row for row in read_jsonl(folder / "train.jsonl") if row["images"]]
    write(folder / "seen.jsonl", rows)
    config["data"]["train"] = str(folder / "seen.jsonl")
    assert len(assemble(resolve(config).config).data.train) == 6


def test_trimmed_tokens_of_a_model_that_sees_are_refused_before_rows_are_read(folder: Path) -> None:
    student = {"from_teacher": {"layers": [0], "vocabulary": "data"}}
    config = tree_of_recipe(folder, "kd", student=student, teacher=models(folder)["teacher"])
    with pytest.raises(ConfigError, match=r"vocabulary: data: a model that reads images keeps all tokens"):
        assemble(resolve(config).config)


CACHE = {"kind": "cache", "of": "teacher", "store": "topk", "k": 16, "folder": "cache"}
INTERRUPTED: dict[str, dict[str, Any]] = {
    "adaptive": ADAPTIVE,
    "gkd": {"recipe": "gkd", "responses": {"kind": "on_policy"}},
    "distillm2": {"recipe": "distillm2"},
    "kd": {"recipe": "kd", "teacher": CACHE},
}
"""A buffer and rounds of the teacher's text; the student's text; rounds of pairs with curricula; a cache."""


@pytest.mark.parametrize("name", INTERRUPTED)
def test_resumed_it_ends_as_one_that_was_not_killed(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers, rounds, caches and checkpoints hold no pixels, only what names them."""
    monkeypatch.chdir(folder)
    parts = {**models(folder), **INTERRUPTED[name]}
    straight = tree(folder, f"straight-{name}", **parts, train={"max_steps": 4})
    assert in_child(straight) == 0
    broken = {**straight, "output": {**straight["output"], "folder": str(folder / f"broken-{name}")}}
    if name == "kd":
        broken["teacher"] = {**CACHE, "folder": "another-cache"}
    assert in_child(broken, die=nth(1, "open", "checkpoint-4/trainer_state.json")) < 0
    assert in_child(broken, resume=True) == 0
    ends = [outcome(folder / f"{which}-{name}") for which in ("straight", "broken")]
    # What the killed run had asked the teacher already, the resumed one finds in the cache.
    assert not [one for one in differences(*ends) if "cache/hits" not in one]
