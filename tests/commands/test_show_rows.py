"""`stillhouse show rows`: each row as the models read it, without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from stillhouse.files import locate
from tests.workshop import Workshop

CHATML = (
    "{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "Write <|im_end|> please"},
    {"role": "assistant", "content": "first <|im_end|> answer"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "second"},
]
FIELDS = [
    "id", "format", "prompt", "response", "prompt_ids", "response_ids", "trained", "rejected",
    "rejected_ids", "rejected_trained", "teacher_prompt", "dropped",
]  # fmt: skip


@pytest.fixture
def run(workshop: Workshop) -> Workshop:
    """A run whose student is a configuration and a tokenizer; there are no weights anywhere."""
    tokenizer = AutoTokenizer.from_pretrained(locate("package:stillhouse/demo/teacher"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(workshop.folder / "tokenizer")
    lines = [
        json.dumps({"messages": TALK}),
        '{"prompt": null, "response": "x"}',
        json.dumps({"messages": TALK}),
    ]
    (workshop.folder / "talk.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tree = {
        "recipe": "sft",
        "student": {"tokenizer": "tokenizer", "from_config": {"model_type": "llama"}},
        "data": {"train": "talk.jsonl", "train_on": "all"},
    }
    (workshop.folder / "talk.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return workshop


def objects(run: Workshop, *options: str) -> list[dict[str, Any]]:
    said = run.stillhouse("show", "rows", "talk.yaml", "--json", *options)
    assert said.code == 0, said.err
    return [json.loads(line) for line in said.out.splitlines()]


def test_every_row_is_an_object_with_what_is_trained(run: Workshop) -> None:
    first, bad, last = objects(run)
    assert list(first) == list(bad) == FIELDS
    assert (first["id"], first["format"], first["dropped"]) == ("train:1", "messages", None)
    assert first["prompt"].endswith("<|im_start|>assistant\n")
    assert "null" in bad["dropped"]
    assert bad["response_ids"] is None
    assert last["prompt_ids"] == first["prompt_ids"]
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "tokenizer")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    trained = [token for token, mark in zip(first["response_ids"], first["trained"], strict=True) if mark]
    assert trained.count(end) == 2, "one end for each answer, none for the text that only looks like one"
    assert tokenizer.decode(trained) == "first <|im_end|> answer<|im_end|>second<|im_end|>"
    assert first["prompt_ids"].count(end) == 1


def test_limit_row_and_dropped_choose(run: Workshop) -> None:
    assert [row["id"] for row in objects(run, "--limit", "1")] == ["train:1"]
    assert [row["id"] for row in objects(run, "--row", "1")] == ["train:1"]
    assert all(row["dropped"] for row in objects(run, "--dropped"))
    missing = run.stillhouse("show", "rows", "talk.yaml", "--row", "77")
    assert missing.code == 2
    assert "no row has this id" in missing.err


def test_in_plain_text_what_is_not_trained_stands_in_brackets(run: Workshop) -> None:
    said = run.stillhouse("show", "rows", "talk.yaml", "data.train_on=all", "--ids", "-n", "1")
    assert said.code == 0, said.err
    assert "⟦<|im_start|>" in said.out
    assert "  ids " in said.out
    assert "second<|im_end|>" in said.out


def test_a_run_folder_shows_its_rows(workshop: Workshop, tmp_path: Path) -> None:
    assert workshop.stillhouse("run", "run.yaml", "train.max_steps=1").code == 0
    [folder] = (workshop.folder / "runs").iterdir()
    said = workshop.stillhouse("show", "rows", str(folder), "--json", "--limit", "2")
    assert said.code == 0, said.err
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert [row["id"] for row in rows] == ["train:1", "train:2"]
    assert all(set(row["trained"]) == {1} for row in rows)
    assert all(row["teacher_prompt"] == row["prompt"] for row in rows)
