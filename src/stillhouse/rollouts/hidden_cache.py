"""The teacher's hidden states of replayed responses, so that replaying costs no teacher forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stillhouse.core.host import brought_back
from stillhouse.core.types import PromptContent, Response

if TYPE_CHECKING:
    from torch import Tensor

NO_SLOT = -1

Content = tuple[PromptContent, tuple[int, ...], tuple[int, ...] | None, tuple[int, ...] | None]
"""Token ids and images of the prompt, the response, which of its tokens are trained on, and the teacher's
prompt."""


class TeacherHiddenCache:
    """The teacher's last hidden states of retained responses, keyed by content.

    With the teacher's head they are its exact distribution. They are kept on the CPU as the teacher computed
    them: [R, Dt] for a response of R tokens and a teacher of width Dt. A GPU copies them to pinned memory and
    back without being waited for.

    Example:
        >>> cache.retain(response)
        >>> cache.put(cache.slot(response), hidden)
        >>> cache.get(cache.slot(response))
    """

    def __init__(self) -> None:
        self._slots: dict[Content, int] = {}
        self._references: dict[int, int] = {}
        self._hidden: dict[int, Tensor] = {}
        self._next = 0

    def __bool__(self) -> bool:
        """Whether any response is retained."""
        return bool(self._slots)

    def retain(self, response: Response) -> None:
        """Cache the hidden states of this response until it is released as often as it was retained."""
        slot = self._slots.setdefault(_content(response), self._next)
        self._next = max(self._next, slot + 1)
        self._references[slot] = self._references.get(slot, 0) + 1

    def release(self, response: Response) -> None:
        """Undo one `retain`; after the last one the hidden states are dropped."""
        slot = self.slot(response)
        if slot == NO_SLOT:
            return
        self._references[slot] -= 1
        if not self._references[slot]:
            del self._references[slot], self._slots[_content(response)]
            self._hidden.pop(slot, None)

    def slot(self, response: Response) -> int:
        """The slot of a retained response; -1 for any other."""
        return self._slots.get(_content(response), NO_SLOT)

    def put(self, slot: int, hidden: Tensor) -> None:
        """Store the hidden states [R, Dt] of a retained response; nothing happens for -1."""
        if slot in self._references and slot not in self._hidden:
            self._hidden[slot] = brought_back(hidden)

    def get(self, slot: int) -> Tensor | None:
        """The hidden states [R, Dt]; None on a cache miss."""
        return self._hidden.get(slot)


def _content(response: Response) -> Content:
    prompt = response.prompt
    return prompt.content, response.token_ids, response.trained, prompt.teacher_ids
