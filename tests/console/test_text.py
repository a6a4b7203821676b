"""Lines of text and errors go to the right stream, and give the terminal no orders."""

from __future__ import annotations

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
