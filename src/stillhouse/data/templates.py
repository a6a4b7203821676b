"""Prompt templates: how a row becomes the text of a prompt and of a response."""

from __future__ import annotations

import copy
import json
import re
import string
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal, Protocol

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from stillhouse.config import Registry, StrictConfig
from stillhouse.data.chat import PROBE, ChatOptions, ChatRenderer, TrainOn, render_turns
from stillhouse.data.conversation import reasoning_of, weight_of, with_reasoning, with_system_merged
from stillhouse.data.image_places import on_lines
from stillhouse.data.rendering import Part, Rendered
from stillhouse.data.rows import Message, Row
from stillhouse.errors import ModelError, RowError

Tokenizer = Any
"""A `transformers` tokenizer."""


class Renderer(Protocol):
    """A template with a tokenizer."""

    notes: Counter[str]
    """What happened to rows that their user should know, each with the number of rows."""

    def render(self, row: Row, train_on: TrainOn = "last") -> Rendered:
        """The row as the text of its prompt and of its response.

        Raises:
            RowError: the template cannot render the row.
        """


class Template(StrictConfig):
    """Renders a row as the text of a prompt and of its response."""

    kind: str
    special_tokens: ClassVar[bool] = True
    """Whether the tokenizer adds its special tokens (beginning of sequence) to the prompt."""
    from_tokenizer: ClassVar[bool] = False
    """Whether it is another one with another tokenizer of the same vocabulary: its chat template."""

    @abstractmethod
    def renderer(self, tokenizer: Tokenizer) -> Renderer:
        """What renders rows for a tokenizer.

        Raises:
            DataError: the template cannot be used with the tokenizer.
        """

    def end_id(self, tokenizer: Tokenizer) -> int:
        """The token that ends a response: the tokenizer's end-of-sequence token.

        Raises:
            ModelError: the tokenizer has none.
        """
        end = tokenizer.eos_token_id
        if end is None:
            raise ModelError(
                f"{tokenizer.name_or_path}: the tokenizer has no end-of-sequence token; no response could end"
            )
        return int(end)

    def resolved(self, tokenizer: Tokenizer) -> Template:
        """The template to use with this tokenizer; differs from `self` for `auto` only."""
        return self


TEMPLATES: Registry[Template] = Registry("template", Template)  # type: ignore[type-abstract]


class SingleTurn(Template):
    """A template of one question and one answer, without roles."""

    system_turns: Literal["refuse", "merge"] = "refuse"
    """`merge` puts the text of a system turn before the question; by default a row with one is refused."""

    @abstractmethod
    def prompt(self, row: Row) -> str:
        """The prompt, up to where the response begins.

        Raises:
            RowError: the row is a conversation.
        """

    def chat_template(self, tokenizer: Tokenizer) -> str:
        """The same prompt as a chat template, for a question without an input."""
        before, _, after = self.prompt(Row("", instruction=PROBE)).partition(PROBE)
        bos = tokenizer.bos_token_id
        begin = "{{ bos_token }}" if bos is not None and bos in tokenizer("a")["input_ids"][:1] else ""
        refused = "{{ raise_exception('The model was trained without system turns.') }}"
        return (
            f"{begin}{{% for message in messages %}}{{% if message['role'] == 'assistant' %}}"
            "{{ message['content'] }}{{ eos_token }}{% elif message['role'] == 'user' %}"
            f"{{{{ {json.dumps(before)} }}}}{{{{ message['content'] }}}}{{{{ {json.dumps(after)} }}}}"
            f"{{% else %}}{refused}{{% endif %}}{{% endfor %}}"
        )

    def renderer(self, tokenizer: Tokenizer) -> Renderer:
        """A renderer that needs no tokenizer."""
        return SingleTurnRenderer(self)

    def question(self, row: Row) -> tuple[str, str]:
        """The instruction and input of a row; of a conversation, its only user turn.

        Raises:
            RowError: the conversation has other turns, or tools.
        """
        turns = [turn for turn in row.messages if turn["content"] or turn["role"] != "system"]
        if self.system_turns == "merge":
            turns = with_system_merged(turns)
        if row.tools:
            problem = f"the template {self.kind} has no tools; use template: chat"
            raise RowError(row.location, problem, "refused by the template")
        if not row.messages:
            return (on_lines(row.instruction) if row.images else row.instruction), row.input
        if len(turns) == 1 and turns[0]["role"] == "user":
            content = turns[0]["content"]
            return (on_lines(content) if row.images else content), ""
        roles = ", ".join(turn["role"] for turn in turns)
        way_out = "use template: chat"
        if {turn["role"] for turn in turns} == {"system", "user"}:
            way_out += f", or data.template: {{kind: {self.kind}, system_turns: merge}}"
        problem = f"the template {self.kind} takes one question, got the turns {roles}; {way_out}"
        raise RowError(row.location, problem, "refused by the template")


class SingleTurnRenderer:
    """Renders rows with a template of one question and one answer.

    Example: `SingleTurnRenderer(Plain()).render(row)` is `Rendered("A fruit?\\n", (Part("Fig"),))`
    """

    def __init__(self, template: SingleTurn) -> None:
        self.template = template
        self.notes: Counter[str] = Counter()

    def render(self, row: Row, train_on: TrainOn = "last") -> Rendered:
        """The row as the text of its prompt and of its response.

        Raises:
            RowError: the row is a conversation, or its response has tool calls.
        """
        prompt = self.template.prompt(row)
        if not row.completion:
            return Rendered(prompt, None if row.response is None else (Part(row.response),))
        *context, answer = row.completion
        if context or answer.get("tool_calls"):
            what = "a response of several turns" if context else "tool calls"
            problem = f"the template {self.template.kind} cannot render {what}; use template: chat"
            raise RowError(row.location, problem, "refused by the template")
        if not weight_of(answer):
            raise RowError(row.location, "no turn is trained on: each has weight 0", "no turn to train on")
        return Rendered(prompt, (Part(with_reasoning(answer, "inline")["content"]),))


@TEMPLATES.register
class Auto(Template):
    """The template that a student was trained with, if its tokenizer is one that Stillhouse exported; else
    `chat` if the tokenizer has a chat template, else `alpaca`."""

    kind: Literal["auto"] = "auto"
    from_tokenizer: ClassVar[bool] = True

    def renderer(self, tokenizer: Tokenizer) -> Renderer:
        """The renderer of the template that it stands for."""
        return self.resolved(tokenizer).renderer(tokenizer)

    def resolved(self, tokenizer: Tokenizer) -> Template:
        if (recorded := recorded_template(tokenizer)) is not None:
            return recorded
        return Chat() if getattr(tokenizer, "chat_template", None) else Alpaca()


@TEMPLATES.register
class Alpaca(SingleTurn):
    """Stanford Alpaca's prompt, which MiniLLM, DistiLLM, ABKD and CSD use for base models."""

    kind: Literal["alpaca"] = "alpaca"

    def prompt(self, row: Row) -> str:
        instruction, given = self.question(row)
        if given:
            return (
                "Below is an instruction that describes a task, paired with an input that provides further "
                "context. Write a response that appropriately completes the request.\n\n"
                f"### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:\n"
            )
        return (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Response:\n"
        )


@TEMPLATES.register
class Plain(SingleTurn):
    """Instruction and input, each followed by a line break."""

    kind: Literal["plain"] = "plain"

    def prompt(self, row: Row) -> str:
        instruction, given = self.question(row)
        return "".join(f"{part}\n" for part in (instruction, given) if part)


@TEMPLATES.register
class Custom(SingleTurn):
    """Format strings with `{instruction}` and `{input}`; write `{{` and `}}` for literal braces."""

    kind: Literal["custom"] = "custom"
    without_input: str
    """For rows without an input; must contain `{instruction}`."""
    with_input: str | None = None
    """For rows with an input; must contain `{input}`."""

    @field_validator("without_input", "with_input")
    @classmethod
    def _formats(cls, value: str | None, info: Any) -> str | None:
        if value is None:
            return None
        required = "input" if info.field_name == "with_input" else "instruction"
        allowed = {"instruction", "input"} if required == "input" else {"instruction"}
        try:
            parsed = list(string.Formatter().parse(value))
        except ValueError as error:
            raise PydanticCustomError("template", "{problem}", {"problem": str(error)}) from error
        names = {name for _, name, _, _ in parsed if name is not None}
        if names - allowed or any(spec or conversion for _, _, spec, conversion in parsed):
            allowed_text = " and ".join(f"{{{name}}}" for name in sorted(allowed))
            raise PydanticCustomError(
                "template", "may contain {allowed} only, nothing else in braces", {"allowed": allowed_text}
            )
        if required not in names:
            raise PydanticCustomError("template", "must contain {required}", {"required": f"{{{required}}}"})
        return value

    def prompt(self, row: Row) -> str:
        instruction, given = self.question(row)
        if not given:
            return self.without_input.format(instruction=instruction)
        if self.with_input is None:
            problem = "has an input, but template.with_input is not set"
            raise RowError(row.location, problem, "refused by the template")
        return self.with_input.format(instruction=instruction, input=given)


@TEMPLATES.register
class Chat(Template):
    """The chat template of the tokenizer.

    The response is what the template renders after the prompt, so that prompt ids followed by response ids
    are the rendered conversation up to the end of the turn. If the template renders the prompt differently
    once the response is there, the row's response is used as it is.
    """

    kind: Literal["chat"] = "chat"
    from_tokenizer: ClassVar[bool] = True
    special_tokens: ClassVar[bool] = False
    system: str | None = None
    """System message for rows without one."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, such as `{enable_thinking: false}`: in training, generation and
    evaluation alike."""
    system_turns: Literal["keep", "merge"] = "keep"
    """`merge` puts the text of a system turn before the user's turn after it, for templates that refuse
    system turns."""
    equal_roles: Literal["keep", "merge"] = "keep"
    """`merge` makes one turn of neighbouring turns of the same role, for templates that refuse these."""
    reasoning: Literal["keep", "inline", "drop"] = "keep"
    """Reasoning of a response: as the template renders it, as text between `<think>` and `</think>`, or left
    out. With `keep` a row whose reasoning the template leaves out is refused, unless the tokenizer knows
    `<think>`: then it is written as with `inline`."""
    empty_reasoning: Literal["auto", "prompt", "omit"] = "auto"
    """Reasoning without text, which templates of reasoning models put before an answer that has none. It is
    never trained on. `prompt`: it ends the prompt of each row without reasoning, in training, generation and
    evaluation, so that the model answers without reasoning. `omit`: it is left out, and every prompt is the
    template's own. `auto`: `prompt` if the responses of data.train are without reasoning, else `omit`."""

    def renderer(self, tokenizer: Tokenizer) -> ChatRenderer:
        """A renderer with the tokenizer's chat template."""
        end = tokenizer.convert_ids_to_tokens(self.end_id(tokenizer))
        options = ChatOptions(
            self.options,
            self.system,
            self.system_turns,
            self.equal_roles,
            self.reasoning,
            "prompt" if self.empty_reasoning == "prompt" else "omit",
        )
        return ChatRenderer(tokenizer, options, end)

    def end_id(self, tokenizer: Tokenizer) -> int:
        """The special token that closes the assistant's turn; without one, the end-of-sequence token."""
        turns: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
        _, _, tail = render_turns(tokenizer, turns, **self.options).rpartition(PROBE)
        ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
        if ids and (ids[0] in tokenizer.all_special_ids or ids[0] in tokenizer.added_tokens_decoder):
            return int(ids[0])
        return super().end_id(tokenizer)


_RECORD = re.compile(r"\A\{# stillhouse: (\{.*?\}) #\}")


def with_template(tokenizer: Tokenizer, template: Template) -> Tokenizer:
    """A copy of a tokenizer that carries the template of a run, for the student that is exported with it.

    Its chat template renders what the student was trained on, also where that is no chat template, and
    begins with a comment that names the template and its options: `auto` reads it.
    """
    carrier = copy.deepcopy(tokenizer)
    resolved = template.resolved(tokenizer)
    facts = json.dumps(resolved.model_dump(mode="json", exclude_defaults=True) | {"kind": resolved.kind})
    facts = facts.replace("#}", "#\\u007d")  # would end the comment
    if isinstance(resolved, SingleTurn):
        carrier.chat_template = f"{{# stillhouse: {facts} #}}{resolved.chat_template(tokenizer)}"
    elif isinstance(carrier.chat_template, str):
        carrier.chat_template = f"{{# stillhouse: {facts} #}}{_RECORD.sub('', carrier.chat_template)}"
    return carrier


def recorded_template(tokenizer: Tokenizer) -> Template | None:
    """The template that `with_template` wrote into a tokenizer; None if there is none.

    Raises:
        ModelError: this version of Stillhouse cannot read it.
    """
    text = getattr(tokenizer, "chat_template", None)
    found = _RECORD.match(text) if isinstance(text, str) else None
    if found is None:
        return None
    try:
        template: Template = TEMPLATES.parse(json.loads(found[1]))
    except ValueError as error:
        raise ModelError(
            f"{tokenizer.name_or_path}: the template that its chat template names cannot be read ({error}); "
            "name one by data.template"
        ) from error
    return template


def settled_template(template: Template, tokenizer: Tokenizer, rows: Callable[[], Iterable[Row]]) -> Template:
    """The template for a tokenizer and for the rows that are trained on: see `Chat.empty_reasoning`.

    Args:
        template: the configured one.
        tokenizer: the student's.
        rows: reads the training rows; called only where they decide.
    """
    resolved = template.resolved(tokenizer)
    if not isinstance(resolved, Chat) or resolved.empty_reasoning != "auto":
        return resolved
    thinks = any(resolved.options.get(name) for name in ("enable_thinking", "thinking"))
    if thinks or not resolved.renderer(tokenizer).adds_empty_reasoning:
        return resolved
    how = "prompt" if _answers_without_reasoning(rows()) else "omit"
    settled: Template = resolved.model_copy(update={"empty_reasoning": how})
    return settled


def _answers_without_reasoning(rows: Iterable[Row]) -> bool:
    """Whether rows have responses and none of them has reasoning."""
    answered = False
    for row in rows:
        answers: tuple[Message, ...] = row.completion or ({"role": "assistant", "content": row.response},)
        if any(reasoning_of(turn)[0].strip() for turn in answers):
            return False
        answered = answered or row.has_response
    return answered
