"""Rows of the published instruction sets, as their files have them.

- Dolly, Self-Instruct (flattened), Vicuna: `{instruction, input, output}` or `{instruction, input, outputs}`
- MiniLLM's processed files (dolly, self-inst, vicuna, sinst/11_, uinst/11_): `{prompt, output}`, the prompt
  in Alpaca's words already, with `<n>` for a line break, the output a text or a list
- Unnatural Instructions (core) and Self-Instruct's user-oriented tasks: `{instruction, instances: [{input,
  output}]}`, one question for each instance
- Super-NaturalInstructions: `{Definition, Instances: [{input, output: [...]}]}`, one task file a line
- MT-bench: `{turns: [...], reference}`; the first turn is asked
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from stillhouse.data.formats import read_row
from stillhouse.data.rows import Fields, Row
from stillhouse.errors import DataError

ALPACA = re.compile(
    r"\ABelow is an instruction that describes a task.*?### Instruction:\n(?P<instruction>.*?)"
    r"(?:\n\n### Input:\n(?P<input>.*?))?\n\n### Response:\n?\Z",
    re.DOTALL,
)


def instruction_rows(raw: Mapping[str, Any], fields: Fields, where: str) -> list[Row]:
    """The questions of one row.

    Raises:
        DataError: the row has none of the shapes.
    """
    if fields.model_dump(exclude_none=True):
        return [read_row(raw, fields, where)]
    if isinstance(raw.get("Instances"), list):
        definition = raw.get("Definition", "")
        words = definition[0] if isinstance(definition, list) and definition else definition
        return list(_instances(str(words), raw["Instances"], fields, where))
    if isinstance(raw.get("instances"), list):
        return list(_instances(str(raw.get("instruction", "")), raw["instances"], fields, where))
    if isinstance(raw.get("turns"), list) and raw["turns"]:
        reference = raw.get("reference")
        answers = reference[:1] if isinstance(reference, list) else []
        return [read_row({"instruction": raw["turns"][0], "outputs": answers}, fields, where)]
    if "instruction" not in raw and isinstance(raw.get("prompt"), str):
        return [read_row(without_template(raw), fields, where)]
    return [read_row(raw, fields, where)]


def _instances(instruction: str, instances: Iterable[Any], fields: Fields, where: str) -> Iterable[Row]:
    for number, instance in enumerate(instances, start=1):
        if not isinstance(instance, Mapping):
            raise DataError(f"{where}: instance {number} should be an object, got {instance!r:.80}")
        row = {"instruction": instruction, "input": instance.get("input") or ""}
        if instance.get("output") is not None:
            row["output"] = instance["output"]
        yield read_row(row, fields, f"{where} (instance {number})")


def without_template(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row whose prompt is in Alpaca's words already, taken apart so that any template can be used.

    Alpaca's own gives the same words back.
    """
    words = raw["prompt"].replace("<n>", "\n")
    found = ALPACA.match(words)
    if found is None:
        return {**raw, "prompt": words}
    rest = {key: value for key, value in raw.items() if key != "prompt"}
    return {**rest, "instruction": found["instruction"], "input": found["input"] or ""}
