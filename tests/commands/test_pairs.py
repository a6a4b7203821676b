"""`stillhouse pairs`: several responses to a prompt, ranked, to the best and the worst."""

from __future__ import annotations

import json
from typing import Any

import pytest

from stillhouse.data.datasets import dataset_at
from stillhouse.data.reading import Reading
from stillhouse.files import read_jsonl, write_jsonl
from tests.servers import Answer, serving
from tests.workshop import Workshop

RESPONSES = [
    {"question": "2+2?", "answer": "4", "response": "So it is 4", "number": 1},
    {"question": "2+2?", "answer": "4", "response": "Perhaps 5", "number": 2},
    {"question": "2+2?", "answer": "4", "response": "The answer is 4.0", "number": 3},
    {"question": "3+3?", "answer": "6", "response": "6", "number": 4},
    {"question": "3+3?", "answer": "6", "response": "It is 6", "number": 5},
    {"question": "Why?", "response": "Because", "number": 6},
    {"question": "Why?", "response": "No idea", "number": 7},
    {"question": "Alone?", "response": "Yes", "number": 8},
]


@pytest.fixture
def answers(workshop: Workshop) -> Workshop:
    rows = [{"prompt": one.pop("question"), **one} for one in map(dict, RESPONSES)]
    write_jsonl(workshop.folder / "answers.jsonl", rows)
    return workshop


def made(workshop: Workshop, *options: str) -> list[dict[str, Any]]:
    said = workshop.stillhouse("pairs", *options, "-o", "ranked.jsonl")
    assert said.code == 0, said.err
    return read_jsonl(workshop.folder / "ranked.jsonl")[1:]


def test_the_verifier_makes_pairs_and_counts_ties_and_what_it_cannot_answer(answers: Workshop) -> None:
    said = answers.stillhouse("pairs", "answers.jsonl", "--rank", "verifier", "-o", "ranked.jsonl")
    assert said.code == 0, said.err
    assert "1 pairs, mean margin 1 by verifier" in said.out
    for reason in ("tie", "unanswerable", "fewer than two different responses"):
        assert reason in said.out
    [row] = read_jsonl(answers.folder / "ranked.jsonl")[1:]
    assert (row["chosen"], row["rejected"], row["margin"]) == ("So it is 4", "Perhaps 5", 1.0)
    assert row["scores"] == [1.0, 0.0, 1.0]
    [read] = dataset_at(answers.folder / "ranked.jsonl").rows(Reading())
    assert (read.response, read.rejected, read.extra["margin"]) == ("So it is 4", "Perhaps 5", 1.0)
    again = answers.stillhouse("pairs", "answers.jsonl", "--rank", "verifier", "-o", "ranked.jsonl")
    assert "they were there already" in again.out
    other = answers.stillhouse("pairs", "answers.jsonl", "--rank", "rouge_l", "-o", "ranked.jsonl")
    assert other.code == 2


def test_what_a_model_wrote_is_ranked_by_references_and_by_likelihood(workshop: Workshop) -> None:
    command = ("generate", "--model", "student", "--data", "train.jsonl", "--limit", "3", "-n", "3")
    said = workshop.stillhouse(*command, "--max-tokens", "6", "--template", "plain", "-o", "written.jsonl")
    assert said.code == 0, said.err
    rows = made(workshop, "written.jsonl", "--rank", "{kind: likelihood, teacher: teacher}")
    assert len(rows) == 3
    assert all(row["margin"] > 0 and len(row["scores"]) == 3 for row in rows)
    assert all(row["finished"] is False or row["rejected_finished"] is False for row in rows)
    texts = {row["response"] for row in read_jsonl(workshop.folder / "written.jsonl")[1:]}
    assert all({row["chosen"], row["rejected"]} <= texts for row in rows)
    [first, *_] = dataset_at(workshop.folder / "ranked.jsonl").rows(Reading())
    assert not (first.finished and first.rejected_finished)


def test_a_judge_ranks_every_two_in_both_orders(answers: Workshop) -> None:
    def reply(path: str, body: Any) -> Answer:
        if path.endswith("/models"):
            return 200, {"data": [{"id": "judge"}]}
        text = body["messages"][0]["content"]
        first = text.index("<answer_a>")
        better = "A" if "Because" in text[first : text.index("<answer_b>")] else "B"
        verdict = f"[[{better}]]" if "Because" in text else "none"
        return 200, {"choices": [{"message": {"content": verdict}, "finish_reason": "stop"}]}

    with serving(reply) as service:
        rank = json.dumps({"kind": "judge", "url": service.url})
        [row] = made(answers, "answers.jsonl", "--rank", rank)
    assert (row["chosen"], row["rejected"], row["margin"]) == ("Because", "No idea", 1.0)


def test_a_wrong_ranker_is_named(answers: Workshop) -> None:
    said = answers.stillhouse("pairs", "answers.jsonl", "--rank", "rouge", "-o", "ranked.jsonl")
    assert said.code == 2
    assert "--rank" in said.err
    assert "rouge_l" in said.err
    said = answers.stillhouse(
        "pairs", "answers.jsonl", "--rank", "verifier", "-o", "ranked.jsonl", "--min-margin", "2"
    )
    assert "no prompt gives a pair" in said.err
    assert "1 x margin too small" in said.err
