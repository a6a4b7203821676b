"""What the teacher said about responses that will come again, so that reuse costs no teacher forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stillhouse.core.types import Response

if TYPE_CHECKING:
    from torch import Tensor

UNWATCHED = -1


class TeacherMemory:
    """The teacher's last hidden states of the responses that somebody asked to watch, by content.

    With the teacher's head they are its exact distribution. They are the teacher's own numbers, kept as they
    came on the CPU: R rows of the teacher's width for a response of R tokens.

    Example:
        >>> memory.watch(response)
        >>> memory.put(memory.number(response), hidden)
        >>> memory.get(memory.number(response))
    """

    def __init__(self) -> None:
        self._numbers: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        self._watchers: dict[int, int] = {}
        self._hidden: dict[int, Tensor] = {}
        self._next = 0

    def __bool__(self) -> bool:
        """Whether anything is watched."""
        return bool(self._numbers)

    def watch(self, response: Response) -> None:
        """Keep what the teacher says about this response until it is forgotten as often as it was watched."""
        number = self._numbers.setdefault(_content(response), self._next)
        self._next = max(self._next, number + 1)
        self._watchers[number] = self._watchers.get(number, 0) + 1

    def forget(self, response: Response) -> None:
        """Undo one `watch`."""
        number = self.number(response)
        if number == UNWATCHED:
            return
        self._watchers[number] -= 1
        if not self._watchers[number]:
            del self._watchers[number], self._numbers[_content(response)]
            self._hidden.pop(number, None)

    def number(self, response: Response) -> int:
        """The number under which a watched response is known; -1 for any other."""
        return self._numbers.get(_content(response), UNWATCHED)

    def put(self, number: int, hidden: Tensor) -> None:
        """Keep the hidden states [R, Dt] of a watched response; nothing happens for -1."""
        if number in self._watchers and number not in self._hidden:
            self._hidden[number] = hidden.detach().cpu().clone()

    def get(self, number: int) -> Tensor | None:
        """The hidden states [R, Dt]; None if the teacher has not seen the response yet."""
        return self._hidden.get(number)


def _content(response: Response) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return response.prompt.token_ids, response.token_ids
