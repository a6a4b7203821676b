"""What several processes write for prompts of their own: never with the same random numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.rollouts.contexts import Clock, at, context

from stillhouse.rollouts import ResponsesConfig
from stillhouse.rollouts.adaptive import AdaptiveConfig
from stillhouse.rollouts.mixed import MixedConfig
from stillhouse.rollouts.offline.rounds import GeneratedConfig
from stillhouse.rollouts.on_policy import BatchedConfig, OnPolicyConfig
from stillhouse.rollouts.speculative import SpeculativeConfig


class Told:
    """An engine that remembers the seeds that it was asked with."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.seeds: list[int] = []

    def generate(self, prompts: Any, sampling: Any, seed: int, **more: Any) -> Any:
        self.seeds.append(seed)
        return self.engine.generate(prompts, sampling, seed, **more)


@pytest.mark.parametrize(
    "config",
    [
        OnPolicyConfig(),
        MixedConfig(student_share=1.0),
        AdaptiveConfig(student_share=1.0, fresh_share=1.0),
        BatchedConfig(generate_batches=1),
        SpeculativeConfig(),
        GeneratedConfig(by="student", refresh="step"),
    ],
    ids=lambda config: config.kind,
)
def test_each_process_has_random_numbers_of_its_own(config: ResponsesConfig, tmp_path: Path) -> None:
    def seeds(rank: int, ranks: int) -> list[int]:
        around = context(tmp_path / str(rank), Clock(), rank=rank, world_size=ranks)
        assert around.student is not None
        told = Told(around.student.engine)
        around = replace(around, student=replace(around.student, engine=told))
        config.build(around).draw(config, around.prompts[:2], at(3))
        return told.seeds

    alone, first, second = seeds(0, 1), seeds(0, 2), seeds(1, 2)
    assert first == alone
    assert second
    assert not set(first) & set(second)
