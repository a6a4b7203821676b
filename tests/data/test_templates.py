"""Rows become exactly the text and the tokens that they should."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError
from toy_tokenizers import FORGETFUL, REFUSING, TURNS, byte_tokenizer

from stillhouse.data.formats import read_row
from stillhouse.data.rows import Fields, Row
from stillhouse.data.templates import Alpaca, Auto, Chat, Custom, Plain
from stillhouse.data.tokenise import EncodedRow, Encoder
from stillhouse.errors import DataError, ModelError


def row(**values: Any) -> Row:
    return Row("rows.jsonl:1", **values)


USER = {"role": "user", "content": "I"}
ASSISTANT = {"role": "assistant", "content": "O"}
ANSWERED = row(instruction="I", response="O", references=("O",))
TALKED = row(messages=(USER,), response="O", references=("O",))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"instruction": "I", "input": "X", "output": "O"}, replace(ANSWERED, input="X")),
        ({"instruction": "I", "input": "", "outputs": ["O", "P"]}, replace(ANSWERED, references=("O", "P"))),
        ({"instruction": "I", "output": None}, row(instruction="I")),
        ({"instruction": "I", "output": "  "}, row(instruction="I")),
        ({"prompt": "I", "response": "O"}, ANSWERED),
        ({"prompt": "I", "completion": "O"}, ANSWERED),
        ({"question": "I", "answer": "O", "id": 3}, ANSWERED),
        ({"text": "T"}, row(text="T")),
        ({"prompt": "ignored", "messages": [USER, ASSISTANT]}, TALKED),
        ({"prompt": [USER], "completion": [ASSISTANT]}, TALKED),
        ({"messages": [USER]}, row(messages=(USER,))),
    ],
)
def test_shapes_are_understood(raw: dict[str, Any], expected: Row) -> None:
    assert read_row(raw, Fields(), "rows.jsonl:1") == expected


@pytest.mark.parametrize(
    ("raw", "fields", "words"),
    [
        ({"foo": "x"}, {}, "rows.jsonl:1: no prompt found in the fields foo"),
        ({}, {}, "no prompt found in the fields (none)"),
        (
            {"quest": "x"},
            {"prompt": "quesst"},
            "has no field 'quesst' (fields.prompt) (did you mean 'quest'?)",
        ),
        ({"prompt": [3]}, {}, "turn 1 of 'prompt' should be an object with role and content"),
        ({"prompt": "x", "response": ["a", []]}, {}, "field 'response' should be text, got list []"),
        ({"messages": [{"role": "user"}]}, {}, "content of turn 1 of 'messages' is null, and should be text"),
        ({"messages": ["hello"]}, {}, "turn 1 of 'messages' should be an object with role and content"),
        ({"messages": [{"role": "assistant", "content": "O"}]}, {}, "no turn before the response"),
    ],
)
def test_rows_that_are_not_understood_are_named(raw: Any, fields: dict[str, str], words: str) -> None:
    with pytest.raises(DataError) as caught:
        read_row(raw, Fields(**fields), "rows.jsonl:1")
    assert words in str(caught.value)


def test_fields_may_be_named() -> None:
    raw = {"q": "I", "ctx": "X", "a": "O", "instruction": "no"}
    named = read_row(raw, Fields(prompt="q", input="ctx", response="a"), "rows.jsonl:1")
    assert named == row(instruction="I", input="X", response="O", references=("O",))
    assert read_row({"body": "T", "prompt": "no"}, Fields(text="body"), "x").text == "T"


def test_alpaca_is_the_published_format() -> None:
    without = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nI\n\n### Response:\n"
    )
    with_input = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nI\n\n### Input:\nX\n\n### Response:\n"
    )
    assert Alpaca().prompt(row(instruction="I")) == without
    assert Alpaca().prompt(row(instruction="I", input="X")) == with_input
    asked = ({"role": "system", "content": ""}, {"role": "user", "content": "I"})
    assert Alpaca().prompt(row(messages=asked)) == without
    with pytest.raises(DataError, match="takes one question, got the turns system, user; use template: chat"):
        Alpaca().prompt(row(messages=({"role": "system", "content": "Be brief."}, asked[1])))


def test_plain_and_custom() -> None:
    assert Plain().prompt(row(instruction="I", input="X")) == "I\nX\n"
    custom = Custom(without_input="{{Q}} {instruction}\n", with_input="{input}|{instruction}:")
    assert custom.prompt(row(instruction="{I}")) == "{Q} {I}\n"
    assert custom.prompt(row(instruction="I", input="X")) == "X|I:"
    with pytest.raises(DataError, match="with_input is not set"):
        Custom(without_input="{instruction}").prompt(row(instruction="I", input="X"))


@pytest.mark.parametrize(
    "bad",
    [
        "no field",
        "{instruction} {other}",
        "{instruction!r}",
        "{instruction",
        "{instruction:>9}",
        "{}",
        "{input}",
    ],
)
def test_a_custom_template_is_checked(bad: str) -> None:
    with pytest.raises(ValidationError):
        Custom(without_input=bad)


def encoded(encoder: Encoder, *rows: Row) -> list[EncodedRow]:
    """The rows' ids; none of them may be refused."""
    found = encoder.encode(rows)
    assert all(isinstance(one, EncodedRow) for one in found), found
    return [one for one in found if isinstance(one, EncodedRow)]


def test_a_prompt_has_the_beginning_and_a_response_the_end() -> None:
    tokenizer = byte_tokenizer(bos=True)
    encoder = Encoder(Plain(), tokenizer)
    one, other = encoded(encoder, row(instruction="ab", response="cd"), row(instruction="ab"))
    assert one.text == "ab\n"
    ids = tuple(tokenizer("ab\n", add_special_tokens=False)["input_ids"])
    assert one.prompt_ids == other.prompt_ids == (tokenizer.bos_token_id, *ids)
    end = tokenizer.eos_token_id
    assert one.response_ids == (*tokenizer("cd", add_special_tokens=False)["input_ids"], end)
    assert one.trained is None
    assert other.response_ids is None
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        Encoder(Plain(), byte_tokenizer(eos=None))


def test_chat_ids_are_those_of_the_rendered_conversation() -> None:
    tokenizer = byte_tokenizer(TURNS)
    encoder = Encoder(Auto(), tokenizer)
    assert encoder.template == Chat()
    assert encoder.end_id == tokenizer.convert_tokens_to_ids("<|turn|>")
    turns = (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "?"},
    )
    for answer in ("fine", "  fine \n"):
        [found] = encoded(encoder, row(messages=turns, response=answer))
        full = tokenizer.apply_chat_template(
            [*turns, {"role": "assistant", "content": answer}], tokenize=False
        )
        ids = tuple(tokenizer(full, add_special_tokens=False)["input_ids"])
        assert full.startswith(found.text)
        assert found.response_ids is not None
        sequence = found.prompt_ids + found.response_ids
        assert ids[: len(sequence)] == sequence
        assert tokenizer.decode(ids[len(sequence) :]) == "\n"


def test_chat_takes_instructions_too_and_a_system_message() -> None:
    tokenizer = byte_tokenizer(TURNS)
    chat = Chat(system="Be brief.")
    text = chat.renderer(tokenizer).render(row(instruction="I", input="X")).prompt
    assert text == "<|start|>system\nBe brief.<|turn|>\n<|start|>user\nI\n\nX<|turn|>\n<|start|>assistant\n"
    own = ({"role": "system", "content": "Mine."}, {"role": "user", "content": "I"})
    assert "Be brief." not in chat.renderer(tokenizer).render(row(messages=own)).prompt


def test_a_chat_template_that_rewrites_the_prompt_leaves_the_response_as_it_is() -> None:
    tokenizer = byte_tokenizer(FORGETFUL)
    encoder = Encoder(Chat(), tokenizer)
    [found] = encoded(encoder, row(instruction="I", response="O"))
    assert found.text == "Q: I\nA:"
    assert found.response_ids == (*tokenizer("O")["input_ids"], tokenizer.eos_token_id)


def test_chat_templates_that_are_missing_or_refuse() -> None:
    with pytest.raises(DataError, match="has no chat template; use template: alpaca"):
        Encoder(Chat(), byte_tokenizer())
    with pytest.raises(DataError, match="refuses the conversation: only one system message"):
        Encoder(Chat(), byte_tokenizer(REFUSING))
    assert Encoder(Auto(), byte_tokenizer()).template == Alpaca()
