"""Whole rounds of responses: written once for all prompts, kept on disk, read back by a resumed run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillhouse.engines.base import Sampling
from stillhouse.errors import DataError
from stillhouse.files import write_jsonl
from stillhouse.responses.base import Context, derived_seed
from stillhouse.responses.writer import Writer
from stillhouse.types import Prompt, Response

FORMAT = 1


class Rounds:
    """The rounds of one writer. Only the newest is held in memory.

    A round is a file `WRITER-NUMBER.jsonl`: a header (who, seed, sampling, student version), then one line
    for each prompt. The header must fit what is asked for, so a file of another run or setting is never used.
    """

    def __init__(self, context: Context, writer: Writer, sampling: Sampling | None) -> None:
        self._prompts = context.prompts
        self._folder = context.folder
        self._seed = context.seed
        self._writer = writer
        self._sampling = sampling
        self._number = -1
        self._responses: dict[str, Response] = {}

    def responses(self, number: int) -> dict[str, Response]:
        """The responses of round `number` by prompt id, written now unless they are on disk."""
        if number != self._number:
            path = self._folder / f"{self._writer.source}-{number}.jsonl"
            header = self._header(number)
            responses = read(path, header, self._prompts)
            if responses is None:
                responses = self._write(number)
                save(path, {**header, "student_version": responses[0].student_version}, responses)
            self._responses = {response.prompt.id: response for response in responses}
            self._number = number
        return self._responses

    def _write(self, number: int) -> list[Response]:
        title = f"{self._writer.source.capitalize()} writes round {number + 1}"
        seed = derived_seed(self._seed, self._writer.source, number)
        return self._writer.write(self._prompts, seed, self._sampling, title)

    def _header(self, number: int) -> dict[str, Any]:
        sampling = self._writer.settings(self._sampling)
        return {
            "format": FORMAT,
            "source": self._writer.source,
            "round": number,
            "seed": self._seed,
            "prompts": len(self._prompts),
            "sampling": sampling.model_dump(mode="json"),
        }


def save(path: Path, header: dict[str, Any], responses: Sequence[Response]) -> None:
    """Write a round, atomically."""
    rows = ({"prompt": r.prompt.id, "token_ids": r.token_ids, "finished": r.finished} for r in responses)
    write_jsonl(path, [header, *rows])


def read(path: Path, header: dict[str, Any], prompts: Sequence[Prompt]) -> list[Response] | None:
    """Read a round back; None if there is none or it was written for something else.

    Raises:
        DataError: the header fits but the lines do not; somebody changed the file.
    """
    if not path.exists():
        return None
    first, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if {key: first.get(key) for key in header} != header:
        return None
    by_id = {prompt.id: prompt for prompt in prompts}
    if len(lines) != len(prompts) or any(line["prompt"] not in by_id for line in lines):
        raise DataError(
            f"{path}: has {len(lines)} responses, not one for each of {len(prompts)} prompts. "
            "Delete the file to write it again."
        )
    version = first.get("student_version")
    return [
        Response(by_id[line["prompt"]], tuple(line["token_ids"]), header["source"], line["finished"], version)
        for line in lines
    ]
