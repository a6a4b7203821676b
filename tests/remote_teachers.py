"""`stillhouse serve` in processes of their own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stillhouse.teachers.hidden.protocol import KEY
from tests.devices import WITHOUT_GPU

TEACHER = "package:stillhouse/demo/teacher"
SECRET = "a-key-of-the-tests"


class Process:
    """One server of the demo teacher, once it answers."""

    def __init__(self, folder: Path, **options: Any) -> None:
        file = folder / "teacher.yaml"
        lines = {"path": TEACHER, "dtype": "float32", "port": 0, **options}
        file.write_text("".join(f"{name}: {value}\n" for name, value in lines.items()), encoding="utf-8")
        env = {KEY: SECRET, **os.environ, **WITHOUT_GPU}
        self.running = subprocess.Popen(
            [sys.executable, "-m", "stillhouse", "serve", str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        assert self.running.stdout is not None
        said = ""
        for line in self.running.stdout:
            said += line
            if found := re.search(r"at (http://[\d.:]+)", said):
                self.url = found[1]
                return
        raise AssertionError(self.running.communicate()[1])

    def send(self, what: signal.Signals) -> None:
        self.running.send_signal(what)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.send(signal.SIGCONT)
        self.running.kill()
        self.running.communicate()


@contextlib.contextmanager
def teacher_process(folder: Path, **options: Any) -> Iterator[Process]:
    """A server for the time of a block; `options` are those of its YAML file."""
    process = Process(folder, **options)
    try:
        yield process
    finally:
        process.end()
