"""The papers' protocol; the numbers equal those of rouge-score and sacrebleu called by hand."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from tests.conftest import shared
from tests.evaluate.contexts import context
from transformers import AutoTokenizer

from stillhouse.config import Layer, Layered, validate
from stillhouse.data import DataConfig, Encoder
from stillhouse.data.rows import Fields
from stillhouse.data.templates import Alpaca
from stillhouse.errors import ConfigError
from stillhouse.evaluate import EvaluateConfig
from stillhouse.evaluate.tasks import REGISTRY
from stillhouse.evaluate.tasks.instructions import instruction_rows
from stillhouse.files import locate


def config(*tasks: Any) -> EvaluateConfig:
    layered = Layered()
    layered.add(Layer.of({"tasks": list(tasks)}, "test"))
    return validate(EvaluateConfig, layered)[0]


def by_hand(rows: list[dict[str, Any]]) -> tuple[list[float], list[float], list[float]]:
    """ROUGE-L, BLEU and chrF of each seed from what a run folder keeps."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    rouge, bleu, chrf = [], [], []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        own = [row for row in rows if row["seed"] == seed]
        texts = [row["response"] for row in own]
        best = [
            max(
                scorer.score(reference, row["response"])["rougeL"].fmeasure for reference in row["references"]
            )
            for row in own
        ]
        rouge.append(100 * fmean(best))
        most = max(len(row["references"]) for row in own)
        columns = [[(row["references"] + [None] * most)[i] for row in own] for i in range(most)]
        bleu.append(sacrebleu.corpus_bleu(texts, columns).score)
        chrf.append(sacrebleu.corpus_chrf(texts, columns).score)
    return rouge, bleu, chrf


def test_scores_equal_the_libraries_called_by_hand(tmp_path: Path) -> None:
    lines = (locate("package:stillhouse/demo/data") / "eval.jsonl").read_text("utf-8").splitlines()[:6]
    rows = [json.loads(line) for line in lines]
    rows[0]["outputs"] = [*rows[0]["outputs"], "Another way to put it."]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    task = REGISTRY.parse(
        {
            "kind": "instructions",
            "data": {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")},
            "metrics": ["rouge_l", "bleu", "chrf"],
            "seeds": [10, 20, 30],
            "sampling": {"temperature": 0.7, "max_tokens": 40},
        }
    )
    result = task.evaluate(context())
    assert len(result.rows) == 18
    for name, values in zip(("rouge_l", "bleu", "chrf"), by_hand(result.rows), strict=True):
        assert result.metrics[name] == pytest.approx(fmean(values), abs=1e-4), name
        assert result.metrics[f"{name}_std"] == pytest.approx(stdev(values), abs=1e-4), name
    for name in ("bleu", "chrf"):  # sacrebleu's bootstrap lies around the mean over seeds
        low, high = result.metrics[f"{name}_low"], result.metrics[f"{name}_high"]
        assert low < result.metrics[name] < high
        assert (low + high) / 2 == pytest.approx(result.metrics[name])
        assert result.metrics[name] > 5
    assert result.metrics["kl_to_teacher"] > 0
    assert result.metrics["kl_to_teacher_on_own_text"] > 0


def test_equal_questions_of_e2e_are_one_with_all_references(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Describe.", "input": "a", "outputs": ["one", "two"]},
        {"instruction": "Describe.", "input": "b", "outputs": ["three"]},
        {"instruction": "Describe.", "input": "a", "outputs": ["two", "four"]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    task = REGISTRY.parse({"kind": "e2e", "data": {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")}})
    one = context()
    asked = task.load(Encoder(one.data.template, one.tokenizer), one.data)
    assert [q.prompt.references for q in asked.examples] == [("one", "two", "four"), ("three",)]


def test_the_protocol_fills_in_what_is_not_given() -> None:
    plain, papers, own = config(
        {"kind": "instructions", "name": "a", "data": "a.jsonl"},
        {"kind": "instructions", "name": "b", "data": "a.jsonl", "protocol": "minillm"},
        {
            "kind": "instructions",
            "name": "c",
            "data": "a.jsonl",
            "protocol": "minillm",
            "sampling": {"no_repeat_ngram_size": 0},
            "template": "chat",
        },
    ).tasks
    assert plain.seeds == papers.seeds == own.seeds == (10, 20, 30, 40, 50)
    assert plain.sampling.temperature == papers.sampling.temperature == 1.0
    assert [task.sampling.no_repeat_ngram_size for task in (plain, papers, own)] == [0, 6, 0]
    assert papers.sampling.max_tokens == own.sampling.max_tokens == 256
    assert "max_tokens" not in plain.sampling.model_fields_set
    assert (papers.template.kind, own.template.kind, plain.template) == ("alpaca", "chat", None)


def test_sets_are_tasks_of_their_own() -> None:
    sets = {"dolly": "dolly_eval.jsonl", "vicuna": "vicuna80_eval.jsonl"}
    found = config({"kind": "instructions", "sets": sets, "limit": 5}).expanded_tasks()
    assert [task.title for task in found] == ["dolly", "vicuna"]
    assert [task.data.path for task in found] == list(sets.values())
    assert all(task.limit == 5 for task in found)
    with pytest.raises(ConfigError, match="data or sets, not both"):
        config({"kind": "instructions", "sets": sets, "data": "a.jsonl"})
    with pytest.raises(ConfigError, match="two tasks are called dolly"):
        config({"kind": "instructions", "sets": sets}, {"kind": "exact_match", "name": "dolly"})


ASKED = {"instruction": "Add <them>.", "input": "1 2"}
ALPACA = Alpaca().prompt(instruction_rows(ASKED, Fields(), "here")[0])


@pytest.mark.parametrize(
    "raw",
    [
        {**ASKED, "output": "3"},
        {"prompt": ALPACA.replace("\n", "<n>"), "output": ["3"]},
        {
            "instruction": "Add <them>.",
            "instances": [{"input": "1 2", "output": "3", "constraints": "None."}],
        },
        {"Definition": ["Add <them>."], "Instances": [{"id": "x", "input": "1 2", "output": ["3"]}]},
    ],
    ids=["dolly", "minillm", "unnatural", "super-natural"],
)
def test_every_published_format_is_the_same_question(raw: dict[str, Any]) -> None:
    (row,) = instruction_rows(raw, Fields(), "here")
    assert Alpaca().prompt(row) == ALPACA
    assert row.references == ("3",)


def test_a_prompt_without_input_is_taken_apart_as_well() -> None:
    prompt = Alpaca().prompt(instruction_rows({"instruction": "Sing."}, Fields(), "here")[0])
    (row,) = instruction_rows({"prompt": prompt, "output": "La"}, Fields(), "here")
    assert (row.instruction, row.input) == ("Sing.", "")


@pytest.mark.needs_shared
@pytest.mark.parametrize(
    ("name", "count", "answerable"),
    [
        ("dolly_eval", None, True),
        ("self_instruct_eval", 252, True),
        ("vicuna80_eval", 80, False),
        ("mt_bench80_eval", 80, False),
        ("e2e_nlg_eval", None, True),
    ],
)
def test_the_sets_at_hand_are_read_whole(name: str, count: int | None, answerable: bool) -> None:
    path = shared() / "data" / "instruct" / f"{name}.jsonl"
    task = REGISTRY.parse(
        {"kind": "instructions", "data": {"kind": "jsonl", "path": str(path)}, "protocol": "minillm"}
    )
    tokenizer = AutoTokenizer.from_pretrained(str(locate("package:stillhouse/demo/teacher")))
    asked = task.load(Encoder(task.template, tokenizer), DataConfig(train=task.data))
    lines = len(path.read_text("utf-8").strip().split("\n"))
    assert len(asked.examples) == (count or lines) == lines
    assert not asked.dropped
    assert max(len(q.prompt.token_ids) for q in asked.examples) <= 256
    assert all(q.prompt.references for q in asked.examples) or not answerable
    assert task.title == name


def test_questions_without_references_are_answered_but_not_scored(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Why?", "input": ""}\n' * 2, "utf-8")
    task = REGISTRY.parse(
        {
            "kind": "instructions",
            "data": {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")},
            "sampling": {"max_tokens": 5},
            "metrics": ["rouge_l", "bleu"],
            "seeds": [1],
        }
    )
    result = task.evaluate(context())
    assert "rouge_l" not in result.metrics
    assert "bleu" not in result.metrics
    assert result.metrics["mean_length"] <= 5
    assert len(result.rows) == 2
    assert "loss" not in result.metrics
    assert "kl_to_teacher_on_own_text" in result.metrics


def test_rows_left_out_are_counted(tmp_path: Path) -> None:
    rows = [{"instruction": "x", "output": words} for words in ("one", "one two three", "one two")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    source = {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")}
    task = REGISTRY.parse({"kind": "instructions", "data": source, "min_reference_words": 2})
    one = context()
    asked = task.load(Encoder(one.data.template, one.tokenizer), one.data)
    assert [q.prompt.references[0] for q in asked.examples] == ["one two three", "one two"]
    assert asked.dropped == {"left out by the task": 1}
