"""Messages between two confined processes: one JSON text a line, with a limit on its length."""

from __future__ import annotations

import json
from typing import Any, BinaryIO

LONGEST = 32 * 1024 * 1024
"""Bytes of one message."""


class Closed(EOFError):
    """The other side has gone, or says what is no message."""


class Channel:
    """A pair of pipes. What comes from the other side is not trusted: anything odd ends the conversation."""

    def __init__(self, reader: BinaryIO, writer: BinaryIO) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, message: Any) -> None:
        """Write one message.

        Raises:
            Closed: nobody reads any more.
        """
        try:
            self._writer.write(json.dumps(message).encode() + b"\n")
            self._writer.flush()
        except OSError as error:
            raise Closed(str(error)) from None

    def receive(self) -> Any:
        """Wait for one message.

        Raises:
            Closed: the other side has gone, or its line is too long or no JSON.
        """
        line = self._reader.readline(LONGEST + 1)
        if not line.endswith(b"\n"):
            raise Closed("the other process has ended" if len(line) <= LONGEST else "a message is too long")
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Closed(f"not a message: {error}") from None
