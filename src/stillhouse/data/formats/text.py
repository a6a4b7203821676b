"""Plain text."""

from __future__ import annotations

from stillhouse.data.formats.base import RawRow, RowFormat, register
from stillhouse.data.formats.values import other_fields, read_string
from stillhouse.data.rows import Fields, Row


@register
class TextFormat(RowFormat):
    """Plain text, for the language-model loss on `data.text`."""

    name = "text"
    precedence = 100
    reads = "`text`"
    example = '{"text": "Figs ripen in late summer."}'
    parsed = Row("example", text="Figs ripen in late summer.")

    def matches(self, raw: RawRow, fields: Fields) -> bool:
        return raw.get(fields.text or "text") is not None

    def read(self, raw: RawRow, fields: Fields, location: str) -> Row:
        name = fields.text or "text"
        return Row(location, text=read_string(raw[name], name, location), extra=other_fields(raw, name))
