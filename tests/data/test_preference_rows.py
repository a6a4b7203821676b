"""Preference pairs as people bring them: both responses read alike, checked, scored."""

from __future__ import annotations

from typing import Any

import pytest

from stillhouse.data.formats import read_row
from stillhouse.data.rows import Fields, Row
from stillhouse.errors import RowError


def read(raw: dict[str, Any], **fields: str) -> Row:
    return read_row(raw, Fields(**fields), "f.jsonl:1")


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


PAIR = {
    "prompt": "q",
    "chosen": [turn("user", "q"), turn("assistant", "good")],
    "rejected": [turn("user", "q"), turn("assistant", "bad")],
}
HH = "\n\nHuman: q\n\nAssistant: a\n\nHuman: and?\n\nAssistant: "


@pytest.mark.parametrize(
    ("raw", "context"),
    [
        (PAIR, (turn("user", "q"),)),
        ({name: PAIR[name] for name in ("chosen", "rejected")}, (turn("user", "q"),)),
        ({**PAIR, "messages": PAIR["chosen"]}, (turn("user", "q"),)),
        ({**PAIR, "prompt": "", "messages": PAIR["chosen"]}, (turn("user", "q"),)),
        ({**PAIR, "rejected": "bad"}, (turn("user", "q"),)),
        ({**PAIR, "chosen": "good"}, (turn("user", "q"),)),
        (
            {"prompt": [turn("user", "q")], "chosen": turn("assistant", "good"), "rejected": "bad"},
            (turn("user", "q"),),
        ),
        ({"messages": [turn("user", "q")], "chosen": "good", "rejected": "bad"}, (turn("user", "q"),)),
        (
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
            },
            (turn("user", "q"),),
        ),
        (
            {"system": "Be brief.", "question": "q", "chosen": "good", "rejected": "bad"},
            (turn("system", "Be brief."), turn("user", "q")),
        ),
        (
            {"chosen": HH + "good", "rejected": HH + "bad"},
            (turn("user", "q"), turn("assistant", "a"), turn("user", "and?")),
        ),
    ],
)
def test_both_responses_of_a_pair_follow_one_prompt(raw: dict[str, Any], context: tuple[Any, ...]) -> None:
    row = read(raw)
    assert (row.messages, row.response, row.rejected) == (context, "good", "bad")
    assert "rejected" not in row.extra


def test_two_conversations_that_part_early_have_their_common_beginning_as_the_prompt() -> None:
    more = [turn("user", "and?"), turn("assistant", "worse")]
    row = read({"chosen": PAIR["chosen"], "rejected": [*PAIR["rejected"], *more]})
    assert row.messages == (turn("user", "q"),)
    assert (row.response, row.completion) == ("good", ())
    assert (row.rejected, row.rejected_completion) == ("worse", (turn("assistant", "bad"), *more))
    whole = read({"chosen": PAIR["chosen"], "rejected": [*PAIR["chosen"], *more]})
    assert (whole.response, whole.rejected) == ("good", "worse")
    assert whole.rejected_row().completion == (turn("assistant", "good"), *more)


def test_fields_can_be_named() -> None:
    raw = {"ask": "q", "win": "good", "lose": "bad"}
    row = read(raw, prompt="ask", response="win", rejected="lose")
    assert (row.instruction, row.response, row.rejected, row.extra) == ("q", "good", "bad", {})
    with pytest.raises(RowError, match=r"has no field 'loss' \(fields.rejected\)"):
        read(raw, prompt="ask", response="win", rejected="loss")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rejected": "good"}, "'chosen' and 'rejected' are the same"),
        ({"rejected": [turn("user", "q"), turn("assistant", " good\n")]}, "are the same"),
        ({"rejected": " "}, "'rejected' is missing or blank"),
        ({"chosen": None}, "'chosen' is missing or blank"),
        ({"rejected": [turn("user", "q"), turn("assistant", "")]}, "'rejected' is blank"),
        ({"rejected": [turn("user", "other"), turn("assistant", "bad")]}, "answer different prompts"),
        ({"rejected": [turn("user", "q")]}, "'rejected' should end with a turn of the assistant"),
        ({"prompt": "something else"}, "the prompt is not among the turns of 'chosen'"),
        ({"score_chosen": 2, "score_rejected": 5.5}, "scored higher than the chosen one, by 3.5"),
        ({"margin": "large"}, "'margin' should be a number"),
    ],
)
def test_broken_pairs_are_refused_with_their_place(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(RowError, match=f"^f.jsonl:1: .*{problem}"):
        read({**PAIR, **change})


def test_half_a_pair_is_refused() -> None:
    with pytest.raises(RowError, match="'rejected' is missing or blank"):
        read({"prompt": "q", "chosen": "good"})
    with pytest.raises(RowError, match="'chosen' is missing or blank"):
        read({"prompt": "q", "rejected": "bad"})
    with pytest.raises(RowError, match="has no prompt, and 'chosen' is no dialogue"):
        read({"chosen": "good", "rejected": "bad"})
    assert read({"prompt": "q", "response": "r", "chosen": "one of two"}).response == "r"


@pytest.mark.parametrize(
    "scores",
    [
        {"margin": 3},
        {"score_chosen": 8.0, "score_rejected": 5.0},
        {"chosen_rating": "4.5", "rejected_rating": "1.5"},
    ],
)
def test_the_margin_is_a_fact(scores: dict[str, Any]) -> None:
    assert read({**PAIR, **scores}).extra["margin"] == 3.0


def test_scored_lists_give_the_best_and_the_worst() -> None:
    beside = read({"prompt": "q", "responses": ["b", "a", "c"], "scores": [2, 3.5, 1], "system": "s"})
    assert (beside.response, beside.rejected, beside.extra) == ("a", "c", {"margin": 2.5})
    assert beside.messages == (turn("system", "s"), turn("user", "q"))
    feedback = {
        "instruction": "q",
        "models": ["x", "y"],
        "completions": [
            {"model": "x", "response": "bad", "overall_score": 4.0},
            {"model": "y", "response": "good", "overall_score": 7.5},
        ],
    }
    row = read(feedback)
    assert (row.instruction, row.response, row.rejected) == ("q", "good", "bad")
    assert row.extra == {"models": ["x", "y"], "margin": 3.5}
    tie = read({"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]})
    assert (tie.response, tie.is_pair) == ("a", False)
    with pytest.raises(RowError, match="'scores' has 1 scores for the 2 entries of 'responses'"):
        read({"prompt": "q", "responses": ["a", "b"], "scores": [1]})
    with pytest.raises(RowError, match="'responses\\[1\\]' is blank"):
        read({"prompt": "q", "responses": ["a", ""], "scores": [1, 2]})
    with pytest.raises(RowError, match="score of responses\\[1\\]' should be a number"):
        read({"prompt": "q", "responses": ["a", "b"], "scores": [1, "high"]})
