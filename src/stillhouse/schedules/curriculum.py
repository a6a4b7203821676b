"""Turns a tree of parts with schedules into one with plain numbers; keeps what schedules remember."""

from __future__ import annotations

from typing import Any, TypeVar

from stillhouse.config import walk
from stillhouse.core.types import Progress
from stillhouse.schedules.base import Schedule, State

TreeT = TypeVar("TreeT")


class Curriculum:
    """All schedules of a run, found by walking its parts; each is known by its dotted path.

    Example:
        >>> curriculum = Curriculum(objective)
        >>> now = curriculum.now(objective, Progress(step=10, max_steps=100, epoch=0.1, epochs=1.0))
    """

    def __init__(self, *trees: Any) -> None:
        self._states: dict[str, State] = {}
        self._schedules: dict[str, Schedule] = {}
        for tree in trees:
            walk(tree, self._found)

    def _found(self, path: str, value: Any) -> Any:
        if isinstance(value, Schedule):
            self._schedules[path] = value
            self._states[path] = value.initial()
        return value

    def now(self, tree: TreeT, progress: Progress) -> TreeT:
        """The tree with every schedule replaced by its number at this step."""

        def numbered(path: str, value: Any) -> Any:
            if isinstance(value, Schedule):
                return value.value(progress, self._states.get(path) or value.initial())
            return value

        result: TreeT = walk(tree, numbered)
        return result

    def values(self, progress: Progress) -> dict[str, float]:
        """Every scheduled number at this step by its path; what the metrics log shows."""
        return {path: s.value(progress, self._states[path]) for path, s in self._schedules.items()}

    def observe(self, name: str, value: float, progress: Progress) -> None:
        """Tell every schedule that `name` was measured as `value`, at `progress`."""
        for path, schedule in self._schedules.items():
            self._states[path] = schedule.observe(self._states[path], name, value, progress)

    def state_dict(self) -> dict[str, State]:
        """All that has to be saved so that a resumed run goes on as if it had not stopped."""
        return {path: dict(state) for path, state in self._states.items()}

    def load_state_dict(self, states: dict[str, State]) -> None:
        """Put back what `state_dict` gave."""
        for path, state in states.items():
            if path in self._states:
                self._states[path] = dict(state)
