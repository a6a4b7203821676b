"""What a configuration may say about the data of a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from stillhouse.config import FilePath, ListOf, StrictConfig
from stillhouse.data.chat import TrainOn
from stillhouse.data.datasets import DatasetField
from stillhouse.data.images import ImageOptions
from stillhouse.data.reading import BadRows, Reading
from stillhouse.data.row_teachers import RowTeacher
from stillhouse.data.teacher_context import TeacherContexts
from stillhouse.data.templates import TEMPLATES, Auto
from stillhouse.data.tokenise import TooLong

TemplateField = TEMPLATES.field()
PositiveInt = Annotated[int, Field(ge=1)]


class DataConfig(StrictConfig):
    """The datasets of a run, and how their rows become prompts."""

    train: DatasetField
    """Training prompts, with responses if the method needs them."""
    valid: DatasetField | None = None
    """Held-out rows with responses, for the validation loss and the choice of the best checkpoint."""
    template: TemplateField = Auto()  # type: ignore[valid-type]
    """Renders a row as a prompt: auto, alpaca, chat, plain or custom."""
    teacher_template: TemplateField | None = None  # type: ignore[valid-type]
    """The template of the teacher's prompts. Default: with `template: auto` or `chat` the chat template of
    the teacher's own tokenizer, where it has one; otherwise the student's prompts. A teacher with another
    vocabulary reads `template` with its own tokenizer."""
    teacher_context: TeacherContexts = Field(default_factory=dict)
    """What a teacher reads in the place of the prompt's text in rows of data.train, where it is to know more
    than the student, by the teacher's name (a text alone is that of `main`): a format string with `{prompt}`,
    `{response}`, `{reasoning}`, any other column of the row, and `{other_prompt}` and `{other_response}` of
    the row before it."""
    train_on: TrainOn = "last"
    """Which turns of the assistant are trained on: the last of a conversation, or all. With `all` the prompt
    ends before the first of them, also where responses are generated; what users and tools say between them
    is read and not trained on, and turns behind the last answer are left out. A turn of `weight` 0 is never
    trained on."""
    max_prompt: PositiveInt = 512
    """Maximum number of tokens of a prompt, template included."""
    max_response: PositiveInt = 512
    """Maximum number of tokens of a response, its end-of-sequence token included."""
    too_long: TooLong = TooLong()
    """What happens to longer rows."""
    no_response: Literal["error", "drop"] = "error"
    """What happens to a row without a response if the method needs one, or one that is no preference pair if
    the method needs pairs."""
    bad_rows: BadRows = "refuse"
    """What happens to a row that cannot be read or rendered: `refuse` stops and names it, `drop` leaves it
    out and counts it by its reason."""
    row_teacher: RowTeacher | None = None
    """Which of several teachers a training row is for, by the value of a column; None: by its column
    `teacher`."""
    images: ImageOptions = ImageOptions()
    """How the images of rows are read. Only vision-language models read rows with images; for others they are
    bad rows."""
    ignore: ListOf[str] = ()
    """Fields of rows that are read as if they were not there; nothing is said about them."""
    text: DatasetField | None = None
    """Plain text for an additional language-model loss."""
    text_block: Annotated[int, Field(ge=2)] = 512
    """Number of tokens of each block that plain text is split into."""

    workers: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Processes that tokenise a large set of data.train or data.valid. null: as many as there are processors,
    at most 16; a small set is tokenised by one."""
    token_cache: bool | FilePath = True
    """The folder in which the tokens of large sets are kept for the next run, which reads them if rows,
    tokenizer, templates and settings are the same. true: in the cache of `datasets` (HF_DATASETS_CACHE);
    false: none."""

    def reading(self) -> Reading:
        """How datasets are read, with an account that is still empty."""
        return Reading(
            self.bad_rows,
            self.ignore,
            "Mend the row, or leave out such rows and count them: data.bad_rows: drop",
            used=() if self.row_teacher is None else (self.row_teacher.column,),
        )
