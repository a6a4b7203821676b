"""How a row becomes the text that a model reads, and token ids.

Prompt and response are tokenised apart, each once, and put side by side as ids; nothing that was decoded is
ever tokenised again. A response ends with the token that ends a turn (`Encoder.end_id`).
"""

from __future__ import annotations

import string
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from stillhouse.config import Registry, StrictConfig
from stillhouse.data.rows import Message, Row
from stillhouse.errors import DataError, ModelError

Tokenizer = Any
"""A `transformers` tokenizer."""


class Template(StrictConfig):
    """Turns a row into the text of a prompt."""

    kind: str
    special_tokens: ClassVar[bool] = True
    """Whether the tokenizer puts its own tokens (beginning of sequence) in front of the prompt."""

    @abstractmethod
    def prompt(self, row: Row, tokenizer: Tokenizer) -> str:
        """The prompt, up to where the response begins.

        Raises:
            DataError: the row has something that the template has no place for.
        """

    def response(self, row: Row, prompt: str, tokenizer: Tokenizer) -> str:
        """What follows `prompt`, without the token that ends a turn."""
        return row.response or ""

    def end_id(self, tokenizer: Tokenizer) -> int:
        """The token that ends a response.

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
        """The template that is really used with this tokenizer."""
        return self


TEMPLATES: Registry[Template] = Registry("template", Template)  # type: ignore[type-abstract]


def single(row: Row, kind: str) -> tuple[str, str]:
    """Instruction and input of a row, also where it is a conversation of one question.

    Raises:
        DataError: the conversation is longer.
    """
    turns = [turn for turn in row.messages if turn["content"] or turn["role"] != "system"]
    if not turns:
        return row.instruction, row.input
    if len(turns) > 1 or turns[0]["role"] != "user":
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(
            f"{row.where}: the template {kind} takes one question, got the turns {roles}; use template: chat"
        )
    return turns[0]["content"], ""


@TEMPLATES.register
class Auto(Template):
    """`chat` where the tokenizer has a chat template, else `alpaca`."""

    kind: Literal["auto"] = "auto"

    def prompt(self, row: Row, tokenizer: Tokenizer) -> str:
        return self.resolved(tokenizer).prompt(row, tokenizer)

    def resolved(self, tokenizer: Tokenizer) -> Template:
        return Chat() if getattr(tokenizer, "chat_template", None) else Alpaca()


@TEMPLATES.register
class Alpaca(Template):
    """The format of Stanford Alpaca, used by MiniLLM, DistiLLM, ABKD and CSD for base models."""

    kind: Literal["alpaca"] = "alpaca"

    def prompt(self, row: Row, tokenizer: Tokenizer) -> str:
        instruction, given = single(row, self.kind)
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
    """Instruction, input and a line break; nothing else."""

    kind: Literal["plain"] = "plain"

    def prompt(self, row: Row, tokenizer: Tokenizer) -> str:
        instruction, given = single(row, self.kind)
        return "".join(f"{part}\n" for part in (instruction, given) if part)


@TEMPLATES.register
class Custom(Template):
    """Format strings with `{instruction}` and `{input}`; a brace that is meant as such is doubled."""

    kind: Literal["custom"] = "custom"
    without_input: str
    """For rows without an input; must hold `{instruction}`."""
    with_input: str | None = None
    """For rows with an input; must hold `{input}`."""

    @field_validator("without_input", "with_input")
    @classmethod
    def _formats(cls, value: str | None, info: Any) -> str | None:
        if value is None:
            return None
        needed = "input" if info.field_name == "with_input" else "instruction"
        allowed = {"instruction", "input"} if needed == "input" else {"instruction"}
        try:
            parsed = list(string.Formatter().parse(value))
        except ValueError as error:
            raise PydanticCustomError("template", "{problem}", {"problem": str(error)}) from error
        names = {name for _, name, _, _ in parsed if name is not None}
        if names - allowed or any(spec or conversion for _, _, spec, conversion in parsed):
            allowed_text = " and ".join(f"{{{name}}}" for name in sorted(allowed))
            raise PydanticCustomError(
                "template", "may hold {allowed} only, nothing else in braces", {"allowed": allowed_text}
            )
        if needed not in names:
            raise PydanticCustomError("template", "must hold {needed}", {"needed": f"{{{needed}}}"})
        return value

    def prompt(self, row: Row, tokenizer: Tokenizer) -> str:
        instruction, given = single(row, self.kind)
        if not given:
            return self.without_input.format(instruction=instruction)
        if self.with_input is None:
            raise DataError(f"{row.where}: has an input, but template.with_input is not set")
        return self.with_input.format(instruction=instruction, input=given)


_PROBE = "zqx"


@TEMPLATES.register
class Chat(Template):
    """The chat template that came with the tokenizer.

    The response's text is what the template itself renders after the prompt, so that prompt ids followed by
    response ids are the rendered conversation up to the end of the turn. Where a template renders earlier
    turns differently once the answer is there, the row's own response text is taken instead.
    """

    kind: Literal["chat"] = "chat"
    special_tokens: ClassVar[bool] = False
    system: str | None = None
    """A system message for rows that have none."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed on to the chat template, such as `{enable_thinking: false}`."""

    def messages(self, row: Row) -> list[Message]:
        """The conversation up to the response."""
        turns = list(row.messages)
        if not turns:
            words = f"{row.instruction}\n\n{row.input}" if row.input else row.instruction
            turns = [{"role": "user", "content": words}]
        if self.system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system})
        return turns

    def prompt(self, row: Row, tokenizer: Tokenizer) -> str:
        return self._render(self.messages(row), tokenizer, row.where, add_generation_prompt=True)

    def response(self, row: Row, prompt: str, tokenizer: Tokenizer) -> str:
        answer = row.response or ""
        turns = [*self.messages(row), {"role": "assistant", "content": answer}]
        full = self._render(turns, tokenizer, row.where)
        if not full.startswith(prompt):
            return answer
        rest = full[len(prompt) :]
        end = tokenizer.convert_ids_to_tokens(self.end_id(tokenizer))
        return rest[: rest.rindex(end)] if end in rest else answer

    def end_id(self, tokenizer: Tokenizer) -> int:
        """The token that closes the assistant's turn; the tokenizer's end of sequence where none does."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        _, _, tail = self._render(turns, tokenizer, "").rpartition(_PROBE)
        ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
        if ids and (ids[0] in tokenizer.all_special_ids or ids[0] in tokenizer.added_tokens_decoder):
            return int(ids[0])
        return super().end_id(tokenizer)

    def _render(self, turns: list[Message], tokenizer: Tokenizer, where: str, **more: Any) -> str:
        import jinja2

        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"data.template: the tokenizer of {tokenizer.name_or_path} has no chat template; "
                "use template: alpaca, plain or custom"
            )
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, **{**self.options, **more})
        except jinja2.TemplateError as error:
            raise DataError(f"{where}: the chat template refuses the conversation: {error}") from error
        return str(text)


class Encoder:
    """A template with a tokenizer.

    Example:
        >>> encoder = Encoder(Alpaca(), tokenizer)
        >>> encoder.encode([row])
        [("Below is ...", (21, 33), (7, 2))]
    """

    def __init__(self, template: Template, tokenizer: Tokenizer, teacher: Encoder | None = None) -> None:
        """Put them together.

        Args:
            template: how a row becomes text; resolved for the tokenizer.
            tokenizer: the student's.
            teacher: the teacher's template and tokenizer, where that is another one.
        """
        self.template = template.resolved(tokenizer)
        self.tokenizer = tokenizer
        self.teacher = teacher
        self.end_id = self.template.end_id(tokenizer)

    def encode(self, rows: Sequence[Row]) -> list[tuple[str, tuple[int, ...], tuple[int, ...] | None]]:
        """For each row: the prompt's text, its ids, and the response's ids with the end token (or None)."""
        prompts = [self.template.prompt(row, self.tokenizer) for row in rows]
        answered = [index for index, row in enumerate(rows) if row.response is not None]
        texts = [self.template.response(rows[i], prompts[i], self.tokenizer) for i in answered]
        ids = dict(zip(answered, self._ids(texts, special=False), strict=True))
        return [
            (prompt, tuple(prompt_ids), (*ids[index], self.end_id) if index in ids else None)
            for index, (prompt, prompt_ids) in enumerate(zip(prompts, self.prompt_ids(prompts), strict=True))
        ]

    def prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """The ids of rendered prompts. An end-of-sequence token that the tokenizer appends is taken off."""
        end = self.tokenizer.eos_token_id
        special = self.template.special_tokens
        encoded = self._ids(prompts, special=special)
        return [ids[:-1] if special and ids and ids[-1] == end else ids for ids in encoded]

    def teacher_ids(self, row: Row) -> tuple[int, ...] | None:
        """The prompt of a row as the teacher reads it; None if it reads what the student reads."""
        if self.teacher is None:
            return None
        text = self.teacher.template.prompt(row, self.teacher.tokenizer)
        return tuple(self.teacher.prompt_ids([text])[0])

    def text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of plain texts, without any special token."""
        return self._ids(texts, special=False)

    def _ids(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
        return [list(ids) for ids in encoded]
