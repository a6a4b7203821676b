"""One, two and four processes write the same responses to the same prompts, each its own share."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.children import ranks
from tests.rollouts.contexts import Clock, context
from tests.rollouts.drawn_in_processes import BATCH, POLICIES, STEPS, draw

from stillhouse.core.distributed import Ranks
from stillhouse.rollouts.adaptive import AdaptiveConfig
from stillhouse.rollouts.replay import dealt_out, unpack

Worlds = dict[int, list[dict[str, Any]]]
SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    """What each process has drawn, by the number of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    for size in SIZES:
        assert ranks(size, draw, folder) == [0] * size
    return {
        size: [torch.load(folder / f"{rank}-of-{size}.pt", weights_only=False) for rank in range(size)]
        for size in SIZES
    }


def steps_of(processes: list[dict[str, Any]], policy: str) -> list[dict[int, Any]]:
    """The responses of each step by their place, those of all processes together; no place twice."""
    found = []
    for shares in zip(*(one[policy]["steps"] for one in processes), strict=True):
        places = Counter(place for share in shares for place in share["drawn"])
        assert set(places.values()) == {1}
        found.append({place: group for share in shares for place, group in share["drawn"].items()})
    return found


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "replayed"])
def test_any_number_of_processes_draws_the_same(worlds: Worlds, policy: str) -> None:
    alone, two, four = (steps_of(worlds[size], policy) for size in SIZES)
    assert [len(step) for step in alone[-2:]] == [BATCH, 3]
    steps = range(STEPS)
    if policy == "fresh":  # what is replayed comes from the share of each process
        metrics = [step["metrics"] for step in worlds[1][0][policy]["steps"]]
        steps = [step for step in steps if metrics[step]["responses/fresh"]]
    assert len(steps) > 1
    for step in steps:
        assert two[step] == alone[step], step
        assert four[step] == alone[step], step


def test_prompts_of_a_step_get_random_numbers_of_their_own(worlds: Worlds) -> None:
    for step in steps_of(worlds[4], "on_policy"):
        assert len({tuple(group[0][1]) for group in step.values()}) > 1


@pytest.mark.parametrize("size", [2, 4])
def test_all_processes_decide_and_log_alike(worlds: Worlds, size: int) -> None:
    branches = [step["metrics"]["responses/on_policy"] for step in worlds[1][0]["replayed"]["steps"]]
    assert set(branches) == {0.0, 1.0}
    for number, (alone, *together) in enumerate(
        zip(*(one["replayed"]["steps"] for one in (*worlds[1], *worlds[size])), strict=True)
    ):
        for share in together:
            assert share["metrics"] == together[0]["metrics"], number
            for name in ("responses/on_policy", "responses/fresh", "replay/size"):
                assert share["metrics"].get(name) == alone["metrics"].get(name), number


@pytest.mark.parametrize("size", [2, 4])
def test_buffers_hold_no_response_twice_and_together_what_one_process_has(worlds: Worlds, size: int) -> None:
    [[alone], shares] = [
        [entries(one["fresh"]["state"]["buffer"]) for one in worlds[many]] for many in (1, size)
    ]
    assert len(alone) == 41
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1
    together = Counter(entry for share in shares for entry in share)
    newest = max(version for _, _, version in alone)
    assert {one for one in together if one[2] == newest} == {one for one in alone if one[2] == newest}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("before", [1, 2, 4])
def test_dealt_out_to_other_processes_no_entry_is_lost(
    worlds: Worlds, before: int, size: int, tmp_path: Path
) -> None:
    states = [one["replayed"]["state"] for one in worlds[before]]
    held = [entry for state in states for entry in entries(state["buffer"])]
    policy = AdaptiveConfig(student_share=0.8, fresh_share=0.4, capacity=41)
    shares = []
    for rank in range(size):
        running = policy.build(context(tmp_path, Clock(), prompts=40, world=Ranks(rank, size)))
        running.load_state_dict(running.dealt_out(states))
        shares.append(entries(running.state_dict()["buffer"]))
    assert sorted(entry for share in shares for entry in share) == sorted(held)
    for share in shares:
        versions = [version for _, _, version in share]
        assert versions == sorted(versions)  # the oldest are still the first that make room


def test_hidden_states_and_uses_move_with_their_entries(worlds: Worlds, tmp_path: Path) -> None:
    around = context(tmp_path, Clock(), prompts=40)
    prompts = {prompt.id: prompt for prompt in around.prompts}
    states = []
    for process in worlds[2]:
        state = process["replayed"]["state"]["buffer"]
        hidden = [tokens.double() for tokens in state["tokens"].split(state["lengths"].tolist())]
        states.append({**state, "teacher_hidden": hidden, "uses": state["tokens"][: len(hidden)].long()})
    uses = {}
    for state in states:
        uses |= dict(zip(entries(state), state["uses"].tolist(), strict=True))
    for rank in range(3):
        share = dealt_out(states, prompts, rank, 3)
        for response, hidden in zip(unpack(share, prompts), share["teacher_hidden"], strict=True):
            assert hidden.tolist() == list(response.token_ids)
        for entry, used in zip(entries(share), share["uses"].tolist(), strict=True):
            assert uses[entry] == used


def entries(state: dict[str, Any]) -> list[tuple[str, tuple[int, ...], int]]:
    """(id of the prompt, response, its version) of each entry of a buffer."""
    tokens = [tuple(one.tolist()) for one in state["tokens"].split(state["lengths"].tolist())]
    return list(zip(state["prompts"], tokens, state["versions"].tolist(), strict=True))
