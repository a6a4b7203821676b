"""The tables of docs/scale.md are computed, from the example that it names."""

from __future__ import annotations

import re
from types import ModuleType

import pytest

from tests.conftest import ROOT, script


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    return script(ROOT / "docs" / "build_scale.py")


def test_the_tables_are_those_of_the_estimate(builder: ModuleType) -> None:
    (page,) = builder.pages().values()
    assert page == (ROOT / "docs" / "scale.md").read_text(encoding="utf-8"), "run: make docs"
    assert "<!-- memory table -->\n|" in page


def test_the_models_are_as_large_as_their_names(builder: ModuleType) -> None:
    assert builder.size("8B", "float32").parameters == pytest.approx(8.03e9, rel=0.001)
    assert builder.size("70B", "bfloat16").parameters == pytest.approx(70.55e9, rel=0.001)


def test_what_the_page_says_of_its_tables_is_so(builder: ModuleType) -> None:
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    row = re.search(r"\| \*\*a step\*\* (.*)\|", page)
    assert row is not None
    ddp, zero2, fsdp2, hsdp, with_teacher, hybrid = (
        float(cell.strip(" *")) for cell in row[1].split("|")[1:]
    )
    assert ddp > zero2 > hybrid > 80 > hsdp > with_teacher > fsdp2, "what fits an H100, and what does not"
    held = builder.stores(builder.size("70B", "bfloat16"))
    assert held["full logits, float32 (no such store)"] / held["hidden, bfloat16"] == pytest.approx(31, abs=1)
    assert held["hidden, bfloat16"] / held["topk, k = 64, uint8"] == pytest.approx(49, abs=1)
