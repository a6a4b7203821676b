"""docs/tokenizers.md: its YAML, its commands and its Python run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from stillhouse.files import write_jsonl
from tests import tiny
from tests.conftest import ROOT
from tests.data.toy_tokenizers import byte_tokenizer
from tests.workshop import Workshop

PAGE = (ROOT / "docs" / "tokenizers.md").read_text(encoding="utf-8")


def block(language: str, number: int = 0) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(found) == (2 if language == "yaml" else 1)
    return str(found[number])


def test_what_the_page_shows_is_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_tokenizer()
    model = tiny.model(3, vocab_size=len(tokenizer), max_position_embeddings=512)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "other-teacher")  # type: ignore[operator, union-attr]
    (tmp_path / "run.yaml").write_text(block("yaml"), encoding="utf-8")
    workshop = Workshop(tmp_path, capsys)
    for line in block("console").splitlines():
        said = workshop.stillhouse(*shlex.split(line, comments=True)[1:])
        assert said.code == 0, said.err
        if "check" in line:
            assert "compared by span over bytes" in said.out
    assert (tmp_path / "runs" / "across" / "student" / "model.safetensors").exists()
    chains = [{"question": f"{n} + 1?", "answer": str(n + 1), "rationale": f"After {n}."} for n in range(8)]
    write_jsonl(tmp_path / "chains.jsonl", [*chains, {"question": "9 + 1?", "answer": "10"}])
    (tmp_path / "chains.yaml").write_text(block("yaml", 1), encoding="utf-8")
    said = workshop.stillhouse("run", "chains.yaml", "train.max_steps=1")
    assert said.code == 0, said.err
    assert "1 x no reasoning before the answer" in said.err
    refused = workshop.stillhouse("check", "run.yaml", "objective=forward_kl")
    assert "Use objective uld, span or transport" in refused.err
    exec(compile(block("python"), "tokenizers.md", "exec"), {})
    assert capsys.readouterr().out.startswith("(0, ")
