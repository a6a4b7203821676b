"""A conversation with a finished student, and with its teacher on demand: their template, their sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from stillhouse.config import Layer, Layered, validate
from stillhouse.config.strict_yaml import parse_value
from stillhouse.data.rows import Message, Row
from stillhouse.data.templates import TEMPLATES, SingleTurn, Template
from stillhouse.data.tokenise import Encoder
from stillhouse.engines import Sampling, TokenizerInfo
from stillhouse.errors import ConfigError, Fault
from stillhouse.files import locate
from stillhouse.models import TeacherModel, generation_ends, load_teacher, load_tokenizer, local_device
from stillhouse.models.paths import is_run
from stillhouse.runs.own_settings import own_settings
from stillhouse.runs.resolve import resolve

Show = Callable[[str], None]
"""Takes the pieces of an answer as they come."""


class Speaker:
    """A model that answers turns.

    Example: `Speaker(TeacherModel(path="runs/kd"), template).answer(turns, sampling, print)`
    """

    def __init__(self, model: TeacherModel, template: Template) -> None:
        """Loads the model and its tokenizer."""
        self.tokenizer = load_tokenizer(model)
        self.encoder = Encoder(template, self.tokenizer)
        facts = TokenizerInfo(
            generation_ends(model, self.tokenizer), self.tokenizer.pad_token_id, self.tokenizer
        )
        self.ends = list(facts.ended_by(self.encoder.ends).eos_ids)
        self.model: Any = load_teacher(model).to(local_device())

    @property
    def remembers(self) -> bool:
        """Whether its template has more than one turn."""
        return not isinstance(self.encoder.template, SingleTurn)

    @torch.no_grad()
    def answer(self, turns: list[Message], sampling: Sampling, show: Show) -> str:
        """The next turn; what was shown until an interruption is lost to the caller, but is no half token.

        Raises:
            RowError: the template refuses the turns.
        """
        asked = turns if self.remembers else turns[-1:]
        _, ids = self.encoder.prompt(Row("the conversation", messages=tuple(asked)))
        given = torch.tensor([ids], device=self.model.device)
        pieces: list[str] = []

        def take(text: str) -> None:
            pieces.append(text)
            show(text)

        self.model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            eos_token_id=self.ends,
            pad_token_id=self.tokenizer.pad_token_id,
            streamer=_streamer(self.tokenizer, take),
            **_generate_options(sampling),
        )
        return "".join(pieces)


def _streamer(tokenizer: Any, take: Show) -> Any:
    """transformers' streamer of whole words, into a function."""
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            take(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _generate_options(sampling: Sampling) -> dict[str, Any]:
    """A sampling as transformers' `generate` has it."""
    options: dict[str, Any] = {
        "do_sample": sampling.temperature > 0,
        "max_new_tokens": sampling.max_tokens,
        "min_new_tokens": sampling.min_tokens,
        "repetition_penalty": sampling.repetition_penalty,
        "no_repeat_ngram_size": sampling.no_repeat_ngram_size,
    }
    if sampling.temperature > 0:
        options |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        options["min_p"] = sampling.min_p or None
    return options


class Conversation:
    """Turns with a student; the teacher can be asked for the same turn.

    Example: `Conversation(Path("runs/kd")).ask("A fruit?", print)`
    """

    def __init__(self, source: Path, template: str | Mapping[str, Any] | None = None) -> None:
        """Loads the student of a run, or the model of a folder.

        Raises:
            StillhouseError: there is none.
        """
        own = own_settings(str(source))
        self.template = TEMPLATES.parse(template or own.data.get("template", "auto"))
        self.student = Speaker(TeacherModel(path=str(source)), self.template)
        limit = own.data.get("max_response", 256)
        self.sampling = Sampling.model_validate({"max_tokens": limit, **own.evaluate.get("sampling", {})})
        self.turns: list[Message] = []
        self._source = source
        self._teacher: Speaker | None = None

    @property
    def remembers(self) -> bool:
        """Whether a question is answered with those before it."""
        return self.student.remembers

    def ask(self, question: str, show: Show) -> str:
        """The student's answer, kept as a turn. A question that is interrupted leaves no turn."""
        asked: list[Message] = [*self.turns, {"role": "user", "content": question}]
        answer = self.student.answer(asked, self.sampling, show)
        self.turns = [*asked, {"role": "assistant", "content": answer}]
        return answer

    def ask_teacher(self, show: Show) -> str:
        """The teacher's answer to the last question, in the place of the student's; not kept.

        Raises:
            ConfigError: nothing was asked, or there is no teacher that can be loaded.
        """
        if not self.turns:
            raise ConfigError("/teacher: nothing was asked yet.")
        return self.teacher().answer(self.turns[:-1], self.sampling, show)

    def teacher(self) -> Speaker:
        """The run's teacher, loaded when it is first asked.

        Raises:
            ConfigError: the model comes from no run, or the run's teacher has no weights here.
        """
        if self._teacher is None:
            place = locate(self._source)
            run = place if is_run(place) else place.parent
            if not is_run(run):
                raise ConfigError(
                    Fault("--teacher", "only the student of a run has one", got=str(self._source))
                )
            config = resolve(run / "resolved.yaml").config.teacher
            model = None if config is None else config.model_to_load()
            if model is None:
                kind = "none" if config is None else f"a teacher of kind {config.kind}"
                raise ConfigError(Fault("--teacher", "its weights are not loaded here", got=kind))
            self._teacher = Speaker(model, self.template)
        return self._teacher

    def change(self, text: str) -> None:
        """Change values of the sampling: `temperature=0.7 top_p=0.9`.

        Raises:
            ConfigError: no such value; nothing is changed.
        """
        values = self.sampling.model_dump()
        for part in text.split():
            name, equals, value = part.partition("=")
            if not equals:
                raise ConfigError(f"/set: {part!r}: write NAME=VALUE, such as temperature=0.7")
            values[name] = parse_value(value)
        self.sampling, _ = validate(Sampling, Layered.merged(Layer.of(values, "/set")))

    def clear(self) -> None:
        """Forget all turns."""
        self.turns = []
