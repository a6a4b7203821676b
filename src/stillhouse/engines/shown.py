"""Writing text with a bar that shows how far it has come."""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse import console
from stillhouse.core.types import Completion
from stillhouse.engines.base import Engine, Sampling


def generate(
    engine: Engine, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int, title: str | None
) -> list[Completion]:
    """`engine.generate`, with progress under `title`; None shows none."""
    if title is None:
        return engine.generate(prompts, sampling, seed)
    with console.progress(title, total=len(prompts)) as bar:
        done = 0

        def advance(finished: int, _total: int) -> None:
            nonlocal done
            bar.advance(finished - done)
            done = finished

        return engine.generate(prompts, sampling, seed, progress=advance)
