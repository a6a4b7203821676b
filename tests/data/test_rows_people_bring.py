"""Rows as people have them: what each is read as, and what is refused in which words."""

from __future__ import annotations

from typing import Any

import pytest

from stillhouse.data.formats import read_row
from stillhouse.data.rows import Fields, Row
from stillhouse.errors import RowError

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def read(raw: dict[str, Any], ignore: tuple[str, ...] = (), **fields: str) -> Row:
    return read_row(raw, Fields(**fields), "rows.jsonl:3", ignore)


def test_openai_chat_with_parts_tools_calls_and_null_content() -> None:
    row = read(
        {
            "messages": [
                {
                    "role": "developer",
                    "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}],
                },
                {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "c1",
                            "type": "function",
                            "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": {"degrees": 5}},
                {"role": "assistant", "content": "5 degrees."},
            ],
            "tools": [TOOL],
        }
    )
    assert row.messages == (
        turn("system", "Be\nbrief."),
        turn("user", "Weather?"),
        turn("assistant", "", tool_calls=[{"id": "c1", **CALL}]),
        turn("tool", '{"degrees": 5}', tool_call_id="c1", name="weather"),
    )
    assert (row.response, row.completion, row.tools) == ("5 degrees.", (), (TOOL,))


def test_a_response_that_is_a_call_or_has_reasoning_is_a_completion() -> None:
    call = read({"messages": [turn("user", "Weather?"), turn("assistant", "", tool_calls=[CALL])]})
    assert call.has_response
    assert call.response == ""
    assert call.completion == (turn("assistant", "", tool_calls=[CALL]),)
    assert call.references == ('{"name": "weather", "arguments": {"city": "Oslo"}}',)
    for name in ("reasoning_content", "reasoning", "thinking"):
        thought = read({"messages": [turn("user", "2+2?"), turn("assistant", "4", **{name: "two and two"})]})
        assert thought.response == "4"
        assert thought.completion == (turn("assistant", "4", reasoning_content="two and two"),)
        flat = read({"question": "2+2?", name: "two and two", "answer": 4})
        assert (flat.instruction, flat.response, flat.completion) == ("2+2?", "4", thought.completion)
    inline = read({"messages": [turn("user", "2+2?"), turn("assistant", "<think>two</think>4")]})
    assert (inline.response, inline.completion) == ("<think>two</think>4", ())


def test_weights_are_kept_where_a_turn_is_not_trained() -> None:
    turns = [
        turn("user", "a"),
        turn("assistant", "b", weight=0),
        turn("user", "c"),
        turn("assistant", "d", weight=1),
    ]
    row = read({"messages": turns})
    assert row.messages[1]["weight"] == 0
    assert (row.response, row.completion) == ("d", ())
    last = read({"messages": [turn("user", "a"), turn("assistant", "b", weight=0)]})
    assert last.completion == (turn("assistant", "b", weight=0),)
    with pytest.raises(RowError, match=r"weight of turn 2 of 'messages' should be 0 or 1, got 3"):
        read({"messages": [turn("user", "a"), turn("assistant", "b", weight=3)]})


def test_sharegpt_with_calls_and_observations() -> None:
    row = read(
        {
            "conversations": [
                {"from": "human", "value": "Weather?"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
                {"from": "observation", "value": "5 C"},
                {"from": "gpt", "value": "5 degrees."},
            ],
            "system": "Be brief.",
            "tools": '[{"name": "weather", "parameters": {"type": "object"}}]',
        }
    )
    assert row.messages == (
        turn("system", "Be brief."),
        turn("user", "Weather?"),
        turn("assistant", "", tool_calls=[CALL]),
        turn("tool", "5 C"),
    )
    assert (row.response, row.tools) == ("5 degrees.", (TOOL,))
    named = read({"dialog_turns": [{"from": "human", "value": "hi"}]}, messages="dialog_turns")
    assert (named.messages, named.response) == ((turn("user", "hi"),), None)


@pytest.mark.parametrize(
    "text",
    [
        '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]',
        "[{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'hello'}]",
    ],
)
def test_messages_as_text_and_in_columns(text: str) -> None:
    for value in (text, {"role": ["user", "assistant"], "content": ["hi", "hello"]}):
        row = read({"messages": value})
        assert (row.messages, row.response) == ((turn("user", "hi"),), "hello")


def test_system_and_history_make_a_conversation() -> None:
    whole = {"instruction": "And he?", "input": "", "output": "He left.", "system": "Be brief."}
    row = read({**whole, "history": [["Who came?", "She."]]})
    assert row.messages == (
        turn("system", "Be brief."),
        turn("user", "Who came?"),
        turn("assistant", "She."),
        turn("user", "And he?"),
    )
    assert (row.response, row.extra) == ("He left.", {})
    empty = read({**whole, "system": "", "history": []})
    assert (empty.instruction, empty.messages) == ("And he?", ())
    query = read({"query": "hi", "response": "hello", "system": "Be brief.", "history": [["q", "a"]]})
    assert [one["content"] for one in query.messages] == ["Be brief.", "q", "a", "hi"]
    orca = read({"id": "x", "system_prompt": "Be brief.", "question": "q", "response": "a"})
    assert orca.messages == (turn("system", "Be brief."), turn("user", "q"))
    tools = read({"prompt": "Weather?", "tools": [TOOL], "response": "5"})
    assert (tools.messages, tools.tools) == ((turn("user", "Weather?"),), (TOOL,))


def test_dolly_is_asked_with_its_context() -> None:
    raw = {"instruction": "When?", "context": "Built in 1820.", "response": "1820", "category": "closed_qa"}
    row = read(raw)
    assert (row.instruction, row.input, row.response) == ("When?", "Built in 1820.", "1820")
    assert row.extra == {"category": "closed_qa"}
    assert read({**raw, "context": ""}).input == ""


def test_completions_of_several_turns() -> None:
    completion = [
        turn("assistant", "", tool_calls=[CALL]),
        turn("tool", "5 C"),
        turn("assistant", "5 degrees."),
    ]
    row = read({"prompt": [turn("user", "Weather?")], "completion": completion})
    assert (row.messages, row.completion) == ((turn("user", "Weather?"),), tuple(completion))
    assert (row.response, row.references) == ("5 degrees.", ("5 degrees.",))
    plain = read({"prompt": "hi", "completion": [turn("assistant", "hello")]})
    assert (plain.instruction, plain.response, plain.completion) == ("hi", "hello", ())
    with pytest.raises(
        RowError, match="'completion' should end with a turn of the assistant, and ends with tool"
    ):
        read({"prompt": "hi", "completion": completion[:2]})


def test_mathematics_with_solutions_and_numbers() -> None:
    row = read({"problem": "2+2?", "solution": "So \\boxed{4}", "answer": 4})
    assert (row.instruction, row.response, row.extra) == ("2+2?", "So \\boxed{4}", {"answer": 4})
    assert read({"problem": "2+2?", "answer": 4}).response == "4"
    assert read({"question": "2+2?", "answer": 4.5}).response == "4.5"
    assert read({"question": "1e22?", "answer": 1e22}).response == "1" + 22 * "0"
    assert read({"question": "Is it?", "answer": True}).response == "true"
    assert read({"question": "2+2?", "answer": float("nan")}).response is None
    squad = {
        "question": "When?",
        "context": "In 1820.",
        "answers": {"text": ["1820", "1820"], "answer_start": [3, 3]},
    }
    assert (read(squad).input, read(squad).references) == ("In 1820.", ("1820",))


CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello"
)
LLAMA3 = "".join(
    f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"
    for role, content in (("system", "Be brief."), ("user", "hi"), ("assistant", "hello"))
)
TEMPLATED = {
    CHATML + "<|im_end|>\n": True,
    CHATML: False,
    "<|begin_of_text|>" + LLAMA3: True,
    "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nhi [/INST] hello </s>": True,
    "<|system|>\nBe brief.</s>\n<|user|>\nhi</s>\n<|assistant|>\nhello</s>": True,
    "<|system|>\nBe brief.<|end|>\n<|user|>\nhi<|end|>\n<|assistant|>\nhello<|end|>\n<|endoftext|>": True,
    "### System: Be brief.\n### Human: hi\n### Assistant: hello": True,
}


@pytest.mark.parametrize("text", TEMPLATED)
def test_templated_text_is_read_as_its_turns(text: str) -> None:
    row = read({"text": text})
    assert row.messages == (turn("system", "Be brief."), turn("user", "hi"))
    assert (row.response, row.finished, row.text) == ("hello", TEMPLATED[text], text)


def test_templated_text_of_other_shapes() -> None:
    gemma = read({"text": "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"})
    assert (gemma.messages, gemma.response) == ((turn("user", "hi"),), None)
    alpaca = read(
        {
            "text": "Below is an instruction that describes a task, paired with an input. Write.\n\n"
            "### Instruction:\nSum up\n\n### Input:\nText\n\n### Response:\nShort</s>"
        }
    )
    assert (alpaca.instruction, alpaca.input, alpaca.response) == ("Sum up", "Text", "Short")
    mistral = read({"text": "<s>[INST] hi [/INST] hello</s>[INST] and? [/INST] more</s>"})
    assert [one["content"] for one in mistral.messages] == ["hi", "hello", "and?"]
    for text in ("About <|im_start|> and other marks.", "<|im_start|>user\nhi<|im_end|> stray <|im_start|>"):
        row = read({"text": text})
        assert (row.text, row.messages) == (text, ())


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"prompt": None, "response": "x"}, "field 'prompt' is null"),
        ({"prompt": ["a"]}, "turn 1 of 'prompt' should be an object with role and content"),
        ({"prompt": {"a": 1}}, "field 'prompt' should be text, got dict"),
        (
            {"messages": [turn("user", "a"), {"role": "user", "content": None}]},
            "content of turn 2 of 'messages' is null",
        ),
        (
            {"messages": [turn("asistant", "a")]},
            "turn 1 of 'messages' has the role 'asistant' (did you mean 'assistant'?)",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "video_url"}]}
                ]
            },
            "part 2 of content of turn 1 of 'messages' is video_url, and text and images are read",
        ),
        (
            {"messages": [turn("user", "a", audio=["x.wav"])]},
            "turn 1 of 'messages' has audio, and text and images are read",
        ),
        ({"messages": [turn("assistant", "a")]}, "the conversation has no turn before the response"),
        ({"messages": [turn("user", "a")], "tools": "none"}, "field 'tools' should be a list of tools"),
        (
            {
                "messages": [
                    turn("user", "a"),
                    turn("assistant", "", function_call={"name": "f", "arguments": "{"}),
                ]
            },
            "the arguments of function_call of turn 2 of 'messages' (f) are not JSON",
        ),
        ({"messages": [turn("user", "a")], "context": "b"}, "field 'context' would change the prompt"),
        (
            {"messages": [turn("system", "a"), turn("user", "b")], "system": "c"},
            "has a system message in field 'system'",
        ),
        (
            {"instruction": "a", "input": "b", "context": "c"},
            "fields 'input' and 'context' both hold the input",
        ),
        ({"query": "a", "history": [["b"]]}, "item 1 of 'history' should be [question, answer], got ['b']"),
        ({"foo": "a"}, "no prompt found in the fields foo"),
    ],
)
def test_what_is_refused(raw: dict[str, Any], words: str) -> None:
    with pytest.raises(RowError) as caught:
        read(raw)
    assert str(caught.value).startswith("rows.jsonl:3: ")
    assert words in str(caught.value)
    assert caught.value.reason


def test_ignored_fields_are_not_read_and_stay_facts() -> None:
    raw = {"messages": [turn("user", "a"), turn("assistant", "b")], "context": "c"}
    assert read(raw, ignore=("context",)).extra == {"context": "c"}
    assert read({"instruction": "a", "input": "b", "output": "c"}, ignore=("input",)).input == ""


def test_columns_are_renamed_for_every_part() -> None:
    raw = {
        "q": "hi",
        "passage": "text",
        "sys": "Be brief.",
        "past": [["a", "b"]],
        "fns": [TOOL],
        "why": "so",
        "a": "x",
    }
    names = {"prompt": "q", "input": "passage", "system": "sys", "history": "past", "tools": "fns"}
    row = read(raw, **names, reasoning="why", response="a")
    assert [one["content"] for one in row.messages] == ["Be brief.", "a", "b", "hi\n\ntext"]
    assert row.tools == (TOOL,)
    assert row.completion == (turn("assistant", "x", reasoning_content="so"),)
    assert row.extra == {}
    swapped = read({"input": "hi", "output": "x", "context": "c"}, prompt="input", response="output")
    assert (swapped.instruction, swapped.input) == ("hi", "c")
    with pytest.raises(RowError, match=r"has no field 'qq' \(fields.prompt\) \(did you mean"):
        read({"q": "hi", "qa": ""}, prompt="qq")
