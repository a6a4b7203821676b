"""Algorithm 1 of DistiLLM: which branch a step takes, what is written and what is replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.rollouts.contexts import Clock, at, context

from stillhouse.core.seeds import derived_uniform
from stillhouse.rollouts.adaptive import AdaptiveConfig, AdaptivePolicy
from stillhouse.schedules import Linear

STEPS = 40


def steps_of(folder: Path, config: AdaptiveConfig, batch: int = 4, **more: Any) -> list[dict[str, Any]]:
    """What happens at each of 40 steps: facts, responses, and the step whose weights wrote them."""
    clock = Clock()
    around = context(folder, clock, **more)
    policy = config.build(around)
    seen = []
    for step in range(STEPS):
        clock.step = step
        prompts = [around.prompts[(step * batch + i) % len(around.prompts)] for i in range(batch)]
        now = config.model_copy(update={"fresh_share": value(config.fresh_share, step)})
        drawn = [group[0] for group in policy.draw(now, prompts, at(step, STEPS))]
        seen.append({"step": step, "prompts": prompts, "drawn": drawn, **policy.metrics()})
    return seen


def value(number: Any, step: int) -> float:
    return number.value(at(step, STEPS), {}) if isinstance(number, Linear) else number


def test_branches_are_those_of_the_algorithm(tmp_path: Path) -> None:
    config = AdaptiveConfig(student_share=0.7, capacity=12)
    size, steps = 0, steps_of(tmp_path, config)
    assert {seen["responses/on_policy"] for seen in steps} == {True, False}
    for seen in steps:
        u = derived_uniform(5, "adaptive", seen["step"])
        on_policy = u < 0.7
        fresh = u < 0.7 * (1 - seen["step"] / STEPS) or (on_policy and size < 4)
        size = min(12, size + 4 * fresh)
        assert seen["responses/on_policy"] == on_policy
        assert seen["responses/fresh"] == fresh
        assert seen["replay/size"] == size
        assert {r.source for r in seen["drawn"]} == {"student" if on_policy else "fixed"}
        if not on_policy:
            assert [r.prompt for r in seen["drawn"]] == seen["prompts"]


def test_replayed_responses_are_older_than_the_step_and_keep_their_version(tmp_path: Path) -> None:
    seen = steps_of(tmp_path, AdaptiveConfig(student_share=1.0, fresh_share=0.3, capacity=40))
    ages = [s["step"] - r.student_version for s in seen for r in s["drawn"]]
    assert min(ages) >= 0
    assert max(ages) > 3
    assert all(s["replay/age"] >= 0 for s in seen)
    assert seen[-1]["replay/uses"] > 1


def test_released_code_writes_until_the_buffer_is_full_and_trains_on_that(
    tmp_path: Path,
) -> None:
    config = AdaptiveConfig(
        student_share=0.6, capacity=20, minimum_fill=20, train_on_fresh=True, skip_first_token=True
    )
    size, steps = 0, steps_of(tmp_path, config)
    assert {seen["responses/fresh"] for seen in steps} == {True, False}
    for seen in steps:
        u = derived_uniform(5, "adaptive", seen["step"])
        fresh = u < 0.6 * (1 - seen["step"] / STEPS) or (u < 0.6 and size < 20)
        assert seen["responses/fresh"] == fresh
        size = min(20, size + 4 * fresh)
        if fresh:
            versions = {r.student_version for r in seen["drawn"]}
            assert versions == {seen["step"]}
            for response, prompt in zip(seen["drawn"], seen["prompts"], strict=True):
                assert response.prompt.token_ids[: len(prompt.token_ids)] == prompt.token_ids
                assert len(response.prompt.token_ids) <= len(prompt.token_ids) + 1


def test_larger_batches_write_as_much_in_fewer_rounds(tmp_path: Path) -> None:
    one = steps_of(tmp_path, AdaptiveConfig(student_share=1.0, fresh_share=0.5, capacity=400), prompts=40)
    four = steps_of(
        tmp_path,
        AdaptiveConfig(student_share=1.0, fresh_share=0.5, capacity=400, generate_batches=4),
        prompts=40,
    )
    rounds = [sum(seen["responses/fresh"] for seen in run) for run in (one, four)]
    assert rounds[1] < rounds[0] / 2
    assert four[0]["replay/size"] == 16


def test_a_policy_that_is_loaded_goes_on_as_the_one_that_was_saved(tmp_path: Path) -> None:
    config = AdaptiveConfig(student_share=0.8, fresh_share=0.4, capacity=10)
    clock = Clock()
    around = context(tmp_path, clock)

    def go(policy: AdaptivePolicy, steps: range) -> list[Any]:
        out = []
        for step in steps:
            clock.step = step
            out.append(policy.draw(config, around.prompts[:3], at(step)))
        return out

    straight, first, second = (config.build(around) for _ in range(3))
    wanted = go(straight, range(12))
    got = go(first, range(7))
    second.load_state_dict(first.state_dict())
    got += go(second, range(7, 12))
    assert got == wanted


def test_impossible_buffers_are_refused() -> None:
    with pytest.raises(ValueError, match="minimum_fill"):
        AdaptiveConfig(capacity=10, minimum_fill=11)
