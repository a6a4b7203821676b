"""Prompt templates: how a row becomes the text of a prompt and of a response."""

from __future__ import annotations

import string
from abc import abstractmethod
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from stillhouse.config import Registry, StrictConfig
from stillhouse.data.rows import Message, Row
from stillhouse.errors import DataError, ModelError

Tokenizer = Any
"""A `transformers` tokenizer."""


class Template(StrictConfig):
    """Renders a row as the text of a prompt and of its response."""

    kind: str
    special_tokens: ClassVar[bool] = True
    """Whether the tokenizer adds its special tokens (beginning of sequence) to the prompt."""

    @abstractmethod
    def prompt(self, row: Row, tokenizer: Tokenizer) -> str:
        """The prompt, up to where the response begins.

        Raises:
            DataError: the template cannot render the row.
        """

    def response(self, row: Row, prompt: str, tokenizer: Tokenizer) -> str:
        """The response after `prompt`, without the end-of-turn token."""
        return row.response or ""

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


def single_turn(row: Row, kind: str) -> tuple[str, str]:
    """The instruction and input of a row; of a conversation, its only user turn.

    Raises:
        DataError: the conversation has other turns.
    """
    turns = [turn for turn in row.messages if turn["content"] or turn["role"] != "system"]
    if not turns:
        return row.instruction, row.input
    if len(turns) > 1 or turns[0]["role"] != "user":
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(
            f"{row.location}: the template {kind} takes one question, got the turns {roles}; "
            "use template: chat"
        )
    return turns[0]["content"], ""


@TEMPLATES.register
class Auto(Template):
    """`chat` if the tokenizer has a chat template, else `alpaca`."""

    kind: Literal["auto"] = "auto"

    def prompt(self, row: Row, tokenizer: Tokenizer) -> str:
        return self.resolved(tokenizer).prompt(row, tokenizer)

    def resolved(self, tokenizer: Tokenizer) -> Template:
        return Chat() if getattr(tokenizer, "chat_template", None) else Alpaca()


@TEMPLATES.register
class Alpaca(Template):
    """Stanford Alpaca's prompt, which MiniLLM, DistiLLM, ABKD and CSD use for base models."""

    kind: Literal["alpaca"] = "alpaca"

    def prompt(self, row: Row, tokenizer: Tokenizer) -> str:
        instruction, given = single_turn(row, self.kind)
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
class Plain(Template):
    """Instruction and input, each followed by a line break."""

    kind: Literal["plain"] = "plain"

    def prompt(self, row: Row, tokenizer: Tokenizer) -> str:
        instruction, given = single_turn(row, self.kind)
        return "".join(f"{part}\n" for part in (instruction, given) if part)


@TEMPLATES.register
class Custom(Template):
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

    def prompt(self, row: Row, tokenizer: Tokenizer) -> str:
        instruction, given = single_turn(row, self.kind)
        if not given:
            return self.without_input.format(instruction=instruction)
        if self.with_input is None:
            raise DataError(f"{row.location}: has an input, but template.with_input is not set")
        return self.with_input.format(instruction=instruction, input=given)


_PROBE = "zqx"


@TEMPLATES.register
class Chat(Template):
    """The chat template of the tokenizer.

    The response is what the template renders after the prompt, so that prompt ids followed by response ids
    are the rendered conversation up to the end of the turn. If the template renders the prompt differently
    once the response is there, the row's response is used as it is.
    """

    kind: Literal["chat"] = "chat"
    special_tokens: ClassVar[bool] = False
    system: str | None = None
    """System message for rows without one."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, such as `{enable_thinking: false}`."""

    def messages(self, row: Row) -> list[Message]:
        """The conversation up to the response."""
        turns = list(row.messages)
        if not turns:
            content = f"{row.instruction}\n\n{row.input}" if row.input else row.instruction
            turns = [{"role": "user", "content": content}]
        if self.system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system})
        return turns

    def prompt(self, row: Row, tokenizer: Tokenizer) -> str:
        return self._render(self.messages(row), tokenizer, row.location, add_generation_prompt=True)

    def response(self, row: Row, prompt: str, tokenizer: Tokenizer) -> str:
        answer = row.response or ""
        turns = [*self.messages(row), {"role": "assistant", "content": answer}]
        full = self._render(turns, tokenizer, row.location)
        if not full.startswith(prompt):
            return answer
        rest = full[len(prompt) :]
        end = tokenizer.convert_ids_to_tokens(self.end_id(tokenizer))
        return rest[: rest.rindex(end)] if end in rest else answer

    def end_id(self, tokenizer: Tokenizer) -> int:
        """The special token that closes the assistant's turn; without one, the end-of-sequence token."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        _, _, tail = self._render(turns, tokenizer, "").rpartition(_PROBE)
        ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
        if ids and (ids[0] in tokenizer.all_special_ids or ids[0] in tokenizer.added_tokens_decoder):
            return int(ids[0])
        return super().end_id(tokenizer)

    def _render(self, turns: list[Message], tokenizer: Tokenizer, location: str, **more: Any) -> str:
        import jinja2

        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"data.template: the tokenizer of {tokenizer.name_or_path} has no chat template; "
                "use template: alpaca, plain or custom"
            )
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, **{**self.options, **more})
        except jinja2.TemplateError as error:
            raise DataError(f"{location}: the chat template refuses the conversation: {error}") from error
        return str(text)
