"""An exported student as transformers, vLLM and most others load it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from stillhouse.models.readers import auto_class
from stillhouse.runs.export.config import ExportConfig
from stillhouse.runs.export.description import write_description
from stillhouse.runs.export.smoke_test import FILE, SmokeTest, write_smoke_test
from stillhouse.runs.export.student import FinishedStudent

KEPT = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken",
    "chat_template*", "*processor_config.json", "stillhouse.json", "LICEN[CS]E*", "NOTICE*",
)  # fmt: skip
"""Files of a student's folder that belong to every export of it: tokenizer, template, processor, licences."""

_IMPORTS = "from transformers import {auto_class}, AutoTokenizer"
_CODE = """\
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto_class}.from_pretrained(folder, dtype="auto")
inputs = tokenizer(PROMPT, return_tensors="pt"{options})
output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS)
answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)"""
_USAGE = """\
```python
from transformers import {auto_class}, AutoTokenizer

folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto_class}.from_pretrained(folder, dtype="auto")
```

`smoke_test.py` asks it one prompt."""


def write_safetensors(student: FinishedStudent, config: ExportConfig, folder: Path) -> None:
    """Write weights, tokenizer, generation config, template, card and smoke test."""
    student.model.save_pretrained(folder)
    copy_kept(student.folder, folder)
    options = "" if student.example.special_tokens else ", add_special_tokens=False"
    auto = auto_class(student.model.config).__name__
    code = _CODE.format(auto_class=auto, options=options)
    test = SmokeTest("transformers and torch", _IMPORTS.format(auto_class=auto), code)
    write_smoke_test(folder, test, student.example)
    usage = None if config.dtype == "auto" else _USAGE.format(auto_class=auto)
    write_description(
        folder, student, usage, facts(student, "safetensors, for transformers, vLLM and others")
    )


def copy_kept(source: Path, folder: Path, patterns: Sequence[str] = KEPT) -> None:
    """Copy what stands beside a student's weights and belongs to an export."""
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def facts(student: FinishedStudent, form: str) -> dict[str, str]:
    """What the card says of an export."""
    names = student.tokenizer.convert_ids_to_tokens(list(student.ends))
    kind = student.encoder.template.kind
    return {
        "Format": form,
        "Parameters": f"{student.parameters:,}, in {student.dtype}",
        "Responses end with": ", ".join(f"`{name}`" for name in names),
        "Prompts": f"the template `{kind}`, which the tokenizer's chat template renders",
        "Smoke test": f"`python {FILE}` answers one prompt greedily and compares with the recorded text",
    }
