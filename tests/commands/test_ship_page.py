"""Every command of docs/ship.md is run: by `make examples`, or by a test that is named here."""

from __future__ import annotations

import re
import shlex

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "ship.md").read_text(encoding="utf-8")
SCRIPT = (ROOT / "examples" / "ship" / "run.sh").read_text(encoding="utf-8")
BY_TESTS = {
    "stillhouse export runs/kd --to hub --repo me/kd --output kd-hub": (
        "runs/test_export_hub.py::test_a_folder_is_uploaded_whole_and_private"
    ),
    "stillhouse init METHOD --chain": "commands/test_chains_page.py::test_init_writes_a_chain_that_resolves",
}
SECTIONS_BY_TESTS = {"Chains": "commands/test_chains_page.py::test_the_commands_run_in_order"}
"""Their blocks are read from the page by the test."""


def in_script() -> set[str]:
    """Commands of examples/ship/run.sh as they are written there, without redirections."""
    lines = SCRIPT.replace("\\\n", " ").splitlines()
    found = (re.search(r"(?<=\s)(?:stillhouse|python) [^)]*", line) for line in lines if line[:1] != "#")
    return {plain(one[0]) for one in found if one}


def plain(command: str) -> str:
    """Its words, without what follows a redirection and without a comment."""
    command = re.split(r"\s<", command.removeprefix("nice -n 15 "))[0]
    return " ".join(shlex.split(command, comments=True))


def on_page() -> set[str]:
    """Lines of console blocks, and commands in the text that have arguments."""
    text = PAGE
    for section in SECTIONS_BY_TESTS:
        own = text.partition(f"## {section}\n")[2].partition("\n## ")[0]
        text = text.replace(own, re.sub(r"```console\n.*?```", "", own, flags=re.DOTALL))
    blocks = re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)
    told = re.findall(r"`((?:nice -n 15 )?(?:stillhouse|python) [^`]*[/.-][^`]*)`", text)
    return {plain(line) for line in [*"".join(blocks).splitlines(), *told] if line}


def test_every_command_is_run_by_make_examples_or_by_a_test() -> None:
    commands, script = on_page(), in_script()
    assert len(commands) > 20
    for command in sorted(commands - set(BY_TESTS)):
        if "benchmarks/" in command:  # whole runs take hours; that it runs is what --small is for
            small = f"{command.split(' --')[0]} --small"
            assert small in script, f"{small}: examples/ship/run.sh does not have it"
        else:
            assert command in script, f"{command}: examples/ship/run.sh does not have it"


def test_the_named_tests_are_there_and_their_commands_on_the_page() -> None:
    assert set(BY_TESTS) <= on_page()
    for test in (*BY_TESTS.values(), *SECTIONS_BY_TESTS.values()):
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")
