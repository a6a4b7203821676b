"""The template of a run travels with its student: transformers renders it, and `auto` finds it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.conftest import shared
from transformers import AutoTokenizer

from stillhouse.data.rows import Row
from stillhouse.data.templates import TEMPLATES, Auto, recorded_template, with_template
from stillhouse.data.tokenise import Encoder
from stillhouse.files import locate

CHATML = (
    "{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
AWKWARD = 'Q: "{instruction}" \\ {{x}} #}}\nÄ: '
SINGLE: list[dict[str, Any]] = [
    {"kind": "alpaca"},
    {"kind": "plain", "system_turns": "merge"},
    {"kind": "custom", "without_input": AWKWARD, "with_input": "{instruction} {input}"},
]
OTHERS: list[dict[str, Any]] = [
    {"kind": "chat", "system": "Be brief. #}", "options": {"enable_thinking": False}},
]


MODELS = ("package:stillhouse/demo/teacher", "stories260k")


@pytest.fixture(params=[MODELS[0], pytest.param(MODELS[1], marks=pytest.mark.needs_shared)])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    path = shared() / "data" / "models" / request.param if request.param == MODELS[1] else locate(MODELS[0])
    return AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("options", SINGLE, ids=lambda options: options["kind"])
def test_transformers_gives_the_prompt_of_the_run(
    tokenizer: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    template = TEMPLATES.parse(options)
    with_template(tokenizer, template).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    row = Row("r", instruction="Name a fruit, {please}.", response="Fig")
    turns = [{"role": "user", "content": row.instruction}]
    found = loaded.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    _, ids = Encoder(template, tokenizer).prompt(row)
    assert tuple(found) == ids


@pytest.mark.parametrize("options", SINGLE + OTHERS, ids=lambda options: options["kind"])
def test_auto_is_the_template_of_the_run(tokenizer: Any, options: dict[str, Any], tmp_path: Path) -> None:
    tokenizer.chat_template = CHATML
    template = TEMPLATES.parse(options)
    once = with_template(tokenizer, template)
    with_template(once, Auto()).save_pretrained(tmp_path)  # a student of a student
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert Auto().resolved(loaded) == template
    assert recorded_template(tokenizer) is None, "the run's own tokenizer has changed"
