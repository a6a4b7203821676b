"""Arguments that several commands share, and configuration errors in terms of a command's own options."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from stillhouse.console.text import filtered_records
from stillhouse.core.distributed import rank_and_size
from stillhouse.errors import ConfigError, DataError, Fault
from stillhouse.urls import path_at

RunFile = Annotated[
    Path, typer.Argument(help="YAML file of the run.", metavar="RUN.YAML", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Values that override the file, such as train.lr=1e-4.", metavar="NAME=VALUE"),
]
TemplateOption = Annotated[
    str | None,
    typer.Option(
        help="Prompt template: auto, alpaca, chat, plain, or a template with options as YAML, such as "
        "'{kind: custom, without_input: \"Q: {instruction}\"}', or a YAML file of that. Default: that of the "
        "run which made the model, else auto.",
        show_default=False,
    ),
]
ShardOption = Annotated[
    str | None,
    typer.Option(
        help="Only share i of n, counted from 0, such as 0/8 to 7/8; torchrun sets it.",
        metavar="I/N",
        show_default=False,
    ),
]

RayOption = Annotated[
    int | None,
    typer.Option(help="So many shards, each a task of Ray Data.", min=1, metavar="N", show_default=False),
]


def stage_output(help: str) -> Any:
    """The option for a file of rows that a command writes, on disk or in a store."""
    return typer.Option("--output", "-o", parser=path_at, metavar="PATH", help=help, show_default=False)


RunFolders = Annotated[
    list[Path],
    typer.Argument(help="Run folders, or folders that contain some.", metavar="FOLDER", show_default=False),
]
LIVE_TEACHER = "teacher: {kind: live, path: FOLDER}"
"""What hints say of a configuration where a command has an option for the teacher."""


@contextlib.contextmanager
def faults_as_options(options: Mapping[str, str]) -> Iterator[None]:
    """Name the command's options in errors and warnings about a configuration that was built from them.

    An option that stands for two fields of the configuration is reported once.

    Args:
        options: field of the configuration -> option, such as {"student.path": "MODEL"}; with "data.train".
    """
    names = "|".join(re.escape(name) for name in sorted(options, key=len, reverse=True))

    def renamed(record: logging.LogRecord) -> bool:
        record.msg = re.sub(rf"\b({names})\b", lambda found: options[found[0]], record.getMessage())
        record.args = None
        return True

    try:
        with filtered_records(renamed):
            yield
    except ConfigError as error:
        raise ConfigError(*dict.fromkeys(_as_option(fault, options) for fault in error.faults)) from error
    except DataError as error:
        raise DataError(str(error).replace("data.train", options["data.train"])) from error


def _as_option(fault: Fault | str, options: Mapping[str, str]) -> Fault | str:
    if isinstance(fault, Fault):
        path = options.get(fault.path, fault.path.replace("evaluate.tasks", "--tasks"))
        hint = "Set a lower --max-tokens." if path == "--max-tokens" and fault.hint else fault.hint
        if hint and "teacher.path" in options:
            hint = hint.replace(LIVE_TEACHER, f"{options['teacher.path']} FOLDER")
        return replace(fault, path=path, hint=hint, origin=None)
    field, _, rest = fault.partition(": ")
    if field in options:
        return f"{options[field]}: {rest}"
    return fault.replace("evaluate.tasks", "--tasks")


def template_choice(text: str | None) -> str | dict[str, Any] | None:
    """The value of --template: a name, or a template with its options, written out or in a file.

    Raises:
        ConfigError: it is not YAML, or the file cannot be read.
    """
    from stillhouse.config.strict_yaml import parse_value, read

    if text is None:
        return None
    if text.endswith((".yaml", ".yml")):
        found, _ = read(text)
        return found.get("template", found) if set(found) == {"template"} else found
    if not text.lstrip().startswith("{"):
        return text
    try:
        value: dict[str, Any] = parse_value(text)
    except ConfigError as error:
        raise ConfigError(Fault("--template", f"is not YAML ({error})", got=text)) from error
    return value


def shard_choice(text: str | None, ray: int | None) -> tuple[int, int]:
    """Index and count of --shard; without it those of torchrun, or the only one.

    Raises:
        ConfigError: it is not `i/n` with i from 0 to n - 1, or there is --ray too.
    """
    if text is None:
        index, count = rank_and_size()
    else:
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        index, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not index < count:
        allowed = f"0/{count} to {count - 1}/{count}" if count else "i/n, such as 0/8 to 7/8"
        raise ConfigError(Fault("--shard", "is none of n shards, counted from 0", got=text, allowed=allowed))
    if ray is not None and (text is not None or count > 1):
        raise ConfigError(
            Fault("--ray", "starts all shards, so it cannot be combined with --shard or with torchrun")
        )
    return index, count
