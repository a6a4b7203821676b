"""Servers of a run: the one that generates the teacher's text, and what all of them were requested."""

from __future__ import annotations

from typing import Any

from stillhouse import console
from stillhouse.engines import Engine, ServerConfig, ServerEngine
from stillhouse.runs.config import RunConfig
from stillhouse.runs.folder import RunFolder
from stillhouse.teachers import AnyTeacher

LABELS = {
    "requests": "requests",
    "retries": "retries",
    "reused": "responses reused from disk",
    "prompt_tokens": "prompt tokens",
    "completion_tokens": "completion tokens",
    "retokenised": "responses tokenised here",
}
"""Usage counts as they are shown."""


def teacher_text_server(config: RunConfig) -> ServerConfig | None:
    """The server that generates the teacher's text: the teacher's own, or the engine's; None if none does."""
    server = None if config.teacher is None else config.teacher.server()
    if server is not None:
        return ServerConfig.of_teacher(server)
    return config.engine if isinstance(config.engine, ServerConfig) else None


def report_server_usage(engine: Engine | None, teacher: AnyTeacher | None, folder: RunFolder) -> None:
    """Print the usage of servers by this process and write it to `servers.json`, if there was any server.

    Args:
        engine: what generated the teacher's text, which may be on a server.
        teacher: the teacher of the step, which may be on one.
        folder: for the file.
    """
    usage = _usage(engine, teacher)
    if not usage or not folder.main:
        return
    folder.write("servers.json", usage)
    for purpose, counts in usage.items():
        shown = [f"{count:,} {LABELS[name]}" for name, count in counts.items() if name in LABELS and count]
        console.note(f"{purpose} at {counts['url']}: {', '.join(shown) or 'no requests'}")


def _usage(engine: Engine | None, teacher: AnyTeacher | None) -> dict[str, dict[str, Any]]:
    """URL and counts, by what the server was for."""
    usage: dict[str, dict[str, Any]] = {}
    if isinstance(engine, ServerEngine):
        usage["teacher's text"] = {"url": engine.served.client.url, **engine.counts()}
    if teacher is not None and (counts := teacher.usage()) is not None:
        usage["teacher's log-probabilities"] = counts
    return usage
