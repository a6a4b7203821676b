"""Numbers, durations and untrusted text read well."""

from __future__ import annotations

import math

import pytest

from stillhouse.console import duration, number, visible
from stillhouse.console.format import age, byte_size, compact_number, count, setting_text


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (1250, "1,250"), (57.1, "57.10"), (0.03125, "0.0312"), (1.2e-5, "1.2e-05"), (0.0, "0.0000"),
     (12345.6, "12,346"), (float("nan"), "nan"), (True, "yes"), ("[x]", "[x]")],
)  # fmt: skip
def test_numbers_read_well(value, shown):
    assert number(value) == shown


def test_durations_read_well():
    assert [duration(x) for x in (7.6, 161, 11_100)] == ["8 s", "2 min 41 s", "3 h 05 min"]
    assert [duration(x, tenths=True) for x in (7.64, 12.3)] == ["7.6 s", "12 s"]
    assert [duration(x) for x in (None, "soon", math.inf)] == ["–", "–", "–"]


def test_ages_read_well():
    assert [age(x) for x in (None, 5, 61, 7300, 86400 * 3, 86400)] == [
        "–", "just now", "1 min ago", "2 h ago", "3 days ago", "1 day ago",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "value", "shown"),
    [(compact_number, 57.1, "57.1"), (compact_number, 0.031254, "0.03125"),
     (compact_number, 12_345.6, "12,346"), (compact_number, 1250.0, "1,250"),
     (compact_number, None, "–"), (compact_number, "many", "many"),
     (compact_number, math.inf, "inf"), (count, 9289.6, "9,290"), (count, 164_352, "164k"),
     (count, 2_031_616, "2.03M"), (count, 999_950, "1M"), (count, None, "–"),
     (byte_size, 512, "512\u00a0B"), (byte_size, 4_063_232, "4.06\u00a0MB")],
)  # fmt: skip
def test_numbers_in_fewer_letters(form, value, shown):
    assert form(value) == shown


def test_a_setting_reads_as_in_yaml():
    values = [None, True, 3, 0.1 + 0.2, "text", {"kind": "linear", "end": [0.4]}]
    assert [setting_text(value) for value in values] == [
        "null", "true", "3", "0.3", "text", "{kind: linear, end: [0.4]}",
    ]  # fmt: skip


def test_control_characters_are_shown_and_not_obeyed():
    assert visible("a\x00b\x1b[2Jc\u202ed\ud800\ttab\nline") == "a␀b␛[2Jc[U+202E]d[U+D800]\ttab\nline"
