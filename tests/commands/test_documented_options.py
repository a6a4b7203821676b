"""Every `stillhouse` line of the pages is one that the command line takes: its command, options and values.

What the commands do is run by the tests of single pages; here none is run, only read.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from stillhouse import commands
from tests.conftest import ROOT

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
]
REFUSED = typer.BadParameter.__mro__[2]
"""What typer raises for a command line that it does not take."""
GROUP = typer.main.get_command(commands.app.app)
_LINE = re.compile(r"^(?:\$ )?(?:\w+=\S+ )*(?:torchrun .*? -m )?stillhouse (?!\.\.\.)", re.MULTILINE)


def lines(page: Path) -> list[str]:
    """The commands in the page's blocks of a shell, each in one line."""
    blocks = re.findall(r"^```(?:console|bash|sh|shell)\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    found = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in found if _LINE.match(line)]


def read(line: str) -> None:
    """Parse a command as the command line does, without running it."""
    alone = re.split(r" [|<>] | && ", line[line.index("stillhouse ") :])[0]
    alone = re.sub(r"\b(s3|gs|az)://", "memory://", alone)  # a store whose package is there
    _, *arguments = shlex.split(alone, comments=True)
    with GROUP.context_class(GROUP, info_name="stillhouse") as context:
        name, command, rest = GROUP.resolve_command(context, arguments)
        while hasattr(command, "resolve_command"):  # such as `cache build`
            name, command, rest = command.resolve_command(command.context_class(command, context, name), rest)
        if "--help" not in rest:
            command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_the_page_is_taken(page: Path) -> None:
    refused = {}
    for line in lines(page):
        try:
            read(line)
        except REFUSED as error:
            refused[line] = error.format_message()
    assert not refused


def test_a_wrong_option_is_found() -> None:
    read("stillhouse export runs/kd --to gguf -o kd.gguf")
    for wrong in ("export runs/kd --too gguf", "chatt runs/kd", "quantise runs/kd -o q --weights int3"):
        with pytest.raises(REFUSED):
            read(f"stillhouse {wrong}")
    assert sum(len(lines(page)) for page in PAGES) > 80
