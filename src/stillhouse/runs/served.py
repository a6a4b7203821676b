"""Servers in a run: which one writes the teacher's text, and what was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillhouse import console
from stillhouse.engines import Engine, ServerConfig, ServerEngine, TokenizerInfo
from stillhouse.runs.config import RunConfig
from stillhouse.runs.folder import RunFolder
from stillhouse.teachers import ServerTeacherConfig
from stillhouse.teachers.server import ServerTeacher

if TYPE_CHECKING:
    from stillhouse.runs.build import Parts

ANSWERS = "answers.jsonl"
"""What servers have written, beside the rounds of a run."""

WORDS = {
    "requests": "requests",
    "retries": "repeated",
    "reused": "answered from disk",
    "prompt_tokens": "tokens read",
    "completion_tokens": "tokens written",
    "retokenised": "texts tokenised here",
}
"""The counts in words."""


def server_of(config: RunConfig) -> ServerConfig | None:
    """The server that writes the teacher's text: the teacher's own, or the engine's; None if none does."""
    teacher = getattr(config.teacher, "of", config.teacher)
    if isinstance(teacher, ServerTeacherConfig):
        return ServerConfig.of_teacher(teacher)
    return config.engine if isinstance(config.engine, ServerConfig) else None


def keeping(engine: Engine, answers: Path) -> Engine:
    """The engine; one on a server keeps its answers in a file and looks there before it asks."""
    if isinstance(engine, ServerEngine):
        engine.use_journal(answers)
    return engine


def server_engine(config: RunConfig, facts: TokenizerInfo) -> ServerEngine | None:
    """The engine of `server_of`, connected.

    Raises:
        ServerError: the server does not answer.
        EngineError: it cannot write token ids.
        ModelError: its token ids are not the student's.
    """
    found = server_of(config)
    return None if found is None else found.build(None, facts)


def tell(parts: Parts, teacher: Any, folder: RunFolder) -> None:
    """Show and keep the counts of this process, if it has asked any server.

    Args:
        parts: the run, whose engine may write on a server.
        teacher: the running teacher, which may be on one.
        folder: gets `servers.json`.
    """
    counts = asked(parts, teacher)
    if not counts or not folder.main:
        return
    folder.write("servers.json", counts)
    for what, found in counts.items():
        numbers = [f"{number:,} {WORDS[name]}" for name, number in found.items() if name in WORDS and number]
        console.note(f"{what} at {found['url']}: {', '.join(numbers) or 'nothing was asked'}")


def asked(parts: Parts, teacher: Any) -> dict[str, dict[str, Any]]:
    """The counts by what the server was asked for: "teacher's text", "teacher's log-probabilities"."""
    counts: dict[str, dict[str, Any]] = {}
    engine = vars(parts).get("teacher_engine")  # not made for this alone
    if isinstance(engine, ServerEngine):
        counts["teacher's text"] = {"url": engine.served.client.url, **engine.counts()}
    inner = getattr(teacher, "teacher", teacher)
    if isinstance(inner, ServerTeacher):
        client = inner.served.client
        counts["teacher's log-probabilities"] = {"url": client.url, **vars(client.usage)}
    return counts
