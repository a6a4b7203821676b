"""Lines of text and errors go to the right stream, and give the terminal no orders."""

from __future__ import annotations

import json
import re

from stillhouse import console
from stillhouse.console import note, say, show_error, warn
from stillhouse.errors import ConfigError, EnvironmentFault, Fault


def test_errors_go_to_standard_error_with_their_exit_code(capsys):
    long = "objective.alpha: " + "word " * 40
    assert show_error(ConfigError(Fault("a[0]", "wrong"), long)) == 2
    assert show_error(EnvironmentFault("the disk is full")) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error:\n- a[0]: wrong\n- {long}\nerror: the disk is full\n"


def test_lines_obey_no_control_characters_either(capsys):
    for print_line in (say, note, warn):
        print_line("a\x1b[2Jb")
    show_error(ConfigError("bad\x1b]0;title\x07.jsonl"))
    captured = capsys.readouterr()
    assert captured.out == "a␛[2Jb\n"
    assert captured.err == "a␛[2Jb\nwarning: a␛[2Jb\nerror: bad␛]0;title␇.jsonl\n"


def test_json_for_a_terminal_is_the_same_value_without_a_control_character() -> None:
    value = {"text": "a\x9b31m\x1b[2J\x7f\u202eb\u2028 ü 北 👋 \t\n", "n": [1, None, True]}
    for indent in (None, 2):
        text = console.json_text(value, indent=indent)
        assert json.loads(text) == value
        assert "ü 北 👋" in text
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e]", text)
