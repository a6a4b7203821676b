"""Row formats: each is detected by its example and reads it; a new one is a class and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from tests.conftest import ROOT, script

from stillhouse.config.strict_yaml import parse
from stillhouse.data import DataConfig
from stillhouse.data.formats import FORMATS, RowFormat, read_row, register
from stillhouse.data.formats.base import RawRow
from stillhouse.data.formats.values import read_string
from stillhouse.data.rows import Fields, Row
from stillhouse.errors import DataError


@pytest.mark.parametrize("row_format", FORMATS, ids=lambda row_format: row_format.name)
def test_a_format_is_detected_by_its_example_and_reads_it(row_format: RowFormat) -> None:
    raw = json.loads(row_format.example)
    first = next(known for known in FORMATS if known.matches(raw, Fields()))
    assert first is row_format
    row = read_row(raw, Fields(), "example")
    assert row == row_format.parsed
    assert row.extra == row_format.parsed.extra
    assert row.format == row_format.name
    assert row_format.__doc__


@pytest.mark.parametrize("row_format", FORMATS, ids=lambda row_format: row_format.name)
def test_what_a_format_reads_is_a_prompt_that_reads_back_the_same(row_format: RowFormat) -> None:
    row = row_format.parsed
    if row.text is not None and not row.messages:
        return
    again = read_row(row.prompt_fields(), Fields(), "example")
    assert (again.instruction, again.input, again.messages) == (row.instruction, row.input, row.messages)
    assert again.with_user_text("x").user_text == "x"


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ({"messages": [], "prompt": "p"}, "messages"),
        ({"messages": "none", "instruction": "i", "prompt": "p"}, "instruction/input/output"),
        ({"question": "q", "prompt": "p"}, "prompt/response"),
        ({"text": "t", "question": "q"}, "question/answer"),
        ({"text": "t", "output": "o"}, "text"),
    ],
)
def test_of_several_formats_the_first_by_precedence_reads_the_row(raw: RawRow, name: str) -> None:
    assert next(known.name for known in FORMATS if known.matches(raw, Fields())) == name


def test_prompt_and_response_fields_combine_freely() -> None:
    for prompt in ("instruction", "prompt", "question"):
        for response in ("outputs", "output", "response", "completion", "answer"):
            row = read_row({prompt: "I", "input": "X", response: "O", "id": 3}, Fields(), "here")
            assert row == Row("here", instruction="I", input="X", response="O", references=("O",))
            assert row.extra == {"id": 3}


@pytest.fixture
def _restored() -> Iterator[None]:
    before = list(FORMATS)
    yield
    FORMATS[:] = before


@pytest.mark.usefixtures("_restored")
def test_a_new_format_is_one_class() -> None:
    with pytest.raises(
        DataError,
        match=r"understood are prompt/responses/scores, .*messages, .*question/answer, .* and text\. Name",
    ):
        read_row({"dialogue": "hi"}, Fields(), "here")

    @register
    class DialogueFormat(RowFormat):
        """One turn in a field called `dialogue`."""

        name = "dialogue"
        precedence = 25
        reads = "`dialogue`"
        example = '{"dialogue": "hi"}'
        parsed = Row("example", instruction="hi")

        def matches(self, raw: RawRow, fields: Fields) -> bool:
            return "dialogue" in raw

        def read(self, raw: RawRow, fields: Fields, location: str) -> Row:
            return Row(location, instruction=read_string(raw["dialogue"], "dialogue", location))

    assert read_row({"dialogue": "hi", "prompt": "no"}, Fields(), "here") == Row("here", instruction="hi")
    with pytest.raises(DataError, match=r"instruction/input/output, dialogue, system_prompt"):
        read_row({"foo": "hi"}, Fields(), "here")
    page = script(ROOT / "docs" / "build_data.py").pages()["data.md"]
    assert '| dialogue | One turn in a field called `dialogue`. | `dialogue` | `{"dialogue": "hi"}` |' in page
    with pytest.raises(ValueError, match="the name or the precedence of DialogueFormat"):
        register(DialogueFormat)


def test_the_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert script(ROOT / "docs" / "build_data.py").pages() == {"data.md": page}, "run: make docs"
    first, large, mixed, *_ = (
        DataConfig.model_validate(parse(text, "data.md")[0]["data"])
        for text in re.findall(r"```yaml\n(data:.*?)```", page, flags=re.DOTALL)
    )
    assert (first.train.kind, first.valid and first.valid.fields.prompt) == ("jsonl", "query")
    assert (large.workers, str(large.token_cache)) == (8, "/scratch/tokens")
    assert [(one.kind, one.weight) for one in mixed.train.parts()] == [("jsonl", 0.5), ("parquet", 2.0)]
