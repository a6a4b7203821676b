"""What became of the rows of a dataset: counted for each chunk of them, added up in their order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from stillhouse.core.types import Prompt
from stillhouse.data.reading import SHOWN_BAD_ROWS, Reading


@dataclass
class Account:
    """Counts of rows and of what they became. Those of two chunks add up, the earlier one first.

    Example: `Account(rows=2, numbered=2, dropped=Counter({"empty prompt": 1}))`
    """

    rows: int = 0
    """Rows that were read, those that were dropped included."""
    numbered: int = 0
    """Rows that could be read: the numbers in the ids of prompts."""
    unlabelled: int = 0
    pairs: int = 0
    """Kept rows that are preference pairs."""
    with_response: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    rejected_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows that were read and not kept, by reason."""
    unread: Counter[str] = field(default_factory=Counter)
    """Rows that could not be read, by reason."""
    truncated: Counter[str] = field(default_factory=Counter)
    turns: Counter[str] = field(default_factory=Counter)
    teachers: Counter[str] = field(default_factory=Counter)
    """Prompts by the teacher that their rows name."""
    notes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    """Rows with text in a field that nothing uses, by field."""
    read_by_part: Counter[str] = field(default_factory=Counter)
    """Of several mixed datasets, by its number: the rows of each."""
    kept_by_part: Counter[str] = field(default_factory=Counter)
    no_data: Counter[str] = field(default_factory=Counter)
    """Values of facts that are no data, by their type."""
    format_fields: dict[str, list[str]] = field(default_factory=dict)
    """The fields by which the first row of a format was recognised."""
    first_unread: list[str] = field(default_factory=list)
    """What is wrong with the first rows that could not be read."""
    without_response: list[str] = field(default_factory=list)
    """Where rows are that lack the response that they need."""

    def add(self, later: Account) -> None:
        """Add the account of rows that come after these."""
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(later, one.name)
            if isinstance(mine, int):
                setattr(self, one.name, mine + theirs)
            elif isinstance(mine, Counter):
                mine.update(theirs)
            elif isinstance(mine, dict):
                for name, value in theirs.items():
                    mine.setdefault(name, value)
            else:
                mine.extend(theirs)
        del self.first_unread[SHOWN_BAD_ROWS:]

    def add_prompts(self, prompts: Iterable[Prompt]) -> None:
        """Count prompts and their tokens."""
        for prompt in prompts:
            self.with_response += prompt.response_ids is not None
            self.prompt_tokens += len(prompt.token_ids)
            self.response_tokens += len(prompt.response_ids or ())
            self.rejected_tokens += len(prompt.rejected_ids or ())

    def add_reading(self, reading: Reading) -> None:
        """Take over what a reading has counted."""
        self.rows += reading.rows
        self.unlabelled += reading.unlabelled
        self.unread.update(reading.dropped)
        self.formats.update(reading.formats)
        self.unused.update(reading.unused)
        self.read_by_part.update({str(part): count for part, count in reading.rows_by_part.items()})
        self.format_fields |= {name: list(found) for name, found in reading.format_fields.items()}
        self.first_unread += reading.first_dropped

    def restore(self, reading: Reading) -> Reading:
        """The account of a reading in one that is empty, for what it tells of itself."""
        reading.rows, reading.unlabelled = self.rows, self.unlabelled
        reading.dropped, reading.formats, reading.unused = self.unread, self.formats, self.unused
        reading.format_fields = {name: tuple(found) for name, found in self.format_fields.items()}
        reading.first_dropped = self.first_unread
        return reading

    @property
    def all_dropped(self) -> dict[str, int]:
        """Rows that are not kept, by reason."""
        return dict(self.dropped + self.unread)

    def as_json(self) -> dict[str, Any]:
        """Its values for a JSON file."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The account that `as_json` wrote."""
        empty = cls()
        return cls(**{name: type(getattr(empty, name))(value) for name, value in values.items()})
