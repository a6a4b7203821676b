"""What state.json says about a run, and whether it still holds: a killed process cannot say how it ended."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping
from typing import Any

GONE = "its process is gone, without having said how it ended; go on with --resume"
ELSEWHERE = "as far as its folder tells: it was started on another machine"


def at_work(state: Mapping[str, Any]) -> int | None:
    """The process that is at work on the run now, on this machine; None if there is none or it is ours."""
    import psutil

    try:
        if state["state"] != "running" or state["process"] == os.getpid():
            return None
        began = datetime.datetime.fromisoformat(state["started"]).timestamp()
        process = psutil.Process(state["process"])
        # A number given anew, after a crash and a restart, belongs to a process that is younger than the run.
        alive = process.create_time() <= began + 1 and process.status() != psutil.STATUS_ZOMBIE
    except (ValueError, KeyError, TypeError, psutil.Error):
        return None
    return int(state["process"]) if alive else None


def status_of(state: Mapping[str, Any]) -> tuple[str, str]:
    """How a run stands, and a remark on it.

    Returns:
        "running", "interrupted", "done", "failed" or "unknown", with the message of the run, or why what
        its folder says is not believed. A run that says it is running is running only if its process lives.
    """
    said, message = str(state.get("state") or "unknown"), str(state.get("message") or "")
    if said != "running" or state.get("process") == os.getpid():
        return said, message
    if state.get("host") not in (None, platform.node()):
        return said, ELSEWHERE
    return ("running", message) if at_work(state) else ("interrupted", GONE)
