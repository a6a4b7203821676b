"""Writes docs/data.md: row formats, kinds of files and templates from their classes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

from stillhouse.data import DATASETS, TEMPLATES
from stillhouse.data.formats import FORMATS
from stillhouse.data.rows import Fields

PAGE = """# Data

This page is generated from the classes by `python docs/build.py`; edit those.

```yaml
data:
  train: rows.jsonl                            # a path is enough if its ending tells the kind
  valid: {{kind: hf, path: org/name, split: validation, fields: {{prompt: query, response: reply}}}}
  template: chat
```

## Row formats

A row is read by the first of these formats that it has. A format that is not listed is one file in
`src/stillhouse/data/formats`.

{formats}

Where the table says "the response", it is looked for in `outputs`, `output`, `response`, `completion`,
`answer` and `answers`. It may be a list: the first is trained on, all are references for the evaluation, and
`each_output: true` trains on each. Rows without a response are prompts, for methods that generate
responses. Reasoning is read from `reasoning_content`, `reasoning` or `thinking`. Numbers are read as text. A
field that would change the prompt (a system message, context, history, tools) is read or the row is refused;
Other fields are kept for tasks and filters that need them, such as the tests of a programming
task.

For rows in another format, `fields` names the fields:

{fields}

## Files

{datasets}

## Templates

`data.template` renders a row as the text of a prompt.

{templates}
"""


def pages() -> dict[str, str]:
    """The page by its path below docs/."""
    return {
        "data.md": PAGE.format(
            formats=table(
                ("format", "what it is", "fields that it reads", "example"),
                ((f.name, summary(type(f)), f.reads, f"`{f.example}`") for f in FORMATS),
            ),
            fields=table(
                ("`fields.`", "the field with"),
                (
                    (f"`{name}`", (info.description or "").removeprefix("The field with "))
                    for name, info in Fields.model_fields.items()
                ),
            ),
            datasets=table(
                ("kind", "what it is"), ((f"`{kind}`", summary(DATASETS[kind])) for kind in DATASETS.kinds())
            ),
            templates=table(
                ("kind", "what it renders"),
                ((f"`{kind}`", summary(TEMPLATES[kind])) for kind in TEMPLATES.kinds()),
            ),
        )
    }


def summary(cls: type) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines)
