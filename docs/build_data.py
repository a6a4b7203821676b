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
  bad_rows: drop                               # leave out and count what cannot be read; default: refuse
  ignore: [category]                           # fields that are not read, and about which nothing is said
```

## Row formats

A row is read by the first of these formats that it has, so a file may mix them. data.json in the run folder
says how many rows had which, and by which fields that was told. A format that is not listed is one file in
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

## Fields that nothing uses, rows that cannot be read

A text field that nothing reads is told once with its share of rows; `data.ignore: [category]` silences that.
A field that would change the prompt and that the format does not read (`context` beside `messages`) is
refused unless it is named there. Ignored fields stay among the facts of a row.

A row that cannot be read or rendered stops the run with its line, field and reason. `data.bad_rows: drop`
leaves such rows out; they are counted by reason in data.json and in every place that shows the data, and the
first of them are shown. A key twice in one object, half of a surrogate pair, numbers beyond 4,300 digits and
more than 200 levels of nesting are such rows too. A row whose prompt is blank, or too long, is dropped and
counted in any case.

## Files

{datasets}

The ending tells the kind: .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, .txt, also packed as .gz,
.zst, .bz2 or .xz. A pattern (`shards/train-*.jsonl`) reads all files that match, in the order of their names.
A folder is a dataset saved by `save_to_disk`, or data files, of which `split` chooses by their names. Nothing
on disk is looked for on the hub. Text is UTF-8, with or without a byte-order mark.

## Large sets

A set is large from 8 MiB of files on, or from 20,000 rows of the `datasets` library. Its rows are read as a
stream, tokenised by several processes through `datasets`, and stay on disk in Arrow files: a process holds
16 bytes of every 1,024 rows, and the pages of the files that it reads. What 2,000,000 rows and a row of 40
MB take is measured in [scale.md](scale.md#writing-and-curating-over-shards).

```yaml
data:
  train: "s3://bucket/shards/train-*.jsonl"    # or a path on disk, a folder, a name on the hub
  workers: 8                                   # default: one a processor, at most 16
  token_cache: /scratch/tokens                 # default: true, in the cache of datasets; false: none
```

**Workers.** Prompts, their order, reports and messages are those of one process; of several faults the
first is told. Where processes are not forked (macOS, Python 3.14), and where `data.teacher_context` shows
the row before, one process tokenises unless, in the first case, `workers` says more. Of the processes of a
run on one machine one tokenises, and the others wait for it; with `token_cache: false` each does, with its
share of the processors.

**Cache.** The next run reads the tokens if nothing has changed that they depend on: the content of the
files (not their paths), the rules under `data`, the tokenizers with their chat templates, what the method
asks of a row, the versions of transformers and tokenizers, and the code of Stillhouse that reads rows.
Templates that write the date hold for one day. data.json and warnings are the same, from the cache or not.
`true` means the folder `stillhouse-tokens` in `HF_DATASETS_CACHE` (by default
`~/.cache/huggingface/datasets`): some 430 bytes for a row of 50 tokens. `stillhouse cache info --tokens
[FOLDER]` shows what is there, of which files, how large and when it was last read; `cache prune --tokens
--limit 20GB` deletes what was read longest ago, and never what a running job reads; `cache verify --tokens`
reads it all. Nothing is deleted by itself. An entry is written in a folder of its own and renamed when it
is whole, so a killed process leaves none; its digests are checked when it is read, and what is damaged is
made again. Entries hold data and nothing that could run, so a cache may be shared.

Not kept are: small sets, sets with images (which are in memory, as images may change: rows hold them by
reference and never by pixels), rows in a Python list, and rows with values that are no data,
such as timestamps of pandas; of the last a warning says so.

While it is tokenised, a set takes about twice its size on disk, in the cache's folder or, without one, in
`TMPDIR`.

## Mixtures

A list of datasets is read as one, in its order:

```yaml
data:
  train:
    - {{path: chat.jsonl, weight: 0.5}}
    - {{path: "maths-*.parquet", weight: 2, fields: {{prompt: task, response: proof}}}}
```

`weight` says how often the rows of a dataset are in an epoch: with 2 each is there twice, with 0.5 every
second one, with 1.5 each once and every second one twice. Row k comes floor(k w) - floor((k - 1) w) times:
the same rows in each epoch, on every machine and after a resume. `limit`, `labelled`, `fields` and
`each_output` belong to each dataset. data.json has rows, weight and kept prompts of each under `sources`.

## Images

Rows for vision-language models have their images in a column `images` or `image` (others: `fields:
{{images: ...}}`), or in content parts of turns (`image_url`, `image`, `input_image`). A value is a path
relative to the data file (or to `data.images.folder`), a data URL or base64, `{{bytes, path}}` as
`datasets.Image` stores it, bytes, or an image of pillow. Images of a column stand where the prompt has
`<image>` (LLaVA) or content parts of the type `image` without a value (TRL), else all before the first
question; as many places as images, or the row is a bad row. The line break between a leading or trailing
`<image>` and the text is the mark's. Rows of text may be mixed in. Images in answers are refused.

```yaml
data:
  train: {{path: llava.json, fields: {{images: image}}}}
  max_prompt: 1024                     # image tokens of the model count
  images: {{max_side: 1024, min_side: 8, allow_urls: true, url_timeout: 10}}
  bad_rows: drop                       # missing and broken images: named, counted, left out
```

Images are decoded when a processor reads them, in one way: upright by EXIF, RGB, transparency over white,
16-bit grey divided by 256, colour profiles not applied, the first frame, shrunk to `max_side` (2048) or
`max_pixels`. Their digest is that of these pixels. URLs are refused unless `allow_urls`, and then bounded
by `url_timeout` and `max_bytes`. Images of more than `max_source_pixels` are not decoded. An image that has
changed since its row was read stops the run.

Every template carries images: chat templates get content parts where they take them, other templates the
model's image token, before the question on a line of its own. `too_long.prompt` cuts text only, never an
image; what does not fit then is counted as `prompt with images too long`. A teacher with other image tokens
reads its own prompt. A model of text alone refuses rows with images; `data.ignore: [images]` reads them
without.

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
