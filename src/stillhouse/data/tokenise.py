"""From rows to token ids: a template with a tokenizer, and the rules for rows that are too long."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from stillhouse.config import StrictConfig
from stillhouse.core.images import IMAGE, ImageRef, expander_of
from stillhouse.data.chat import TrainOn
from stillhouse.data.image_places import expanded
from stillhouse.data.images import NOT_READ
from stillhouse.data.rendering import Rendered, guarded
from stillhouse.data.rows import Row
from stillhouse.data.templates import Chat, Template, Tokenizer
from stillhouse.data.text_tokens import GUARD, TextTokenizer, UnspellableText, unguarded
from stillhouse.errors import DataError, ModelError, RowError


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row as token ids.

    Example: `EncodedRow("A fruit?\\n", (21, 33), (7, 0))`
    """

    text: str
    """The prompt as text."""
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...] | None = None
    """The response, with its end token unless it was cut; None for a row without a response."""
    trained: tuple[int, ...] | None = None
    """1 for each token of the response that is trained on, 0 for context and results of tools; None: all
    are."""
    trained_turns: int = 1
    """Turns of the assistant that are trained on."""
    context_turns: int = 0
    """Turns of the assistant that are only read."""
    answer: str | None = None
    """The text that answers the prompt, where it is not the row's response but an earlier turn."""
    images: tuple[ImageRef, ...] = ()
    """The images of the prompt."""
    response_images: tuple[ImageRef, ...] = ()
    """Those between the answers of the response."""


class Encoder:
    """Turns rows into token ids with a template and a tokenizer.

    Prompt and response are tokenised as one text and divided where the prompt ends, so that the response is
    what a model would write after the prompt. The prompt has the ids that it has alone. Texts of rows never
    become control tokens. A response ends with the template's end-of-turn token.

    Example:
        >>> encoder = Encoder(Alpaca(), tokenizer)
        >>> encoder.encode([row])
        [EncodedRow("Below is ...", (21, 33), (7, 2))]
    """

    def __init__(
        self,
        template: Template,
        tokenizer: Tokenizer,
        teacher: Encoder | None = None,
        train_on: TrainOn = "last",
        differs_in_images: bool = False,
    ) -> None:
        """An encoder for a tokenizer.

        Args:
            template: renders rows; resolved for the tokenizer.
            tokenizer: the student's.
            teacher: the teacher's encoder, if it reads prompts of its own.
            train_on: the turns of the assistant that responses train on.
            differs_in_images: of a teacher's encoder: it gives the student's ids but for those of images.
        """
        self.template = template.resolved(tokenizer)
        self.tokenizer = tokenizer
        self.teacher = teacher
        self.train_on = train_on
        self.end_id = self.template.end_id(tokenizer)
        self.texts = TextTokenizer(tokenizer)
        self.renderer = self.template.renderer(tokenizer)
        self.expander = expander_of(tokenizer)
        self.differs_in_images = differs_in_images

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text: the end of a response first, then the tokenizer's end of sequence and
        the end of a turn in its chat template."""
        eos = self.tokenizer.eos_token_id
        found = [self.end_id, *(() if eos is None else (int(eos),))]
        if getattr(self.tokenizer, "chat_template", None):
            with contextlib.suppress(DataError, ModelError):  # a chat template that nobody chats with
                found.append(Chat().end_id(self.tokenizer))
        return tuple(dict.fromkeys(found))

    def encode(self, rows: Sequence[Row], most_tokens: int | None = None) -> list[EncodedRow | RowError]:
        """For each row its ids, or why it has none: the template refuses it, or a text cannot be spelled.

        Args:
            rows: in the order of the result.
            most_tokens: how many ids of a prompt or a response are ever looked at. Texts of megabytes, which
                have more for certain, are not tokenised to their ends; they still come out longer than this.
        """
        rendered = [self._rendered(row) for row in rows]
        if most_tokens is not None:
            longest = self.texts.certainly_longer(most_tokens)
            rendered = [_cut(found, longest) if isinstance(found, Rendered) else found for found in rendered]
        known = self._together([found for found in rendered if isinstance(found, Rendered)])
        return [
            found if isinstance(found, RowError) else self._encoded(found, row, known.get(id(found)))
            for found, row in zip(rendered, rows, strict=True)
        ]

    def check_reads_images(self, row: Row) -> None:
        """Refuse a row with images if its model reads text alone.

        Raises:
            RowError: it does.
        """
        if row.image_values and self.expander is None:
            raise RowError(
                row.location,
                f"number of images: {len(row.image_values)}; the model of {self.tokenizer.name_or_path} "
                "reads text alone. Take a vision-language model (LLaVA's, SmolVLM's, Qwen-VL's family), or "
                "read such rows without their images: data.ignore, with the name of the column",
                NOT_READ,
            )

    def prompt(self, row: Row) -> tuple[str, tuple[int, ...]]:
        """The prompt of a row as text and as ids, as a model is given it.

        Raises:
            RowError: the template refuses the row, or a text cannot be spelled.
        """
        found = self.encode([row])[0]
        if isinstance(found, RowError):
            raise found
        return found.text, found.prompt_ids

    def text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of plain texts, without special tokens.

        Raises:
            UnspellableText: a text spells a control token, and the tokenizer has no ordinary tokens for it.
        """
        return self.texts.ids([self.texts.guard(text) for text in texts])

    def answering_last(self) -> Encoder:
        """The same encoder where prompts end before the last answer, as the evaluation asks."""
        if self.train_on == "last":
            return self
        return Encoder(self.template, self.tokenizer, self.teacher)

    def take_notes(self) -> Counter[str]:
        """What happened to rows since the last call that their user should know, with the numbers of rows."""
        notes = Counter(self.renderer.notes)
        self.renderer.notes.clear()
        return notes

    def _rendered(self, row: Row) -> Rendered | RowError:
        try:
            safe = guarded(row, self.texts)
            if safe is not row:
                self.renderer.notes[SPELLED] += 1
            found = self.renderer.render(safe, self.train_on)
            if not row.images:
                return found
            self.check_reads_images(row)
            assert self.expander is not None
            return expanded(found, row, self.expander)
        except UnspellableText as error:
            return RowError(row.location, str(error), UNSPELLABLE)
        except RowError as error:
            return error

    def _together(self, rendered: Sequence[Rendered]) -> dict[int, tuple[list[int], list[int]]]:
        """Prompt and response of each ordinary row in few calls of the tokenizer, by the row's `id`."""
        plain = [one for one in rendered if _is_plain(one)]
        asked = [one for one in plain if one.response is None]
        answered = [one for one in plain if one.response is not None]
        prompts = self.texts.ids([one.prompt for one in asked])
        try:
            pairs = self.texts.following(
                [one.prompt for one in answered],
                [part.text for one in answered for part in one.response or ()],
            )
        except UnspellableText:  # by one of them: each alone tells which
            answered, pairs = [], []
        alone = [(prompt, list[int]()) for prompt in prompts]
        return dict(zip(map(id, [*asked, *answered]), [*alone, *pairs], strict=True))

    def _encoded(
        self, found: Rendered, row: Row, known: tuple[list[int], list[int]] | None
    ) -> EncodedRow | RowError:
        try:
            prompt, response, trained = self._parts(found) if known is None else (*known, None)
        except UnspellableText as error:
            return RowError(row.location, str(error), UNSPELLABLE)
        if self.template.special_tokens and prompt[: len(self.texts.prefix)] != self.texts.prefix:
            prompt = [*self.texts.prefix, *prompt]
        end = (self.end_id,) if row.finished else ()
        return EncodedRow(
            unguarded(found.prompt if found.shown is None else found.shown),
            tuple(prompt),
            None if found.response is None else (*response, *end),
            None if trained is None or all(trained) else (*trained, *(1 for _ in end)),
            found.trained_turns,
            found.context_turns,
            None if found.answer is None else unguarded(found.answer),
            row.images[: found.prompt_images],
            row.images[found.prompt_images :],
        )

    def _parts(self, found: Rendered) -> tuple[list[int], list[int], list[int]]:
        """The ids of prompt and response, and which of the response's are trained on, part after part."""
        [prompt] = self.texts.ids([found.prompt])
        response: list[int] = []
        trained: list[int] = []
        before = found.prompt
        for part in found.response or ():
            [(_, ids)] = self.texts.following([before], [part.text])
            response += ids
            trained += [int(part.trained)] * len(ids)
            before += part.text
        return prompt, response, trained


UNSPELLABLE = "text of a control token that cannot be spelled"
"""The reason of rows that are always dropped, since nobody can write them in ordinary tokens."""

SPELLED = "a text spells a control token: it is read in ordinary tokens"
"""The note of rows whose texts had to be guarded."""


def _cut(found: Rendered, longest: int) -> Rendered:
    """The rendered row with so many characters of its prompt and of each part of its response at most."""
    parts = found.response or ()
    if len(found.prompt) <= longest and all(len(part.text) <= longest for part in parts):
        return found
    return replace(
        found,
        prompt=found.prompt[:longest],
        response=found.response and tuple(replace(part, text=part.text[:longest]) for part in parts),
    )


def _is_plain(found: Rendered) -> bool:
    """Whether a row is tokenised with the others in one call: one part, and no guarded text."""
    parts = found.response or ()
    return len(parts) <= 1 and not any(GUARD in text for text in (found.prompt, *(one.text for one in parts)))


class TooLong(StrictConfig):
    """What happens to a row that is longer than `max_prompt` or `max_response`."""

    prompt: Literal["drop", "truncate_left", "truncate_right"] = "drop"
    """`truncate_left` removes the beginning and `truncate_right` the end of the last message, the input, or
    else the instruction. The text of the template is never truncated; a row that still does not fit is
    dropped."""
    response: Literal["drop", "truncate"] = "truncate"
    """`truncate` keeps the first `max_response` tokens, without an end-of-sequence token: a truncated
    response must not teach the student to stop there."""


def truncate_prompt(
    row: Row, encoder: Encoder, limit: int, side: Literal["truncate_left", "truncate_right"]
) -> tuple[Row, str, tuple[int, ...]] | None:
    """The row with the longest part of its `user_text` for which the prompt has at most `limit` tokens.

    The user text is truncated, not the rendered prompt; bisection over the number of characters kept. Images
    stay, whole and in their order.

    Returns:
        The row, its prompt and the prompt's ids; None if not one character fits.
    """
    whole = row.user_text
    best: tuple[Row, str, tuple[int, ...]] | None = None
    low, high = 1, len(whole) - (whole.count(IMAGE) if row.images else 0) - 1
    high = min(high, encoder.texts.certainly_longer(limit))
    while low <= high:
        keep = (low + high) // 2
        kept = _shortened(whole, keep, side, bool(row.images))
        truncated = row.with_user_text(kept)
        text, ids = encoder.prompt(truncated)
        if len(ids) <= limit:
            best, low = (truncated, text, ids), keep + 1
        else:
            high = keep - 1
    return best


def _shortened(text: str, keep: int, side: Literal["truncate_left", "truncate_right"], images: bool) -> str:
    """The last or the first characters of a text, with the places of all its images."""
    if not images:
        return text[-keep:] if side == "truncate_left" else text[:keep]
    places = [at for at, character in enumerate(text) if character != IMAGE]
    kept = set(places[-keep:] if side == "truncate_left" else places[:keep])
    return "".join(one for at, one in enumerate(text) if one == IMAGE or at in kept)


def truncate_response(
    ids: tuple[int, ...],
    limit: int,
    rule: Literal["drop", "truncate"],
    counts: Counter[str],
    name: str = "response",
) -> tuple[int, ...] | None:
    """A response of at most `limit` tokens, or None to drop it; counts `name` if it truncates."""
    if len(ids) <= limit:
        return ids
    if rule == "drop":
        return None
    counts[name] += 1
    return ids[:limit]
