"""stillhouse chat: a student in the terminal, its teacher beside it on demand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillhouse import console
from stillhouse.commands.app import RESULTS, app
from stillhouse.commands.options import TemplateOption, faults_as_options, template_choice
from stillhouse.errors import ConfigError, RowError

if TYPE_CHECKING:
    from stillhouse.runs.chat import Conversation

HELP = (
    "/teacher: the teacher's answer to the last question; /clear: forget; /history: the turns; "
    "/set temperature=0.7: sampling; /quit or Ctrl-D. Ctrl-C stops an answer."
)


@app.command("chat", rich_help_panel=RESULTS)
def chat(
    run: Annotated[
        Path,
        typer.Argument(
            help="A run folder, an export, or the folder of any model.", metavar="RUN", show_default=False
        ),
    ],
    teacher: Annotated[
        bool, typer.Option("--teacher", help="The run's teacher answers each question too.")
    ] = False,
    template: TemplateOption = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy; default: that of the run.", show_default=False)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Length limit; default: that of the run.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.", min=0)] = 0,
) -> None:
    """Talk with a student, with the template and the sampling of its run; /help lists what can be said.

    In a pipe each line of standard input is a question, and the answers come as plain lines.
    """
    import torch

    from stillhouse.runs.chat import Conversation

    with console.phase("Loading the student", quiet=True):
        conversation = Conversation(run, template_choice(template))
    given = {"temperature": temperature, "max_tokens": max_tokens}
    changes = [f"{name}={value}" for name, value in given.items() if value is not None]
    with faults_as_options({"temperature": "--temperature", "max_tokens": "--max-tokens"}):
        conversation.change(" ".join(changes))
    if teacher:
        conversation.teacher()
    torch.manual_seed(seed)
    live = sys.stdin.isatty()
    if live:
        console.note(HELP)
    if not conversation.remembers:
        console.note(f"The template {conversation.template.kind} has one question: none is remembered.")
    while (line := _next_line(live)) is not None:
        if line and not _answered(line, conversation, teacher, live):
            break


def _next_line(live: bool) -> str | None:
    """What is said next; None at the end."""
    if not live:
        line = sys.stdin.readline()
        return line.strip() if line else None
    try:
        import readline  # noqa: F401  (arrows and history for input)
    except ImportError:  # not on Windows
        console.note("No history of lines here.")
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        console.say("")
        return None


def _answered(line: str, conversation: Conversation, teacher: bool, live: bool) -> bool:
    """Do what a line says; False to stop."""
    try:
        if line.startswith("/"):
            return _command(line, conversation)
        _speak(lambda show: conversation.ask(line, show), "")
        if teacher:
            _speak(conversation.ask_teacher, "teacher: ")
    except KeyboardInterrupt:
        if not live:
            raise
        console.say("")
        console.note("Stopped; the question is forgotten.")
    except (ConfigError, RowError) as error:
        if not live:
            raise
        console.show_error(error)
    return True


def _command(line: str, conversation: Conversation) -> bool:
    """Carry out a line that begins with a slash; False to stop."""
    word, _, rest = line.partition(" ")
    if word in ("/quit", "/exit"):
        return False
    if word == "/teacher":
        _speak(conversation.ask_teacher, "teacher: ")
    elif word == "/clear":
        conversation.clear()
    elif word == "/history":
        for turn in conversation.turns:
            console.say(f"{turn['role']}: {turn['content']}")
    elif word == "/set" and rest:
        conversation.change(rest)
    elif word == "/help":
        console.note(HELP)
    else:
        raise ConfigError(f"{word}: is not known. {HELP}")
    return True


def _speak(answer: Callable[[Callable[[str], None]], object], label: str) -> None:
    """Print an answer as it comes, and end the line."""
    out = console.output()

    def show(text: str) -> None:
        out.out(text, end="", highlight=False)
        out.file.flush()

    out.out(label, end="", highlight=False, style="dim")
    answer(show)
    out.out("")
