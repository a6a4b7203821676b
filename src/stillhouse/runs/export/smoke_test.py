"""The script in an exported folder that loads it and compares an answer with the recorded one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from stillhouse.errors import EngineError
from stillhouse.files import atomic
from stillhouse.runs.export.student import Example

FILE = "smoke_test.py"
TEMPLATE = Path(__file__).with_name(f"{FILE}.j2")


@dataclass(frozen=True, slots=True)
class SmokeTest:
    """How a folder of one format is loaded and asked.

    Example: `SmokeTest("transformers", "from transformers import ...", "model = ...\\nanswer = ...")`
    """

    needs: str
    """The packages, in words."""
    imports: str
    code: str
    """Lines that set `answer` from `folder`, `PROMPT` and `MAX_TOKENS`."""


def write_smoke_test(folder: Path, test: SmokeTest, example: Example) -> None:
    """Write the script of a folder."""
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    with atomic(folder / FILE) as handle:
        handle.write(
            template.render(
                needs=test.needs,
                imports=test.imports,
                code=test.code,
                prompt=repr(example.prompt),
                answer=repr(example.answer),
                max_tokens=example.max_tokens,
            )
        )


def run_smoke_test(folder: Path) -> None:
    """Run the script of a folder in a process of its own, as its user will.

    Raises:
        EngineError: it does not pass; with its last words.
    """
    done = subprocess.run(
        [sys.executable, FILE],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()[-5:]
        raise EngineError("the export's smoke test failed, so nothing was exported: " + "\n".join(words))
