"""On-policy, batched and speculative responses, on real tiny models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.rollouts.contexts import FACTS, Clock, at, context

from stillhouse.data.collate import collate
from stillhouse.engines import Sampling
from stillhouse.engines.mixture import MixtureEngine, MixtureModel
from stillhouse.models import head_of, hidden_rows
from stillhouse.rollouts import REGISTRY
from stillhouse.rollouts.on_policy import BatchedConfig, OnPolicyConfig
from stillhouse.rollouts.speculative import SpeculativeConfig


def test_on_policy_writes_afresh_and_the_same_for_the_same_step(tmp_path: Path) -> None:
    clock = Clock()
    around = context(tmp_path, clock)
    policy = OnPolicyConfig().build(around)
    one, again, other = (policy.draw(None, around.prompts[:4], at(step)) for step in (3, 3, 4))
    assert one == again
    assert one != other
    assert all(group[0].source == "student" for group in one)


def test_batched_uses_each_response_once_and_every_prompt_before_any_twice(tmp_path: Path) -> None:
    clock = Clock()
    around = context(tmp_path, clock)
    policy = BatchedConfig(generate_batches=3).build(around)
    seen, versions = [], []
    for step in range(6):
        clock.step = step
        drawn = [group[0] for group in policy.draw(None, around.prompts[:2], at(step))]
        seen += [response.prompt.id for response in drawn]
        versions.append({response.student_version for response in drawn})
    assert sorted(seen) == sorted(prompt.id for prompt in around.prompts)
    assert versions == [{0}, {0}, {0}, {3}, {3}, {3}]


def test_batched_goes_on_in_the_middle_of_a_round(tmp_path: Path) -> None:
    clock = Clock()
    around = context(tmp_path, clock)
    straight, first, second = (BatchedConfig(generate_batches=4).build(around) for _ in range(3))
    wanted = [straight.draw(None, around.prompts[:2], at(step)) for step in range(9)]
    got = [first.draw(None, around.prompts[:2], at(step)) for step in range(6)]
    second.load_state_dict(first.state_dict())
    got += [second.draw(None, around.prompts[:2], at(step)) for step in range(6, 9)]
    assert got == wanted


def test_batched_uses_a_round_several_times_each_time_in_another_order(tmp_path: Path) -> None:
    clock = Clock()
    around = context(tmp_path, clock)
    straight, first, second = (BatchedConfig(generate_batches=3, epochs=2).build(around) for _ in range(3))
    drawn = []
    for step in range(8):
        clock.step = step
        drawn.append([group[0] for group in straight.draw(None, around.prompts[:2], at(step))])
    once, again = ([response for step in part for response in step] for part in (drawn[:3], drawn[3:6]))
    assert once != again
    assert sorted(r.prompt.id for r in once) == sorted(r.prompt.id for r in again)
    assert {r.student_version for r in once + again} == {0}
    assert {r.student_version for step in drawn[6:] for r in step} == {6}
    got = []
    for step in range(8):
        clock.step = step
        policy = first if step < 4 else second
        if step == 4:
            second.load_state_dict(first.state_dict())
        got.append([group[0] for group in policy.draw(None, around.prompts[:2], at(step))])
    assert got == drawn


def test_batched_text_can_be_written_with_the_teachers_help(tmp_path: Path) -> None:
    around = context(tmp_path, Clock())
    alone, helped = (
        BatchedConfig(teacher_share=share, sampling=Sampling(max_tokens=8, logprobs=True)).build(around)
        for share in (0.0, 0.5)
    )
    texts = [policy.draw(None, around.prompts[:2], at(0)) for policy in (alone, helped)]
    assert texts[0] != texts[1]
    assert all(group[0].source == "student" and group[0].logprobs for group in texts[1])


def test_speculative_text_is_the_teachers_choice_where_the_student_was_refused(tmp_path: Path) -> None:
    around = context(tmp_path, Clock())
    policy = SpeculativeConfig(accept_top_k=3, block_size=4, teacher_top_p=0.01).build(around)
    responses = [group[0] for group in policy.draw(None, around.prompts[:5], at(0))]
    assert 0 < policy.metrics()["responses/accepted"] < 1
    assert around.models is not None
    for response in responses:
        batch = collate([response], tiny.PAD)
        with torch.no_grad():
            logits = head_of(around.models.teacher).logits(hidden_rows(around.models.teacher, batch))
        labels = batch.row_labels()
        rank = (logits > logits.gather(1, labels[:, None])).sum(1)
        assert int(rank.max()) < 3, "every token is accepted, or the teacher's first choice"
        assert response.finished == (response.token_ids[-1] == tiny.END)
        assert len(response.token_ids) <= 8


def test_speculative_that_accepts_everything_is_the_students_own_text(tmp_path: Path) -> None:
    around = context(tmp_path, Clock())
    greedy = Sampling(temperature=0.0, max_tokens=8)
    policy = SpeculativeConfig(accept_top_k=tiny.VOCAB, block_size=3, sampling=greedy).build(around)
    assert around.student is not None
    mine = around.student.generate(around.prompts[:6], 0, greedy)
    theirs = [group[0] for group in policy.draw(None, around.prompts[:6], at(0))]
    assert [r.token_ids for r in theirs] == [r.token_ids for r in mine]
    assert policy.metrics()["responses/accepted"] == 1.0


def test_speculative_text_fills_the_context_and_no_block_goes_beyond(tmp_path: Path) -> None:
    longest = max(len(prompt.token_ids) for prompt in tiny.prompts(12))
    around = context(tmp_path, Clock(), positions=longest + 8)
    policy = SpeculativeConfig(accept_top_k=20, block_size=5).build(around)
    responses = [group[0] for group in policy.draw(None, around.prompts, at(0))]
    assert {len(response.token_ids) for response in responses if not response.finished} == {8}


def test_speculative_text_may_end_after_the_least_tokens_and_not_before(tmp_path: Path) -> None:
    """A block is shorter than `min_tokens`: text must still be able to end."""
    around = context(tmp_path, Clock(), prompts=60)
    sampling = Sampling(max_tokens=20, min_tokens=4)
    policy = SpeculativeConfig(accept_top_k=tiny.VOCAB, block_size=3, sampling=sampling).build(around)
    lengths = [len(g[0].token_ids) for g in policy.draw(None, around.prompts, at(0)) if g[0].finished]
    assert lengths
    assert min(lengths) > 4


def test_speculative_text_does_not_depend_on_who_else_is_written_for(tmp_path: Path) -> None:
    around = context(tmp_path, Clock())
    policy = SpeculativeConfig(accept_top_k=3, block_size=2).build(around)
    together = policy.draw(None, around.prompts[:6], at(0))
    assert policy.draw(None, around.prompts[:2], at(0)) == together[:2]


def test_tokens_of_speculative_text_are_counted(tmp_path: Path) -> None:
    written: list[int] = []
    around = context(tmp_path, Clock())
    assert around.student is not None
    around = replace(around, student=replace(around.student, on_tokens=written.append))
    drawn = SpeculativeConfig(block_size=4).build(around).draw(None, around.prompts[:3], at(0))
    assert sum(written) >= sum(len(group[0].token_ids) for group in drawn) > 0


def test_mixture_gives_the_probabilities_of_the_mixture(tmp_path: Path) -> None:
    """Log-probabilities that the decode loop reports against a forward pass of both models."""
    student, teacher = tiny.model(1).eval(), tiny.model(2, width=24, layers=3).eval()
    engine = MixtureEngine(MixtureModel(student, teacher, 0.2, tiny.VOCAB), FACTS)
    prompts = [prompt.token_ids for prompt in tiny.prompts(5)]
    for prompt, done in zip(
        prompts, engine.generate(prompts, Sampling(max_tokens=10, logprobs=True), seed=3), strict=True
    ):
        ids = torch.tensor([[*prompt, *done.token_ids]])
        with torch.no_grad():
            q, p = (model(ids).logits[0].softmax(-1) for model in (student, teacher))
        mixed = (0.8 * q + 0.2 * p).log()
        where = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
        wanted = mixed[where, ids[0, len(prompt) :]]
        assert done.logprobs is not None
        torch.testing.assert_close(torch.tensor(done.logprobs), wanted, atol=1e-4, rtol=1e-4)


def test_mixture_leaves_the_student_in_training(tmp_path: Path) -> None:
    around = context(tmp_path, Clock())
    assert around.models is not None
    around.models.student.train()
    OnPolicyConfig(teacher_share=0.3).build(around).draw(None, around.prompts[:2], at(0))
    assert around.models.student.training
    assert not around.models.teacher.training


@pytest.mark.parametrize(
    ("policy", "written"),
    [
        ({"kind": "fixed"}, {}),
        ({"kind": "on_policy"}, {"student": 40}),
        ({"kind": "batched", "generate_batches": 3, "epochs": 2}, {"student": 2 * 3 * 4}),
        ({"kind": "mixed", "student_share": 0.25}, {"student": 3 * 4}),
        ({"kind": "mixed", "student_share": 0.0}, {}),
        ({"kind": "mixed", "student_share": {"kind": "linear", "start": 0.0, "end": 1.0}}, {"student": 40}),
        (
            {"kind": "mixed", "student_share": 0.5, "base": {"kind": "generated", "by": "teacher"}},
            {"teacher": 12, "student": 20},
        ),
        ({"kind": "adaptive", "student_share": 0.5}, {"student": 20}),
    ],
    ids=str,
)
def test_responses_that_a_run_will_write_are_foretold(
    policy: dict[str, Any], written: dict[str, int]
) -> None:
    """Ten steps of four prompts out of twelve."""
    found = REGISTRY.parse(policy).generated_responses(prompts=12, steps=10, batch_size=4)
    assert {name: count for name, count in found.items() if count} == written


def test_a_share_of_all_or_nothing_tells_what_it_leaves_without_effect() -> None:
    for share, name in ((0.0, "sampling"), (1.0, "base")):
        given = {"kind": "mixed", "student_share": share, "sampling": {"max_tokens": 8}}
        assert list(REGISTRY.parse(given).options_without_effect()) == [name]
    assert REGISTRY.parse({"kind": "mixed", "student_share": 0.5}).options_without_effect() == {}
