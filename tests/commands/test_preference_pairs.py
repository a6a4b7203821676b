"""Preference pairs from the row to the loss: both responses rendered, cut, shown, trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from stillhouse.files import locate, write_jsonl
from stillhouse.runs.resolve import resolve
from tests.small_runs import TEACHER, rows_of
from tests.workshop import Workshop

PAIRS = [
    {"prompt": "Name a fruit.", "chosen": "Fig", "rejected": "A carrot, or a very long tale", "margin": 2},
    {"prompt": "Name an animal.", "chosen": [{"role": "assistant", "content": "Cow"}], "rejected": "Stone"},
    {"prompt": "Name a <|eos|> tree.", "chosen": "Oak", "rejected": "Oak  "},
    {"prompt": "Name a colour.", "response": "Red"},
]


@pytest.fixture
def pairs(workshop: Workshop) -> Workshop:
    write_jsonl(workshop.folder / "pairs.jsonl", PAIRS)
    config = {
        "student": {"tokenizer": TEACHER, "from_config": {"model_type": "llama"}},
        "objective": {"chosen": {"kind": "cross_entropy"}, "rejected": {"kind": "cross_entropy"}},
        "responses": {"kind": "preference_pairs"},
        "data": {
            "train": "pairs.jsonl",
            "template": "plain",
            "max_response": 6,
            "bad_rows": "drop",
            "no_response": "drop",
        },
    }
    (workshop.folder / "pairs.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return workshop


def shown(pairs: Workshop, *options: str) -> list[dict[str, Any]]:
    said = pairs.stillhouse("show", "rows", "pairs.yaml", "--json", *options)
    assert said.code == 0, said.err
    return [json.loads(line) for line in said.out.splitlines()]


def test_both_responses_are_shown_as_they_are_read_or_why_the_row_is_not(pairs: Workshop) -> None:
    first, second, equal, single = shown(pairs)
    end = AutoTokenizer.from_pretrained(locate(TEACHER)).eos_token_id
    assert len(first["rejected_ids"]) == 6
    assert first["rejected_ids"][-1] != end  # cut
    assert second["rejected_ids"][-1] == second["response_ids"][-1] == end
    assert second["rejected"].startswith("Stone")
    assert second["rejected_trained"] == [1] * len(second["rejected_ids"])
    assert "'chosen' and 'rejected' are the same" in equal["dropped"]
    assert single["dropped"] == "no preference pair"
    said = pairs.stillhouse("show", "rows", "pairs.yaml")
    assert "  chosen    Fig" in said.out
    assert "  rejected  Stone" in said.out


def test_a_row_that_is_no_pair_stops_the_run_unless_it_may_be_dropped(pairs: Workshop) -> None:
    said = pairs.stillhouse("check", "pairs.yaml", "data.no_response=error")
    assert said.code == 2
    assert "pairs.jsonl:4: no response or no rejected one, but data.train needs a preference pair" in said.err
    said = pairs.stillhouse("check", "pairs.yaml", "data.bad_rows=refuse")
    assert "pairs.jsonl:3: 'chosen' and 'rejected' are the same" in said.err


def test_check_says_which_responses_of_pairs_are_used(pairs: Workshop) -> None:
    said = pairs.stillhouse("check", "pairs.yaml")
    assert "2 of 2 rows; used: the chosen and the rejected response" in said.out
    assert "1 x rejected response" in said.out
    said = pairs.stillhouse("check", "pairs.yaml", "responses.kind=fixed", "objective=cross_entropy")
    assert "2 of 3 rows; used: the chosen response only" in said.out
    assert "the rejected one is not used" in said.err


def test_an_objective_for_one_of_the_two_is_refused(pairs: Workshop) -> None:
    said = pairs.stillhouse("check", "pairs.yaml", "objective.rejected=null")
    assert "says nothing about rejected-written responses" in said.err


def test_both_sides_are_trained_on_with_a_weight_for_each(pairs: Workshop) -> None:
    rows = [{"prompt": f"Number {n}", "chosen": f"yes {n}", "rejected": f"no {n} no"} for n in range(8)]
    write_jsonl(pairs.folder / "pairs.jsonl", rows)
    said = pairs.stillhouse(
        *(
            "run",
            "pairs.yaml",
            "name=both",
            "student={path: student, tokenizer: null, from_config: null}",
            "objective.rejected.loss_weight=0.5",
        ),
        *("train={max_steps: 2, batch_size: 4, micro_batch_size: 2, log_every: 1}", "output.report=false"),
    )
    assert said.code == 0, said.err
    row = next(row for row in rows_of(pairs.folder / "runs" / "both") if row["phase"] == "train")
    assert row["responses/chosen"] == row["responses/rejected"] == 0.5
    assert row["loss"] == pytest.approx(row["loss/chosen"] + 0.5 * row["loss/rejected"], rel=1e-3)


def test_pair_files_of_the_package_keep_what_was_cut(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "a b", "rejected": "c d", "margin": 1.5, "rejected_finished": False}
    write_jsonl(tmp_path / "pairs.jsonl", [{"stillhouse": {"stage": "pairs"}}, row])
    config = {"student": {"path": TEACHER}, "data": {"train": str(tmp_path / "pairs.jsonl")}}
    dataset = resolve({"recipe": "sft", **config}, []).config.data
    [read] = dataset.train.rows(dataset.reading())
    assert (read.finished, read.rejected_finished, read.extra) == (True, False, {"margin": 1.5})
