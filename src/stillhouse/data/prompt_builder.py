"""Rows to prompts: rendered, tokenised and held to the length rules; what is dropped is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from stillhouse.core.requirements import MAIN
from stillhouse.core.types import Prompt
from stillhouse.data.account import Account
from stillhouse.data.config import DataConfig
from stillhouse.data.conversation import without_chain
from stillhouse.data.datasets import DatasetConfig
from stillhouse.data.formats.conversation import up_to_last_answer
from stillhouse.data.images import opened
from stillhouse.data.reading import Reading
from stillhouse.data.row_teachers import rows_by_teacher
from stillhouse.data.rows import Row
from stillhouse.data.teacher_context import NO_ROW_BEFORE, in_context
from stillhouse.data.teacher_prompts import TeacherReads
from stillhouse.data.tokenise import UNSPELLABLE, EncodedRow, Encoder, truncate_prompt, truncate_response
from stillhouse.errors import DataError, RowError

RESPONSES, REJECTED, REASONING = "responses", "rejected", "reasoning"
"""What rows must have, as `Requirements.data` has it."""
ENDS_UNANSWERED = "nobody answers the last turns of a conversation: they are left out"
IMAGES_TOO_LONG = "prompt with images too long"
"""The reason of prompts that are too long and have images, of which none may go."""


class PromptBuilder:
    """Turns the rows of one dataset into prompts, and counts what it drops and truncates."""

    def __init__(
        self,
        name: str,
        dataset: DatasetConfig,
        config: DataConfig,
        encoder: Encoder,
        *,
        reading: Reading,
        needs: Collection[str] = (),
        teacher: TeacherReads | None = None,
    ) -> None:
        self.name = name
        self.reading = reading
        self.dataset = dataset
        self.config = config
        self.encoder = encoder
        self.most_tokens = max(config.max_prompt, config.max_response)
        self.needs = frozenset(needs)
        self.teacher = teacher or TeacherReads()
        self.contexts = config.teacher_context if name == "train" else {}
        self.before: Row | None = None
        """The row with a response that was read last, for what contexts show of another row."""
        self.numbered = 0
        """Rows that could be read: the last number of an id."""
        self.prompts: list[Prompt] = []
        self.dropped: Counter[str] = Counter()
        self.truncated: Counter[str] = Counter()
        self.turns: Counter[str] = Counter()
        """Turns of the assistant in kept rows: trained on, and only read as context."""
        self.notes: Counter[str] = Counter()
        """What was done to rows that their user should know."""
        self.pairs = 0
        """Kept rows that are preference pairs, whether the rejected response is used or not."""
        self.without_response: list[str] = []
        """The locations of rows without a response, or without a rejected one, that need it."""
        self.source_of: dict[str, int] = {}
        """Which dataset of a mixture each prompt is from, by its id."""

    def with_ids(self, rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
        """(Id of the prompt, row); with `each_output` one for each output."""
        parts = self.dataset.parts()
        for row in rows:
            self.numbered += 1
            if not row.has_prompt:
                problem = (
                    "holds plain text, no prompt: give the file as data.text, or name the field with the "
                    f"prompt, data.{self.name}.fields.prompt"
                )
                self.reading.drop_read(RowError(row.location, problem, ""), "plain text, no prompt")
                continue
            examples = row.per_reference() if parts[row.source].each_output else (row,)
            for index, one in enumerate(examples, start=1):
                id = f"{self.name}:{self.numbered}" + (f":{index}" if index > 1 else "")
                self.source_of[id] = row.source
                yield id, one

    def add(self, chunk: Sequence[tuple[str, Row]]) -> None:
        """Tokenise some rows and keep those that can be used."""
        chunk = [(id, self._answered(row)) for id, row in chunk]
        usable = self._with_images([(id, row) for id, row in chunk if self._usable(row)])
        encoded = self._encoded([row for _, row in usable])
        others = self._encoded_others([row for _, row in usable])
        before = self._rows_before([row for _, row in usable])
        for (id, row), found, other, earlier in zip(usable, encoded, others, before, strict=True):
            refused = next((one for one in (found, other) if isinstance(one, RowError)), None)
            if refused is not None:
                self._refused(refused)
                continue
            assert isinstance(found, EncodedRow)
            prompt = self._for_teacher(self._to_prompt(id, row, found, earlier), row)
            if prompt is not None and isinstance(other, EncodedRow):
                add = self._with_rejected if REJECTED in self.needs else self._with_direct
                prompt = add(prompt, row, found, other)
            if prompt is not None:
                self.prompts.append(prompt)
                self.pairs += row.is_pair
                if prompt.response_ids is not None:
                    self.turns["trained on"] += found.trained_turns
                    self.turns["context"] += found.context_turns

    def _answered(self, row: Row) -> Row:
        """With `train_on: all` a conversation that nobody answers in the end is one up to its last answer."""
        if RESPONSES not in self.needs or self.config.train_on != "all" or row.unlabelled:
            return row
        shorter = up_to_last_answer(row)
        self.notes[ENDS_UNANSWERED] += shorter is not row
        return shorter

    def _with_images(self, rows: list[tuple[str, Row]]) -> list[tuple[str, Row]]:
        """The rows with their images opened, side by side; without those whose images cannot be."""
        shown = [row for _, row in rows if row.image_values]
        if not shown:
            return rows
        with ThreadPoolExecutor(min(8, len(shown))) as pool:
            found = iter(list(pool.map(self._opened, shown)))
        kept: list[tuple[str, Row]] = []
        for id, row in rows:
            one = next(found) if row.image_values else row
            if isinstance(one, RowError):
                self._refused(one)
            else:
                kept.append((id, one))
        return kept

    def _opened(self, row: Row) -> Row | RowError:
        try:
            self.encoder.check_reads_images(row)
            return opened(row, self.config.images)
        except RowError as error:
            return error

    def _rows_before(self, rows: Sequence[Row]) -> list[Row | None]:
        """For each the row with a response that was read last before it."""
        found = []
        for row in rows:
            found.append(self.before)
            self.before = row if row.has_response else self.before
        return found

    def _refused(self, error: RowError) -> None:
        """Count a row that cannot be encoded, or raise."""
        if error.reason in (UNSPELLABLE, NO_ROW_BEFORE):
            self.dropped[error.reason] += 1
        else:
            self.reading.drop_read(error, error.reason)

    def _usable(self, row: Row) -> bool:
        if row.asks_nothing:
            self.dropped["empty prompt"] += 1
            return False
        if self._has_what_is_needed(row):
            return True
        if row.unlabelled:
            self.dropped["unlabelled"] += 1
        elif self.config.no_response == "drop":
            lacks = "no reasoning before the answer" if REASONING in self.needs else "no preference pair"
            self.dropped[lacks if row.has_response else "no response"] += 1
        else:
            self.without_response.append(row.location)
        return False

    def _has_what_is_needed(self, row: Row) -> bool:
        if REJECTED in self.needs and not row.is_pair:
            return False
        if REASONING in self.needs and without_chain(row) is None:
            return False
        return row.has_response or RESPONSES not in self.needs

    def _encoded(self, rows: Sequence[Row]) -> list[EncodedRow | RowError]:
        """The rows as ids, as far as the length rules can need them."""
        return self.encoder.encode(rows, self.most_tokens)

    def _encoded_others(self, rows: Sequence[Row]) -> list[EncodedRow | RowError | None]:
        """The rejected responses, or the answers without their chain, rendered and tokenised as the response
        is; None where neither is needed."""
        if REJECTED in self.needs:
            return [*self._encoded([row.rejected_row() for row in rows])]
        if REASONING in self.needs:
            direct = [without_chain(row) for row in rows]
            return [*self._encoded([row for row in direct if row is not None])]
        return [None] * len(rows)

    def _with_rejected(
        self, prompt: Prompt, row: Row, chosen: EncodedRow, rejected: EncodedRow
    ) -> Prompt | None:
        """The prompt with its rejected response under the same length rules; None if it is dropped."""
        if rejected.prompt_ids != chosen.prompt_ids:
            problem = "as the template renders them, chosen and rejected response follow different prompts"
            self._refused(RowError(row.location, problem, "chosen and rejected of two prompts"))
            return None
        kept = self._kept_response(rejected, "rejected response")
        if kept is None:
            return None
        if kept == prompt.response_ids:
            self.dropped["chosen and rejected are the same tokens"] += 1
            return None
        if reason := self.teacher.cannot_read(prompt.token_ids, kept, prompt.teacher_ids, len(kept)):
            self.dropped[reason] += 1
            return None
        return replace(
            prompt,
            rejected_ids=kept,
            rejected_finished=kept == rejected.response_ids and row.rejected_finished,
            rejected_trained=None if rejected.trained is None else rejected.trained[: len(kept)],
        )

    def _with_direct(self, prompt: Prompt, row: Row, chain: EncodedRow, direct: EncodedRow) -> Prompt | None:
        """The prompt with its answer without the chain under the same length rules; None if it is dropped."""
        if direct.prompt_ids != chain.prompt_ids:
            problem = (
                "as the template renders them, the answer with reasoning and the one without follow "
                "different prompts; data.template: {kind: chat, reasoning: inline, empty_reasoning: omit} "
                "writes them alike"
            )
            self._refused(
                RowError(row.location, problem, "answers with and without reasoning of two prompts")
            )
            return None
        kept = self._kept_response(direct, "answer without its chain")
        return None if kept is None else replace(prompt, direct_ids=kept)

    def _to_prompt(self, id: str, row: Row, found: EncodedRow, before: Row | None) -> Prompt | None:
        config = self.config
        text, prompt_ids, response_ids = found.text, found.prompt_ids, found.response_ids
        if not prompt_ids:
            self.dropped["empty prompt"] += 1
            return None
        if len(prompt_ids) > config.max_prompt:
            rule = config.too_long.prompt
            truncated = None
            if rule != "drop" and found.answer is None:  # else the last turn is no part of the prompt
                truncated = truncate_prompt(row, self.encoder, config.max_prompt, rule)
            if truncated is None:
                self.dropped[IMAGES_TOO_LONG if row.images else "prompt too long"] += 1
                return None
            self.truncated["prompt"] += 1
            row, text, prompt_ids = truncated
        kept_ids = self._kept_response(found)
        if kept_ids is None and response_ids is not None:
            return None
        try:
            read = {name: self._read_by(name, row, found, before) for name in (MAIN, *self.contexts)}
        except RowError as error:
            self._refused(error)
            return None
        if () in read.values():
            self.dropped["empty prompt"] += 1
            return None
        fixed = RESPONSES in self.needs and kept_ids is not None
        room = len(kept_ids or ()) if fixed else config.max_response
        for ids in read.values():
            if reason := self.teacher.cannot_read(prompt_ids, kept_ids, ids, room):
                self.dropped[reason] += 1
                return None
        teacher_ids = read.pop(MAIN)
        return Prompt(
            id,
            prompt_ids,
            text,
            kept_ids,
            kept_ids == response_ids and row.finished,
            None if kept_ids is None or found.trained is None else found.trained[: len(kept_ids)],
            row.references if found.answer is None else (found.answer,),
            teacher_ids=teacher_ids,
            context_ids={name: ids for name, ids in read.items() if ids is not None},
            fields=row.prompt_fields(),
            facts=row.extra,
            images=found.images,
            response_images=found.response_images,
        )

    def _for_teacher(self, prompt: Prompt | None, row: Row) -> Prompt | None:
        """The prompt with the teacher that its row is for; None if it is for none and dropped."""
        if prompt is None or self.config.row_teacher is None or self.name != "train":
            return prompt
        try:
            return self.config.row_teacher.named(prompt, row.location)
        except RowError as error:
            self._refused(error)
            return None

    def _kept_response(self, found: EncodedRow, name: str = "response") -> tuple[int, ...] | None:
        """The response within the length limit; None if there is none, or it is dropped and counted."""
        if found.response_ids is None:
            return None
        limit, rule = self.config.max_response, self.config.too_long.response
        kept = truncate_response(found.response_ids, limit, rule, self.truncated, name)
        if kept is None:
            self.dropped[f"{name} too long"] += 1
        elif found.trained is not None and not any(found.trained[: len(kept)]):
            self.dropped["no token to train on within the length limit"] += 1
            return None
        return kept

    def _read_by(
        self, teacher: str, row: Row, found: EncodedRow, before: Row | None
    ) -> tuple[int, ...] | None:
        """The prompt as a teacher reads it: in its tokens, with its context; None if it is the student's.

        Raises:
            RowError: the teacher's template refuses the row, cannot read its response, or its context asks
                for what the row does not have.
        """
        own, context = self.encoder.teacher if teacher == MAIN else None, self.contexts.get(teacher)
        if own is None and context is None:
            return None
        if own is not None and own.differs_in_images and context is None:
            return self._with_own_image_tokens(own, row, found)
        if found.trained is not None:
            problem = (
                "a response of several turns needs a teacher that reads the student's prompts: with its "
                "tokenizer and its chat template"
            )
            raise RowError(row.location, problem, "several turns for a teacher with prompts of its own")
        return (own or self.encoder).prompt(row if context is None else in_context(context, row, before))[1]

    def _with_own_image_tokens(self, own: Encoder, row: Row, found: EncodedRow) -> tuple[int, ...] | None:
        """The prompt of a teacher that reads all but images as the student does; None if it is the student's.

        Raises:
            RowError: the two write the response together, or it shows images of its own.
        """
        if not row.images:
            return None
        [read] = own.encode([row], self.most_tokens)
        if isinstance(read, RowError):
            raise read
        if (read.prompt_ids, read.response_ids) == (found.prompt_ids, found.response_ids):
            return None
        if self.teacher.mixed or read.response_ids != found.response_ids:
            why = "write a text together" if self.teacher.mixed else "are compared where images stand"
            problem = f"student and teacher read images as different tokens, and they {why}"
            raise RowError(row.location, problem, "image tokens of student and teacher differ")
        return read.prompt_ids

    def account(self) -> Account:
        """What became of the rows."""
        found = Account(numbered=self.numbered, pairs=self.pairs)
        found.add_reading(self.reading)
        found.dropped, found.truncated, found.turns = self.dropped, self.truncated, self.turns
        found.without_response = self.without_response
        found.notes = self.notes + self.encoder.take_notes()
        found.add_prompts(self.prompts)
        found.teachers.update(rows_by_teacher(prompt.facts for prompt in self.prompts))
        found.kept_by_part.update(str(self.source_of.get(prompt.id, 0)) for prompt in self.prompts)
        return found


def check_responses(name: str, missing: Sequence[str], needs: Collection[str]) -> None:
    """Raise if rows of the set `name` lack a response that they need.

    Raises:
        DataError: names the first of them.
    """
    if not missing:
        return
    first = ", ".join(missing[:3])
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    path = path_of(name)
    way_out = ", or choose a method whose responses are generated" if name == "train" else ""
    lacks = "no response" + (" or no rejected one" if REJECTED in needs else "")
    asked = "a preference pair" if REJECTED in needs else "one"
    if REASONING in needs:
        lacks, asked = "no reasoning before the answer", "that"
    raise DataError(
        f"{first}{more}: {lacks}, but {path} needs {asked} in each row here. "
        f"Add them, or set data.no_response: drop{way_out}"
    )


def path_of(name: str) -> str:
    """Where the configuration names the rows of a set."""
    return {"eval": "evaluate.data"}.get(name, f"data.{name}")
