"""The harness gets the same numbers from our model as from its own one."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tests.evaluate.contexts import context, models

from stillhouse.core.journal import Journal
from stillhouse.errors import ConfigError
from stillhouse.evaluate.tasks import REGISTRY
from stillhouse.files import locate

CHOICE = """\
task: which_food
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\n"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{right}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
WRITTEN = """\
task: describe
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}\\n"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 30, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
  - {{metric: chrf, aggregation: chrf, higher_is_better: true}}
"""
WHOLE = """\
task: likely
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{long}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("own-tasks")
    source = locate("package:stillhouse/demo/data") / "eval.jsonl"
    rows = [json.loads(line) for line in source.read_text("utf-8").splitlines()[:6]]
    answers = [row["outputs"][0] for row in rows]
    with open(made / "rows.jsonl", "w", encoding="utf-8") as handle:
        for index, row in enumerate(rows):
            choices = [answers[index], answers[(index + 1) % 6], answers[(index + 2) % 6]]
            kept = {
                "question": row["prompt"],
                "choices": choices[::-1] if index % 2 else choices,
                "right": 2 if index % 2 else 0,
                "answer": answers[index].split(".")[0],
                "long": " ".join(answers * 2),  # longer than the model's context
            }
            handle.write(json.dumps(kept) + "\n")
    for name, text in (("choice", CHOICE), ("written", WRITTEN), ("whole", WHOLE)):
        (made / f"{name}.yaml").write_text(text.format(data=made / "rows.jsonl"), "utf-8")
    return made


@functools.cache
def exact() -> Any:
    """The teacher in float32: the harness adds up log-probabilities in the model's own precision."""
    return copy.deepcopy(models()[1]).float()


def of_lm_eval(task: str, folder: Path) -> dict[str, Any]:
    model = HFLM(pretrained=exact(), tokenizer=models()[0], batch_size=1, device="cpu")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=[task], task_manager=manager, verbosity="ERROR")
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("which_food", ("acc", "acc_norm", "acc_se")),
        ("describe", ("exact_match", "chrf")),
        ("likely", ("word_perplexity", "bits_per_byte")),
    ],
)
def test_the_numbers_are_those_of_the_harness_with_its_own_model(
    folder: Path, task: str, names: tuple[str, ...]
) -> None:
    probe = REGISTRY.parse({"kind": "lm_eval", "tasks": [task], "folder": folder})
    assert probe.title == task
    ours = probe.evaluate(context("teacher", model=exact(), context_length=256))
    theirs = of_lm_eval(task, folder)
    for name in names:
        key = f"{name.removesuffix('_se')}_stderr,none" if name.endswith("_se") else f"{name},none"
        assert ours.metrics[name] == pytest.approx(theirs["results"][task][key], rel=1e-5), name
    assert ours.settings["prompts"] == 6
    assert len(ours.rows) == 6
    if task == "describe":
        assert [row["response"] for row in ours.rows] == [
            sample["filtered_resps"][0] for sample in theirs["samples"][task]
        ]
        assert ours.metrics["chrf"] > 20


def test_an_interrupted_task_keeps_its_pieces(folder: Path, tmp_path: Path) -> None:
    probe = REGISTRY.parse({"kind": "lm_eval", "tasks": ["which_food"], "folder": folder, "limit": 2})
    one = context(
        "teacher", batch_size=2, open_journal=lambda header, name: Journal(tmp_path / "kept.jsonl", header)
    )
    first = probe.evaluate(one)
    pieces = (tmp_path / "kept.jsonl").read_text("utf-8").splitlines()
    assert len(pieces) == 1 + 3  # the header, and six likelihoods by two
    assert probe.evaluate(one) == first
    assert (tmp_path / "kept.jsonl").read_text("utf-8").splitlines() == pieces


def test_several_tasks_are_measured_apart(folder: Path) -> None:
    probe = REGISTRY.parse({"kind": "lm_eval", "tasks": ["which_food", "likely"], "folder": folder})
    assert [one.title for one in probe.expanded()] == ["which_food", "likely"]


def test_an_unknown_task_gets_a_suggestion(folder: Path) -> None:
    probe = REGISTRY.parse({"kind": "lm_eval", "tasks": ["which_fod"], "folder": folder})
    with pytest.raises(ConfigError, match="did you mean 'which_food'"):
        probe.evaluate(context("teacher"))
