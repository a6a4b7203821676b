"""Conversations as a tokenizer's chat template renders them, divided into prompt and response."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

from stillhouse.core.images import IMAGE, expander_of
from stillhouse.data.conversation import (
    SYSTEM_ROLES,
    TOOL_ROLES,
    function_of,
    inlined,
    parsed_arguments,
    reasoning_of,
    shows_python,
    weight_of,
    with_equal_merged,
    with_reasoning,
    with_system_merged,
    written_arguments,
)
from stillhouse.data.image_places import on_lines, with_content_parts
from stillhouse.data.rendering import REASONING_MARKERS, Part, Rendered
from stillhouse.data.rows import Message, Row
from stillhouse.data.text_tokens import unguarded
from stillhouse.errors import DataError, RowError

TrainOn = Literal["last", "all"]

PROBE = "zqx"
"""An answer that no template writes by itself."""

_USER: Message = {"role": "user", "content": "?"}
_ASSISTANT: Message = {"role": "assistant", "content": "!"}
_ANSWER: Message = {"role": "assistant", "content": PROBE}
_FUNCTION = {"name": "f", "arguments": {"a": 1}}
_CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "call00000", "function": _FUNCTION}],
}
_MARKERS = [tuple(map(re.escape, pair)) for pair in REASONING_MARKERS]
_EMPTY_REASONING = re.compile("|".join(rf"\s*{opening}\s*{closing}\s*" for opening, closing in _MARKERS))
_ENDS_EMPTY = re.compile("|".join(rf"{opening}\s*{closing}\s*$" for opening, closing in _MARKERS))
_ENDS_OPEN = re.compile("|".join(rf"{opening}\s*$" for opening, _ in _MARKERS))


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How conversations are rendered; the fields of `Chat` say what each means.

    Example: `ChatOptions({"enable_thinking": False})`
    """

    variables: Mapping[str, Any]
    system: str | None = None
    system_turns: Literal["keep", "merge"] = "keep"
    equal_roles: Literal["keep", "merge"] = "keep"
    reasoning: Literal["keep", "inline", "drop"] = "keep"
    empty_reasoning: Literal["prompt", "omit"] = "omit"


class ChatRenderer:
    """Renders conversations with the chat template of one tokenizer.

    Example:
        >>> ChatRenderer(tokenizer, ChatOptions({}), end="<|im_end|>").render(row)
        Rendered("<|im_start|>user\\nA fruit?<|im_end|>\\n<|im_start|>assistant\\n", (Part("Fig"),))
    """

    def __init__(self, tokenizer: Any, options: ChatOptions, end: str) -> None:
        """Ask the template how it opens a turn of the assistant.

        Args:
            tokenizer: with a chat template.
            options: how conversations are rendered.
            end: the text of the token that ends a response.

        Raises:
            DataError: there is no chat template, or it refuses a question with an answer.
        """
        self.tokenizer, self.options, self.end = tokenizer, options, end
        self.notes: Counter[str] = Counter()
        """What happened to rows that their user should know, each with the number of rows."""
        self._roles: dict[tuple[str, bool], bool] = {}
        asked = self._apply([_USER], add_generation_prompt=True)
        answered = self._apply([_USER, _ANSWER])
        between = ""
        if answered.startswith(asked) and PROBE in answered:
            between = answered[len(asked) : answered.rindex(PROBE)]
        block = _ENDS_EMPTY.search(between)
        self.empty_block = "" if block is None else between[block.start() :]
        """Reasoning without text that the template puts before an answer, but not into the prompt."""
        header = between.removesuffix(self.empty_block)
        ignores = asked == self._apply([_USER], add_generation_prompt=False)
        self.header = header if ignores and header.strip() else ""
        """What opens the assistant's turn where the template ignores `add_generation_prompt`."""

    def render(self, row: Row, train_on: TrainOn = "last") -> Rendered:
        """The row as text; the prompt is what a model is given to generate.

        Raises:
            DataError: the template refuses the conversation or leaves a part of it out, or each turn has
                weight 0.
        """
        turns, completion = self._turns(row), self._completion(row)
        if self.header:
            self.notes["the chat template has no generation prompt: the prompt opens the answer"] += 1
        if not completion:
            prompt = self.prompt(turns, row)
            return Rendered(self._closed(prompt) if self.options.empty_reasoning == "prompt" else prompt)
        prefill = turns.pop() if turns[-1]["role"] == "assistant" else None
        if prefill is not None:
            completion[0] = _continued(prefill, completion[0])
        conversation = [*turns, *completion]
        answers = [at for at, turn in enumerate(conversation) if turn["role"] == "assistant"]
        first = len(turns) if train_on == "last" else 0
        trained = [at for at in answers if at >= first and weight_of(conversation[at])]
        if not trained:
            raise RowError(row.location, "no turn is trained on: each has weight 0", "no turn to train on")
        conversation = conversation[: trained[-1] + 1]
        prompts = {at: self.prompt(conversation[:at], row) for at in trained}
        if prefill is not None and len(turns) in prompts:
            prompts[len(turns)] = self.prompt([*turns, prefill], row)
        before = "" if prefill is None else str(prefill.get("content") or "")
        if len(trained) == 1:
            prompt, parts = self._one(conversation, prompts[trained[0]], before, row)
        else:
            prompt, parts = self._several(conversation, prompts, row)
        context = sum(at <= trained[-1] for at in answers) - len(trained)
        only_last = trained == [answers[-1]]
        answer = None if only_last else str(conversation[trained[0]].get("content") or "")
        return Rendered(prompt, parts, len(trained), context, answer)

    @property
    def adds_empty_reasoning(self) -> bool:
        """Whether an answer without reasoning has an empty one, in whole or in part, before it."""
        prompt = self._apply([_USER], add_generation_prompt=True) + self.header
        return bool(self.empty_block or _ENDS_OPEN.search(prompt))

    def prompt(self, turns: Sequence[Message], row: Row) -> str:
        """A conversation up to where the next answer begins; a last turn of the assistant is continued."""
        if turns[-1]["role"] == "assistant":
            return self._text(turns, row, add_generation_prompt=False, continue_final_message=True)
        return self._text(turns, row, add_generation_prompt=True) + self.header

    def _one(
        self, conversation: Sequence[Message], prompt: str, prefill: str, row: Row
    ) -> tuple[str, tuple[Part, ...]]:
        """Prompt and response where one answer is trained on, the last."""
        answer = conversation[-1]
        reasoning, content = reasoning_of(answer)
        response = _after(self._text(conversation, row), prompt)
        if response is not None and self.end in response:
            response = response[: response.rindex(self.end)]
        elif not answer.get("tool_calls"):
            response = content.removeprefix(prefill)
        elif response is None:
            raise RowError(
                row.location,
                "the chat template writes the conversation in another way once the answer, a tool call, is "
                "there, so that prompt and response cannot be told apart",
                "a turn that its template rewrites",
            )
        if reasoning.strip():
            return prompt, (Part(self._with_reasoning(prompt, response, reasoning, row)),)
        block = _EMPTY_REASONING.match(response)
        response = response if block is None else response[block.end() :]
        if self.options.empty_reasoning == "prompt":
            return self._closed(prompt), (Part(response),)
        if _ENDS_OPEN.search(prompt):
            return prompt, (Part(self._closed(prompt)[len(prompt) :], trained=False), Part(response))
        return prompt, (Part(response),)

    def _with_reasoning(self, prompt: str, response: str, reasoning: str, row: Row) -> str:
        """The response with its reasoning, where the template left that out or the prompt has opened it."""
        opening, closing = self._reasoning_markers(prompt)
        shown = reasoning.strip() in response
        if _ENDS_OPEN.search(prompt):
            text = response if shown else f"{reasoning.strip()}\n{closing}\n\n{response.lstrip()}"
            return text.lstrip().removeprefix(opening).lstrip("\n")
        if shown:
            return response
        if not opening:
            raise RowError(
                row.location,
                "has reasoning, which the chat template leaves out, and the tokenizer has "
                "no <think>. Set data.template: {kind: chat, reasoning: inline}, which writes it between "
                "<think> and </think>, or reasoning: drop, which trains on the answers alone",
                "reasoning that its template leaves out",
            )
        self.notes[
            "the chat template leaves reasoning out: written between " + opening + " and " + closing
        ] += 1
        return inlined(reasoning, opening, closing) + response.lstrip()

    def _reasoning_markers(self, prompt: str) -> tuple[str, str]:
        """The markers of reasoning that prompt, template or vocabulary have; empty where there are none."""
        template = str(self.tokenizer.chat_template)
        for opening, closing in REASONING_MARKERS:
            known = opening in self.tokenizer.get_vocab()
            if known or prompt.rstrip().endswith(opening) or (opening in template and closing in template):
                return opening, closing
        return "", ""

    def _several(
        self, conversation: Sequence[Message], prompts: Mapping[int, str], row: Row
    ) -> tuple[str, tuple[Part, ...]]:
        """Prompt and response where several answers are trained on: from the first of them to the last."""
        whole = self._text(conversation, row)
        turn_end = self._turn_end()
        parts: list[Part] = []
        prompt, done = "", 0
        for at, opening in prompts.items():
            last = at == len(conversation) - 1
            begin = _start_in(whole, opening)
            if begin is None or begin < done or (not last and not turn_end):
                raise RowError(
                    row.location,
                    f"the chat template writes turn {at + 1} in another way once others follow it, so it "
                    "cannot be trained on with them; use data.train_on: last",
                    "a turn that its template rewrites",
                )
            reasoning, _ = reasoning_of(conversation[at])
            before = whole[done:begin]
            block = _EMPTY_REASONING.match(whole, begin)
            if block is not None and not reasoning.strip():
                begin = block.end()
                before += block.group() if self.options.empty_reasoning == "prompt" else ""
            if last:
                end = whole.rfind(self.end, begin)
                end = len(whole) if end < 0 else end
            else:
                end = whole.find(turn_end, begin) + len(turn_end)
            if reasoning.strip() and reasoning.strip() not in whole[begin:end]:
                self.notes[
                    "answers are trained on without their reasoning, which the template leaves out"
                ] += 1
            if parts:
                parts.append(Part(before, trained=False))
            else:
                prompt = before
            parts.append(Part(whole[begin:end]))
            done = end
        return prompt, tuple(parts)

    def _turn_end(self) -> str:
        """What ends a turn of the assistant that another turn follows; empty where no token does."""
        _, _, tail = self._apply([_USER, _ANSWER, _USER]).rpartition(PROBE)
        added = {str(token.content) for token in self.tokenizer.added_tokens_decoder.values()}
        found = [token for token in added | {self.end} if tail.startswith(token)]
        return max(found, key=len, default="")

    def _closed(self, prompt: str) -> str:
        """A prompt for an answer without reasoning, as the template writes it: its reasoning is empty."""
        if (opened := _ENDS_OPEN.search(prompt)) is not None:
            return f"{prompt}\n{dict(REASONING_MARKERS)[opened.group().strip()]}\n\n"
        return prompt if _ENDS_EMPTY.search(prompt) else prompt + self.empty_block

    def _turns(self, row: Row) -> list[Message]:
        """The turns before the response, in roles that the template has."""
        turns = [dict(turn) for turn in row.messages]
        if not turns:
            content = f"{row.instruction}\n\n{row.input}" if row.input else row.instruction
            turns = [{"role": "user", "content": content}]
        if self.options.system is not None and turns[0]["role"] not in SYSTEM_ROLES:
            turns.insert(0, {"role": "system", "content": self.options.system})
        for at, turn in enumerate(turns):
            if turn["role"] == "developer" and not self._has_role("developer", at == 0):
                turn["role"] = "system"
                self.notes["the chat template has no role developer: its turns are system turns"] += 1
        if self.options.system_turns == "merge":
            turns = with_system_merged(turns)
        if self.options.equal_roles == "merge":
            turns = with_equal_merged(turns)
        for at, turn in enumerate(turns):
            if not self._has_role(turn["role"], at == 0):
                raise _refused(
                    row, turns, f"the chat template leaves out turn {at + 1}, of role {turn['role']}"
                )
        return turns

    def _completion(self, row: Row) -> list[Message]:
        """The turns of the response; none for a row without one."""
        turns = [dict(turn) for turn in row.completion]
        if not turns and row.response is not None:
            turns = [{"role": "assistant", "content": row.response}]
        if self.options.reasoning != "keep":
            turns = [with_reasoning(turn, self.options.reasoning) for turn in turns]
        return turns

    def _text(self, turns: Sequence[Message], row: Row, **more: Any) -> str:
        """A conversation as text, with the tools of the row.

        Raises:
            DataError: the template refuses it, or leaves out tools or calls.
        """
        if row.images:
            turns = [self._showing(turn) for turn in turns]
        tools = [dict(tool) for tool in row.tools]
        if tools:
            more["tools"] = tools
        calls = [call for turn in turns for call in turn.get("tool_calls") or ()]
        try:
            text = self._apply([parsed_arguments(turn) for turn in turns], **more)
            retry = shows_python(text, calls)
        except DataError as error:
            if not calls:
                raise _refused(row, turns, str(error)) from error
            retry = True
        if retry:  # some templates take the arguments of a call as JSON text
            try:
                text = self._apply([written_arguments(turn) for turn in turns], **more)
            except DataError as error:
                raise _refused(row, turns, str(error)) from error
        for what, functions in (("tools", tools), ("tool_calls", calls)):
            lost = [name for one in functions if (name := str(function_of(one).get("name", ""))) not in text]
            if lost:
                raise _refused(row, turns, f"the chat template leaves out {what}, such as {lost[0]}")
        return text

    def _showing(self, turn: Message) -> Message:
        """A turn with its images as the template takes them: content parts, or places in the text."""
        if IMAGE not in str(turn.get("content")):
            return turn
        if self._takes_image_parts:
            return with_content_parts(turn)
        return {**turn, "content": on_lines(turn["content"])}

    @cached_property
    def _takes_image_parts(self) -> bool:
        expander = expander_of(self.tokenizer)
        shown = _attempt(self.tokenizer, [{"type": "image"}, {"type": "text", "text": PROBE}])
        return expander is not None and expander.image_token in shown and PROBE in shown

    def _has_role(self, role: str, first: bool) -> bool:
        """Whether the template renders turns of a role, and does not pass over them in silence."""
        if role in ("user", "assistant"):
            return True
        if (role, first) not in self._roles:
            turn: Message = {"role": role, "content": PROBE}
            probe = [turn, _USER] if first else [_USER, _ASSISTANT, turn, _USER]
            if role in TOOL_ROLES:
                probe = [_USER, _CALL, {**turn, "tool_call_id": "call00000", "name": "f"}]
            try:
                self._roles[role, first] = PROBE in self._apply(probe)
            except DataError:  # what it says of the row's own conversation is told
                self._roles[role, first] = role != "developer"
        return self._roles[role, first]

    def _apply(self, turns: Sequence[Message], **more: Any) -> str:
        return render_turns(self.tokenizer, turns, **{**self.options.variables, **more})


def render_turns(tokenizer: Any, turns: Sequence[Message], **variables: Any) -> str:
    """A conversation as the tokenizer's chat template renders it.

    Raises:
        DataError: there is no template, or it refuses the conversation; the message is the template's.
    """
    import jinja2

    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"data.template: the tokenizer of {tokenizer.name_or_path} has no chat template; "
            "use template: alpaca, plain or custom"
        )
    shown = [{name: value for name, value in turn.items() if name != "weight"} for turn in turns]
    if _takes_parts_only(tokenizer):
        shown = [with_content_parts(turn) if isinstance(turn["content"], str) else turn for turn in shown]
    try:
        return str(tokenizer.apply_chat_template(shown, tokenize=False, **variables))
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        words = str(error) or type(error).__name__
        raise DataError(f"the chat template refuses the conversation: {words}") from error


_PARTS_ONLY: dict[str, bool] = {}
"""Whether a chat template takes contents as lists of parts only, as those of some processors do."""


def _takes_parts_only(tokenizer: Any) -> bool:
    template = str(tokenizer.chat_template)
    if template not in _PARTS_ONLY:
        parts = [{"type": "text", "text": PROBE}]
        _PARTS_ONLY[template] = PROBE not in _attempt(tokenizer, PROBE) and PROBE in _attempt(
            tokenizer, parts
        )
    return _PARTS_ONLY[template]


def _attempt(tokenizer: Any, content: Any) -> str:
    """A question as the chat template renders it; empty where it refuses the question."""
    import jinja2

    try:
        return str(tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError):
        return ""


def _continued(prefill: Message, answer: Message) -> Message:
    """The turn that the prompt begins and the response continues."""
    return {**answer, "content": f"{prefill.get('content') or ''}{answer.get('content') or ''}"}


def _opened(prompt: str) -> str:
    """A prompt without the marker of reasoning that it ends with, or without its empty reasoning."""
    return _ENDS_OPEN.sub("", _ENDS_EMPTY.sub("", prompt))


def _start_in(whole: str, prompt: str) -> int | None:
    """Where in a conversation the answer to a prompt begins, whether or not the prompt opens reasoning."""
    for opening in (prompt, _opened(prompt)):
        if whole.startswith(opening):
            return len(opening)
    return None


def _after(whole: str, prompt: str) -> str | None:
    """What a conversation says after a prompt; None where it does not begin with the prompt."""
    begin = _start_in(whole, prompt)
    return None if begin is None else whole[begin:]


def _refused(row: Row, turns: Sequence[Message], problem: str) -> RowError:
    """That the template refuses a conversation, in its words, with a way out where there is one."""
    roles = [turn["role"] for turn in turns]
    ways = ["data.bad_rows: drop"]
    if any(a == b and a not in TOOL_ROLES for a, b in pairwise(roles)):
        ways.insert(0, "data.template: {kind: chat, equal_roles: merge}")
    if any(role in SYSTEM_ROLES for role in roles):
        ways.insert(0, "data.template: {kind: chat, system_turns: merge}")
    return RowError(
        row.location,
        f"{unguarded(problem)} (roles: {', '.join(roles)}). Set {' or '.join(ways)}",
        "refused by the chat template",
    )
