"""Evaluates the schedules of a run at each step and keeps the state of the adaptive ones."""

from __future__ import annotations

from typing import Any, TypeVar

from stillhouse.config import walk
from stillhouse.core.types import Progress
from stillhouse.schedules.base import Schedule, State

TreeT = TypeVar("TreeT")


class ScheduleTracker:
    """All schedules in some config trees, with their states, by the dotted path of their field.

    Example:
        >>> tracker = ScheduleTracker(objective)
        >>> current = tracker.resolve(objective, Progress(step=10, max_steps=100, epoch=0.1, epochs=1.0))
    """

    def __init__(self, *trees: Any) -> None:
        self._states: dict[str, State] = {}
        self._schedules: dict[str, Schedule] = {}
        for tree in trees:
            walk(tree, self._add)

    def _add(self, path: str, value: Any) -> Any:
        if isinstance(value, Schedule):
            self._schedules[path] = value
            self._states[path] = value.initial()
        return value

    def resolve(self, tree: TreeT, progress: Progress) -> TreeT:
        """The tree with every schedule replaced by its value at this step."""

        def evaluated(path: str, value: Any) -> Any:
            if isinstance(value, Schedule):
                return value.value(progress, self._states.get(path) or value.initial())
            return value

        result: TreeT = walk(tree, evaluated)
        return result

    def values(self, progress: Progress) -> dict[str, float]:
        """The value of every schedule at this step by its path, for the metrics log."""
        return {path: s.value(progress, self._states[path]) for path, s in self._schedules.items()}

    def unmoved(self) -> dict[str, float]:
        """The schedules that follow a measurement and are where they began, by path, with their value."""
        return {
            path: state["value"]
            for path, state in self._states.items()
            if state.get("value") is not None and state == {**state, **self._schedules[path].initial()}
        }

    def observe(self, name: str, value: float, progress: Progress) -> None:
        """Update every schedule with a measured metric; see `Schedule.observe`."""
        for path, schedule in self._schedules.items():
            self._states[path] = schedule.observe(self._states[path], name, value, progress)

    def state_dict(self) -> dict[str, State]:
        """The states of all schedules, for a checkpoint."""
        return {path: dict(state) for path, state in self._states.items()}

    def load_state_dict(self, states: dict[str, State]) -> None:
        """Restore what `state_dict` returned; states of paths that hold no schedule any more are ignored."""
        for path, state in states.items():
            if path in self._states:
                self._states[path] = dict(state)
