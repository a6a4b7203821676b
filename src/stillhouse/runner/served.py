"""What a run has asked servers for: a line for whoever watches, and a file in the run folder."""

from __future__ import annotations

from typing import Any

from stillhouse import console
from stillhouse.engines import ServerEngine
from stillhouse.runner.assemble import Parts
from stillhouse.runner.folder import RunFolder
from stillhouse.teachers.server import ServerTeacher

WORDS = {
    "requests": "requests",
    "retries": "repeated",
    "reused": "answered from disk",
    "prompt_tokens": "tokens read",
    "completion_tokens": "tokens written",
    "retokenised": "texts tokenised here",
}
"""The counts in words."""


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
        counts["teacher's text"] = {"url": engine.completions.client.url, **engine.counts()}
    inner = getattr(teacher, "inner", teacher)
    if isinstance(inner, ServerTeacher):
        client = inner.completions.client
        counts["teacher's log-probabilities"] = {"url": client.url, **vars(client.counts)}
    return counts
