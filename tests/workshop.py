"""A folder as a user has it: two tiny models, a few rows, a YAML file; and the command line to use it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import pty
import resource
import shutil
import signal
import struct
import sys
import termios
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from stillhouse import commands
from stillhouse.files import locate, write_jsonl
from tests.children import Said, end, start, write_to
from tests.small_runs import chains_of, pairs_of

CONTEXT = 512
YAML = """\
name: kd
recipe: kd
student: {path: student}
teacher: {kind: live, path: teacher}
data:
  train: train.jsonl
  valid: valid.jsonl
  template: {kind: plain}
  max_prompt: 96
  max_response: 8
train: {batch_size: 4, micro_batch_size: 2, log_every: 1, validate_rouge: false}
evaluate: {before: false, teacher: false}
output: {report: false}
"""


def make_models(folder: Path) -> None:
    """A teacher and a student of two layers, 32 wide, with the demonstration's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(str(locate("package:stillhouse/demo/teacher")))
    for seed, name in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(
            "llama",
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=CONTEXT,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def make_workshop(folder: Path, models: Path) -> None:
    """Models (linked), 24 rows to train on, also as preference pairs, 4 to validate, and `run.yaml`."""
    for name in ("teacher", "student"):
        (folder / name).symlink_to(models / name)
    source = locate("package:stillhouse/demo/data")
    for name, count, file in (("train", 24, "train.jsonl"), ("valid", 4, "dev.jsonl")):
        lines = (source / file).read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if name == "train":
            write_jsonl(folder / "pairs.jsonl", pairs_of([json.loads(line) for line in lines]))
            write_jsonl(folder / "chains.jsonl", chains_of([json.loads(line) for line in lines]))
    (folder / "run.yaml").write_text(YAML, encoding="utf-8")


class Workshop:
    """The folder, and `stillhouse` in it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys

    def stillhouse(self, *arguments: str) -> Said:
        """Run the command line in this process."""
        self._capsys.readouterr()
        before = sys.argv
        sys.argv = ["stillhouse", *arguments]
        log = logging.getLogger("stillhouse")
        kept = log.propagate, log.handlers[:]
        try:
            commands.main()
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        finally:
            sys.argv = before
            log.propagate, log.handlers[:] = kept
        captured = self._capsys.readouterr()
        return Said(code, captured.out, captured.err)

    def refused(self, *arguments: str) -> str:
        """Run a command that must be refused: exit code 2, one message, nothing written."""
        before = self.listing()
        said = self.stillhouse(*arguments)
        assert said.code == 2, said.out + said.err
        assert said.err.count("error:") == 1, said.err
        assert "Traceback" not in said.err
        assert self.listing() == before
        return said.err

    def listing(self) -> set[str]:
        """All files of the folder."""
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}

    def state(self, run: str = "kd") -> dict[str, Any]:
        """The run's state.json."""
        path = self.folder / "runs" / run / "state.json"
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def in_child(self, *arguments: str, hook: Event | None = None, file_limit: int | None = None) -> Said:
        """Run the command line in a process of its own that gets real signals or a real limit on files.

        Args:
            arguments: the command.
            hook: called for each opening of a file, with its path; may send signals to the process.
            file_limit: most bytes of a file, as a disk that gets full has it.
        """
        out, err = self.folder / ".out", self.folder / ".err"
        code = end(start(_in_files, out, err, arguments, hook, file_limit))
        said = Said(code, out.read_text(), err.read_text())
        out.unlink()
        err.unlink()
        return said

    def in_terminal(
        self, *arguments: str, columns: int = 100, lines: int = 30
    ) -> tuple[int, list[list[str]]]:
        """Run the command line in a process of its own on a terminal of its own.

        Returns:
            The exit code, and what was on the screen after each piece of output, line by line.
        """
        import pyte

        terminal, inside = pty.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        child = start(_on_terminal, os.ttyname(inside), arguments)
        screen = pyte.Screen(columns, lines)
        stream = pyte.ByteStream(screen)
        seen: list[list[str]] = []
        with contextlib.suppress(OSError):  # how Linux says that the other end is gone
            while True:
                if inside >= 0 and terminal not in wait([terminal, child.sentinel]):
                    os.close(inside)
                    inside = -1
                stream.feed(os.read(terminal, 4096))
                seen.append([line.rstrip() for line in screen.display if line.strip()])
        os.close(terminal)
        return end(child), seen


Event = Callable[[str], None]


def _in_files(
    out: Path, err: Path, arguments: tuple[str, ...], hook: Event | None, file_limit: int | None
) -> None:
    write_to(out, err)
    _child(arguments, hook, file_limit)


def _on_terminal(terminal: str, arguments: tuple[str, ...]) -> None:
    os.setsid()
    opened = os.open(terminal, os.O_RDWR)  # the first one that the leader of a session opens controls it
    for stream in (0, 1, 2):
        os.dup2(opened, stream)
    os.environ |= {"TERM": "xterm-256color", "LANG": "C.UTF-8"}
    for name in ("NO_COLOR", "COLUMNS", "LINES"):
        os.environ.pop(name, None)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    _child(arguments, None, None)


def _child(arguments: tuple[str, ...], hook: Event | None, file_limit: int | None) -> None:
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["stillhouse", *arguments]
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        if hook is not None:
            sys.addaudithook(lambda event, args: hook(str(args[0])) if event == "open" else None)
        commands.main()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class sends:
    """A hook that sends a signal when a file whose path holds the text is opened for the n-th time."""

    def __init__(self, *moments: tuple[str, int], sig: signal.Signals = signal.SIGINT) -> None:
        self._left = list(moments)
        self._signal = sig

    def __call__(self, path: str) -> None:
        if not self._left or self._left[0][0] not in path:
            return
        text, count = self._left.pop(0)
        if count > 1:
            self._left.insert(0, (text, count - 1))
        else:
            os.kill(os.getpid(), self._signal)


def copied(folder: Path, name: str) -> Path:
    """A copy of one of the models that a test may damage."""
    target = folder / f"{name}-copy"
    shutil.copytree(folder / name, target)
    return target
