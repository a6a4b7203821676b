"""Conversations are rendered as the makers of a chat template meant it, in prompt and response."""

from __future__ import annotations

from typing import Any

import pytest
from tests.data.toy_tokenizers import byte_tokenizer

from stillhouse.data.rows import Message, Row
from stillhouse.data.templates import Chat, Plain
from stillhouse.data.tokenise import EncodedRow, Encoder
from stillhouse.errors import DataError

OPEN, END = "<|start|>", "<|turn|>"
HEADER = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
CALLS = (
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}"
    "</tool_call>{% endfor %}"
)
BODY = (
    "<|start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
)
TURNS = f"{{% for m in messages %}}{BODY}{{{{ m.content }}}}{CALLS}<|turn|>\n{{% endfor %}}"
TOOLS = "{% for t in tools or [] %}[{{ t | tojson }}]\n{% endfor %}"
FULL = TOOLS + TURNS + HEADER
PLAINEST = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|turn|>\n{% endfor %}"
EMPTY_BLOCK = (
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|turn|>\n{% endfor %}" + HEADER
)
OPENED = (  # as DeepSeek's: earlier reasoning is taken out of the text, and the prompt opens the next
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n<think>\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<|start|>{{ m.role }}\n{{ m.content }}<|turn|>\n{% endfor %}" + HEADER
)
USER: Message = {"role": "user", "content": "Weather?"}
FUNCTION = {"name": "weather", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}],
}
RESULT: Message = {"role": "tool", "content": "5 C"}


def says(text: str) -> Message:
    return {"role": "assistant", "content": text}


def encoder(template: str, train_on: Any = "last", **options: Any) -> Encoder:
    tokenizer = byte_tokenizer(template)
    tokenizer.add_tokens(["<think>", "</think>"])
    return Encoder(Chat(**options), tokenizer, train_on=train_on)


def texts(one: Encoder, row: Row) -> tuple[str, str, str]:
    """The prompt, the response, and of the response what is trained on."""
    [found] = one.encode([row])
    if isinstance(found, DataError):
        raise found
    assert isinstance(found, EncodedRow)
    response = found.response_ids or ()
    trained = found.trained or (1,) * len(response)
    assert len(trained) == len(response)
    kept = [token for token, mark in zip(response, trained, strict=True) if mark]
    decode = one.tokenizer.decode
    assert decode(found.prompt_ids) == found.text
    return found.text, decode(response), decode(kept)


def row(*messages: Message, **more: Any) -> Row:
    return Row("rows.jsonl:1", messages=messages, **more)


def test_tools_and_calls_are_in_the_prompt() -> None:
    prompt, response, _ = texts(encoder(FULL), row(USER, CALL, RESULT, response="Cold.", tools=(TOOL,)))
    assert prompt == (
        '[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]\n'
        '<|start|>user\nWeather?<|turn|>\n<|start|>assistant\n<tool_call>weather {"city": "Oslo"}</tool_call>'
        "<|turn|>\n<|start|>tool\n5 C<|turn|>\n<|start|>assistant\n"
    )
    assert response == "Cold.<|turn|>"


def test_an_answer_that_is_a_call_is_the_rendered_call() -> None:
    _, response, _ = texts(encoder(FULL), row(USER, completion=(CALL,), tools=(TOOL,)))
    assert response == '<tool_call>weather {"city": "Oslo"}</tool_call><|turn|>'


def test_templates_that_take_arguments_as_json_text_get_them_so() -> None:
    for written in ("c.function.arguments", "'' + c.function.arguments"):
        template = FULL.replace("c.function.arguments | tojson", written)
        assert '{"city": "Oslo"}' in texts(encoder(template), row(USER, CALL, RESULT, response="Cold."))[0]


@pytest.mark.parametrize(
    ("template", "messages", "more", "words"),
    [
        (PLAINEST + HEADER, (USER, CALL, RESULT), {}, "leaves out tool_calls, such as weather"),
        (PLAINEST + HEADER, (USER,), {"tools": (TOOL,)}, "leaves out tools, such as weather"),
        (
            NO_SYSTEM,
            ({"role": "system", "content": "Be brief."}, USER),
            {},
            "rows.jsonl:1: the chat template refuses the conversation: System role not supported (roles: "
            "system, user). Set data.template: {kind: chat, system_turns: merge} or data.bad_rows: drop",
        ),
        (
            NO_SYSTEM,
            (USER, USER),
            {},
            "(roles: user, user). Set data.template: {kind: chat, equal_roles: merge",
        ),
        (
            FULL.replace("{% for m in messages %}", "{% for m in messages if m.role != 'critic' %}"),
            ({"role": "critic", "content": "Bad."}, USER),
            {},
            "leaves out turn 1, of role critic",
        ),
    ],
)
def test_what_a_template_refuses_or_leaves_out_is_said(
    template: str, messages: Any, more: Any, words: str
) -> None:
    with pytest.raises(DataError) as caught:
        texts(encoder(template), row(*messages, response="Cold.", **more))
    assert words in str(caught.value)


def test_system_turns_and_equal_roles_can_be_merged() -> None:
    one = encoder(NO_SYSTEM, system_turns="merge", equal_roles="merge")
    prompt, _, _ = texts(one, row({"role": "system", "content": "Be brief."}, USER, USER, response="Cold."))
    assert prompt == "<|start|>user\nBe brief.\n\nWeather?\n\nWeather?<|turn|>\n<|start|>assistant\n"
    merged = Plain(system_turns="merge")
    assert merged.prompt(row({"role": "system", "content": "Be brief."}, USER)) == "Be brief.\n\nWeather?\n"


def test_a_developer_is_the_system_where_the_template_has_none() -> None:
    known = FULL.replace("{% for m in messages %}", "{% for m in messages if m.role != 'developer' %}")
    asked = row({"role": "developer", "content": "Be brief."}, USER, response="Cold.")
    one = encoder(known)
    assert texts(one, asked)[0].startswith("<|start|>system\nBe brief.<|turn|>")
    assert any("developer" in note for note in one.renderer.notes)
    assert texts(encoder(FULL), asked)[0].startswith("<|start|>developer\nBe brief.<|turn|>")


def test_a_template_without_a_generation_prompt_opens_the_answer_in_the_prompt() -> None:
    one = encoder(PLAINEST)
    found = texts(one, row(USER, response="Cold."))
    assert found[:2] == ("<|start|>user\nWeather?<|turn|>\n<|start|>assistant\n", "Cold.<|turn|>")
    assert texts(one, row(USER))[0] == found[0], "as at generation"
    assert any("generation prompt" in note for note in one.renderer.notes)


def test_a_last_turn_of_the_assistant_is_continued() -> None:
    prompt, response, _ = texts(encoder(FULL), row(USER, says("It is"), response=" cold."))
    assert prompt == "<|start|>user\nWeather?<|turn|>\n<|start|>assistant\nIt is"
    assert response == " cold.<|turn|>"
    assert texts(encoder(FULL), row(USER, says("It is")))[0] == prompt


REASONED: Message = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}
THOUGHT = "<think>\n2 and 2\n</think>\n\n4"


@pytest.mark.parametrize("answer", [{"completion": (REASONED,)}, {"response": THOUGHT}], ids=["by", "in"])
@pytest.mark.parametrize("template", [FULL, PLAINEST + HEADER, OPENED], ids=["full", "plainest", "opened"])
def test_reasoning_is_trained_on_whatever_the_template_does_with_it(template: str, answer: Any) -> None:
    prompt, response, trained = texts(encoder(template), row(USER, **answer))
    assert (prompt + response).endswith(f"<|start|>assistant\n{THOUGHT}<|turn|>")
    assert trained == response
    assert prompt == texts(encoder(template), row(USER))[0], "as at generation"


def test_reasoning_that_cannot_be_rendered_is_refused_or_left_out_by_name() -> None:
    tokenizer = byte_tokenizer(PLAINEST + HEADER)
    with pytest.raises(DataError, match=r"reasoning: inline.*or reasoning: drop"):
        texts(Encoder(Chat(), tokenizer), row(USER, completion=(REASONED,)))
    inline = Encoder(Chat(reasoning="inline"), tokenizer)
    assert texts(inline, row(USER, completion=(REASONED,)))[1] == THOUGHT + END
    for answer in ({"completion": (REASONED,)}, {"response": THOUGHT}):
        assert texts(encoder(FULL, reasoning="drop"), row(USER, **answer))[1] == "4<|turn|>"


@pytest.mark.parametrize("template", [EMPTY_BLOCK, OPENED], ids=["block", "opened"])
def test_an_empty_reasoning_block_is_never_trained_on(template: str) -> None:
    asked = "<|start|>user\nWeather?<|turn|>\n<|start|>assistant\n"
    block = "<think>\n\n</think>\n\n"
    one = encoder(template, empty_reasoning="prompt")
    assert texts(one, row(USER, response="Cold.")) == (asked + block, "Cold.<|turn|>", "Cold.<|turn|>")
    assert texts(one, row(USER))[0] == asked + block, "thinking is off at generation too"
    omitted = encoder(template, empty_reasoning="omit")
    prompt, _, trained = texts(omitted, row(USER, response="Cold."))
    assert (prompt, trained) == (texts(omitted, row(USER))[0], "Cold.<|turn|>")
    assert block not in prompt
    assert texts(one, row(USER, completion=(REASONED,)))[1].endswith("2 and 2\n</think>\n\n4<|turn|>")


LONG = (USER, CALL, RESULT, says("Cold."), {"role": "user", "content": "And Rome?"})


def test_all_answers_of_a_conversation_are_trained_on_and_nothing_else() -> None:
    one = encoder(FULL, train_on="all")
    prompt, response, trained = texts(one, row(*LONG, response="Warm.", tools=(TOOL,)))
    call = '<tool_call>weather {"city": "Oslo"}</tool_call>'
    assert prompt.endswith("<|start|>user\nWeather?<|turn|>\n<|start|>assistant\n")
    assert trained == f"{call}{END}Cold.{END}Warm.{END}"
    whole = one.tokenizer.apply_chat_template([*_parsed(LONG), says("Warm.")], tools=[TOOL], tokenize=False)
    assert prompt + response + "\n" == whole
    [found] = one.encode([row(*LONG, response="Warm.", tools=(TOOL,))])
    assert isinstance(found, EncodedRow)
    assert (found.trained_turns, found.context_turns) == (3, 0)
    [last] = encoder(FULL).encode([row(*LONG, response="Warm.", tools=(TOOL,))])
    assert isinstance(last, EncodedRow)
    assert (last.trained_turns, last.context_turns, last.trained) == (1, 2, None)


REWRITTEN = (  # the headers of earlier answers change with what follows
    "{% for m in messages %}<|start|>{{ m.role }} {{ loop.length if m.role == 'assistant' }}\n"
    "{{ m.content }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant {{ messages|length + 1 }}\n{% endif %}"
)
NO_TURN_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize("template", [REWRITTEN, NO_TURN_END])
def test_answers_that_cannot_be_told_apart_are_refused_together_and_trained_on_alone(template: str) -> None:
    conversation = row(USER, says("Cold."), USER, response="Warm.")
    with pytest.raises(DataError, match=r"writes turn 2 in another way .* data\.train_on: last"):
        texts(encoder(template, train_on="all"), conversation)
    assert texts(encoder(template), conversation)[1].startswith("Warm.")


def _parsed(turns: Any) -> list[Message]:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    return [{**turn, "tool_calls": [call]} if "tool_calls" in turn else turn for turn in turns]


def test_weights_of_turns_are_kept() -> None:
    turns = (USER, {**says("Cold."), "weight": 0}, USER, {**says("Mild."), "weight": 1}, USER)
    one = encoder(FULL, train_on="all")
    prompt, _, trained = texts(one, row(*turns, response="Warm."))
    assert "Cold." in prompt
    assert trained == f"Mild.{END}Warm.{END}"
    ends_in_context = row(*turns, completion=({**says("Warm."), "weight": 0},))
    assert texts(one, ends_in_context)[1:] == (f"Mild.{END}", f"Mild.{END}")
    with pytest.raises(DataError, match="each has weight 0"):
        texts(encoder(FULL), ends_in_context)


def test_a_completion_of_several_turns_is_trained_on_but_for_what_the_tools_said() -> None:
    found = texts(encoder(FULL), row(USER, completion=(CALL, RESULT, says("Cold."))))
    assert found[0].endswith("<|start|>user\nWeather?<|turn|>\n<|start|>assistant\n")
    assert found[2] == '<tool_call>weather {"city": "Oslo"}</tool_call><|turn|>Cold.<|turn|>'
    assert "5 C" in found[1]


def test_a_template_without_roles_says_what_it_cannot_render() -> None:
    plain = Encoder(Plain(), byte_tokenizer())
    for messages, more, words in (
        ((USER,), {"completion": (CALL,)}, "the template plain cannot render tool calls; use template: chat"),
        ((USER,), {"completion": (CALL, RESULT, says("x"))}, "cannot render a response of several turns"),
        ((USER,), {"tools": (TOOL,), "response": "x"}, "the template plain has no tools"),
        (({"role": "system", "content": "S"}, USER), {"response": "x"}, "system_turns: merge"),
    ):
        [found] = plain.encode([row(*messages, **more)])
        assert isinstance(found, DataError)
        assert words in str(found)
    assert texts(plain, row(USER, completion=(REASONED,)))[1] == THOUGHT + "<|end|>"
