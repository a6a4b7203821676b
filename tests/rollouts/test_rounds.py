"""Rounds as files: written bit by bit, by one process or several, filtered, paired; on real tiny models."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.rollouts.contexts import Clock, at, context

from stillhouse.core.seeds import derived_seed
from stillhouse.core.types import Response
from stillhouse.engines import Sampling
from stillhouse.errors import DataError, ModelError
from stillhouse.rollouts import REGISTRY, RolloutContext
from stillhouse.rollouts.offline.generation import GenerationOptions, GenerationRequest, generate_stage
from stillhouse.rollouts.offline.pairs import PairsConfig
from stillhouse.rollouts.offline.scoring import mean_logprobs
from stillhouse.rollouts.offline.stage_files import StageFile, read_header, read_rows


def words(ids: Sequence[int]) -> str:
    """Tokens as text: one word for each, the end token left out."""
    return " ".join(f"w{token}" for token in ids if token != tiny.END)


def around(folder: Path, clock: Clock | None = None, **more: Any) -> RolloutContext:
    made = context(folder, clock or Clock(), **more)
    assert made.models is not None
    models = {"student": made.models.student, "teacher": made.models.teacher}
    score = {
        name: lambda responses, model=model: mean_logprobs(model, responses, tiny.PAD, tiny.VOCAB)
        for name, model in models.items()
    }
    return replace(made, decode=words, scorers=score)


def policy(options: dict[str, Any], where: RolloutContext) -> Any:
    return REGISTRY.parse({"kind": "pairs", **options}).build(where)


def drawn(running: Any, where: RolloutContext, step: int = 0) -> list[list[Response]]:
    groups: list[list[Response]] = running.draw(None, where.prompts, at(step))
    return groups


def request(where: RolloutContext, samples: int = 1) -> GenerationRequest:
    return GenerationRequest(
        where.prompts, "student", where.student, 77, Sampling(max_tokens=8), samples_per_prompt=samples
    )


HEAD = {"stage": "responses", "seed": 77}


def test_chunks_and_processes_change_nothing(tmp_path: Path) -> None:
    where = around(tmp_path)
    assert where.student is not None
    at_once = where.student.generate(where.prompts, 77, Sampling(max_tokens=8))
    whole = generate_stage(
        tmp_path / "whole.jsonl", request(where), GenerationOptions(decode=words), HEAD, ""
    )
    assert whole is not None
    assert [sample.response for sample in whole] == at_once
    generate_stage(
        tmp_path / "chunks.jsonl", request(where), GenerationOptions(decode=words, chunk_size=5), HEAD, ""
    )
    for rank in (2, 0, 1):
        options = GenerationOptions(rank, 3, decode=words, chunk_size=2, wait_for_others=False)
        made = generate_stage(tmp_path / "shards.jsonl", request(where), options, HEAD, "")
        assert (made is None) == (rank != 1)
    files = [(tmp_path / f"{name}.jsonl").read_bytes() for name in ("whole", "chunks", "shards")]
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("cut", [0.0, 0.03, 0.4, 0.77, 1.0])
def test_interrupted_anywhere_it_goes_on_without_writing_again(tmp_path: Path, cut: float) -> None:
    where = around(tmp_path)
    options = GenerationOptions(decode=words, chunk_size=5)
    generate_stage(tmp_path / "whole.jsonl", request(where), options, HEAD, "")
    wanted = (tmp_path / "whole.jsonl").read_bytes()
    stage = StageFile(tmp_path / "torn.jsonl", HEAD)
    stage.shard.write_bytes(wanted[: int(cut * len(wanted))])
    begun = stage.partial_rows()
    assert where.student is not None
    asked: list[int] = []
    generate = where.student.engine.generate

    def counting(prompts: Any, sampling: Any, seed: int, *, sample_ids: Any = None, **more: Any) -> Any:
        asked.extend(sample_ids)
        return generate(prompts, sampling, seed, sample_ids=sample_ids, **more)

    where.student.engine.generate = counting  # type: ignore[method-assign]
    generate_stage(stage.path, request(where), options, HEAD, "")
    assert stage.path.read_bytes() == wanted
    whole_chunks = {number for number in begun if all(n in begun for n in _chunk(number, 5, 12))}
    assert sorted(asked) == [number for number in range(12) if number not in whole_chunks]


def _chunk(number: int, size: int, total: int) -> range:
    start = number // size * size
    return range(start, min(start + size, total))


def test_several_samples_for_a_prompt_differ_and_the_first_is_that_of_one(tmp_path: Path) -> None:
    where = around(tmp_path)
    one = generate_stage(tmp_path / "one.jsonl", request(where), GenerationOptions(decode=words), HEAD, "")
    three = generate_stage(
        tmp_path / "three.jsonl", request(where, 3), GenerationOptions(decode=words), HEAD, ""
    )
    assert one is not None
    assert three is not None
    assert [s.response for s in three[:12]] == [s.response for s in one]
    assert [(s.response.prompt.id, s.index) for s in three[12:14]] == [("train:0", 1), ("train:1", 1)]
    assert len({s.response.token_ids for s in three}) > 24


def test_a_round_is_read_back_and_log_probabilities_with_it(tmp_path: Path) -> None:
    where = around(tmp_path)
    options = {"student_sampling": {"logprobs": True, "max_tokens": 8}}
    first, second = policy(options, where), policy(options, where)
    wanted = drawn(first, where)
    assert where.student is not None
    where.student.engine.generate = None  # type: ignore[assignment, method-assign]
    assert drawn(second, where) == wanted
    assert all(group[1].logprobs for group in wanted)


def test_the_teacher_writes_once_and_the_student_each_epoch(tmp_path: Path) -> None:
    clock = Clock()
    where = around(tmp_path, clock)
    running = policy({}, where)
    one = drawn(running, where)
    clock.step = 10
    two = drawn(running, where, step=10)
    assert [g[0] for g in one] == [g[0] for g in two]
    assert [g[1].token_ids for g in one] != [g[1].token_ids for g in two]
    assert {g[1].student_version for g in two} == {10}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "student-0.jsonl",
        "student-1.jsonl",
        "teacher-0.jsonl",
    ]
    rows = list(read_rows(tmp_path / "student-1.jsonl"))
    assert [(r["by"], r["source"], r["response"]) for r in rows] == [
        ("student", "student", words(g[1].token_ids)) for g in two
    ]


def test_a_round_of_other_weights_is_kept_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    where = around(tmp_path)
    old = drawn(policy({}, where), where)
    assert where.student is not None
    new = replace(where, student=replace(where.student, fingerprint=lambda: "other"))
    with caplog.at_level(logging.WARNING, "stillhouse"):
        again = drawn(policy({}, new), new)
    assert 'model is "unknown", not "other"' in caplog.text
    assert "student-0.stale-1.jsonl" in caplog.text
    assert (tmp_path / "student-0.stale-1.jsonl").exists()
    assert again == old  # the weights are the same in truth
    assert (read_header(tmp_path / "student-0.jsonl") or {})["model"] == "other"


def test_in_the_middle_of_a_round_its_own_weights_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    where = around(tmp_path)
    assert where.student is not None
    first = policy({}, where)
    wanted = drawn(first, where)
    moved = replace(where, student=replace(where.student, fingerprint=lambda: "moved on"))
    resumed = policy({}, moved)
    resumed.load_state_dict(first.state_dict())
    assert drawn(resumed, where, step=3) == wanted
    assert not caplog.text
    (tmp_path / "student-0.jsonl").unlink()
    lost = policy({}, moved)
    lost.load_state_dict(first.state_dict())
    with caplog.at_level(logging.WARNING, "stillhouse"):
        drawn(lost, where, step=3)
    assert "is gone" in caplog.text
    assert (read_header(tmp_path / "student-0.jsonl") or {})["model"] == "moved on"


RARE = {"kind": "format", "forbid": r"w2[0-4]\b"}
"""About half of the random texts have none of these five tokens."""


def passes(response: Response) -> bool:
    return not set(response.token_ids) & set(range(20, 25))


def summary(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((folder / "curation.json").read_text())["rounds"]["0"]
    return told


def test_a_prompt_is_dropped_with_either_side_and_another_takes_its_place(tmp_path: Path) -> None:
    where = around(tmp_path)
    plain = drawn(policy({}, where), where)
    running = policy({"filters": [RARE]}, where)
    groups = drawn(running, where)
    fine = {g[1].prompt.id for g in plain if all(map(passes, g))}
    for side in (0, 1):
        assert any(not passes(g[side]) and passes(g[1 - side]) for g in plain), "each side drops some alone"
    assert 0 < len(fine) < 12
    for before, after in zip(plain, groups, strict=True):
        if before[1].prompt.id in fine:
            assert after == before
        else:
            assert after[0].prompt.id == after[1].prompt.id
            assert after[1].prompt.id in fine
    few = where.prompts[:2]
    assert len({g[0].prompt.id for g in running.draw(None, few, at(0))}) == 2, (
        "none twice while others are free"
    )
    facts = running.metrics()
    assert facts["curation/kept"] == pytest.approx(len(fine) / 12)
    assert facts["curation/replaced"] == sum(prompt.id not in fine for prompt in few) / 2
    told = summary(tmp_path)
    assert told["kept"] == len(fine)
    bad = sum(not passes(g[1]) for g in plain)
    assert told["sources"]["student"]["dropped"] == {"format": {"has a forbidden pattern": bad}}
    assert all(example["id"] not in fine for example in told["examples"])
    assert len(told["examples"]) == 6, "three for each side"


def test_dropped_responses_are_written_again_with_fresh_seeds(tmp_path: Path) -> None:
    where = around(tmp_path)
    plain = drawn(policy({}, where), where)
    options = {"filters": [RARE], "resample": 4}
    groups = drawn(policy(options, where), where)
    assert all(passes(response) for group in groups for response in group)
    told = summary(tmp_path)
    assert told["kept"] > sum(all(map(passes, g)) for g in plain)
    assert told["sources"]["student"]["resampled"] >= sum(not passes(g[1]) for g in plain)
    for before, after in zip(plain, groups, strict=True):
        for side in (0, 1):
            if passes(before[side]) and after[side].prompt == before[side].prompt:
                assert after[side] == before[side], "what was kept is not written again"
    names = ("student-0.jsonl", *sorted(p.name for p in tmp_path.glob("student-0.resample-*.jsonl")))
    assert len(names) > 1
    assert len({(read_header(tmp_path / name) or {})["seed"] for name in names}) == len(names)
    assert drawn(policy(options, where), where) == groups, "read back the same"


def test_verdicts_on_disk_stand(tmp_path: Path) -> None:
    """A program that is just in time once and too late the next time must not change a resumed run."""
    where = around(tmp_path)
    drawn(policy({"filters": [RARE]}, where), where)
    path = tmp_path / "curation-0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    saved = json.loads(lines[1])["id"]
    path.write_text("".join([lines[0], *(line for line in lines[1:] if json.loads(line)["id"] != saved)]))
    again = policy({"filters": [RARE]}, where)
    assert saved in {group[0].prompt.id for group in drawn(again, where)}


def test_a_round_of_which_less_than_half_is_left_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shares = []
    for number, pattern in enumerate((r"w20\b", r"w2[0-4]\b")):
        where = around(tmp_path / str(number))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "stillhouse"):
            drawn(policy({"filters": [{"kind": "format", "forbid": pattern}]}, where), where)
        kept = summary(tmp_path / str(number))["kept"]
        assert (f"filters dropped {12 - kept} of 12 prompts" in caplog.text) == (kept < 6), kept
        shares.append(kept / 12)
    assert min(shares) < 0.5 < max(shares)


def test_a_round_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    where = around(tmp_path)
    running = policy({"filters": [{"kind": "format", "match": "never"}]}, where)
    with pytest.raises(DataError, match=r"dropped all 12 prompts: 12 x format \(teacher: lacks"):
        drawn(running, where)


def test_teachers_side_from_the_data_set_another_generator_and_the_teacher(tmp_path: Path) -> None:
    where = around(tmp_path)
    prompts = [replace(p, response_ids=None) if n >= 4 else p for n, p in enumerate(where.prompts)]
    others = {p.content: Response(p, (9, 8, tiny.END), "teacher") for p in prompts[2:7]}
    where = replace(where, prompts=prompts, external_responses={"gemma": others})
    sides = ["fixed", {"name": "gemma", "data": "gemma.jsonl"}, "teacher"]
    groups = drawn(policy({"teacher_responses": sides}, where), where)
    assert [g[0].token_ids for g in groups[:4]] == [p.response_ids for p in prompts[:4]]
    assert [g[0].token_ids for g in groups[4:7]] == [(9, 8, tiny.END)] * 3
    assert {g[0].source for g in groups} == {"teacher"}
    rows = list(read_rows(tmp_path / "teacher-0.jsonl"))
    assert [r["by"] for r in rows] == ["fixed"] * 4 + ["gemma"] * 3 + ["teacher"] * 5
    assert where.teacher is not None
    seed = derived_seed(where.seed, "teacher", 0)
    assert groups[9][0] == where.teacher.generate(prompts, seed)[9], "the same text as if it had written all"


def test_prompts_without_any_response_are_counted_as_missing(tmp_path: Path) -> None:
    where = around(tmp_path)
    others = {p.content: Response(p, (9, tiny.END), "teacher") for p in where.prompts[:5]}
    where = replace(where, external_responses={"gemma": others}, teacher=None)
    running = policy({"teacher_responses": {"name": "gemma", "data": "gemma.jsonl"}, "resample": 2}, where)
    groups = drawn(running, where)
    assert {g[0].prompt.id for g in groups} == {p.id for p in where.prompts[:5]}
    told = summary(tmp_path)
    assert told["sources"]["teacher"]["dropped"] == {"missing": {"no response": 7}}
    assert told["sources"]["student"]["resampled"] == 0, "nothing is written in vain"


def test_with_a_fresh_student_at_each_step_the_teachers_side_is_read_once(tmp_path: Path) -> None:
    where = around(tmp_path)
    running = policy({"refresh": "step"}, where)
    first = drawn(running, where)
    (tmp_path / "teacher-0.jsonl").unlink()
    second = drawn(running, where, 1)
    assert [g[0] for g in first] == [g[0] for g in second]
    assert [g[1] for g in first] != [g[1] for g in second]
    assert not (tmp_path / "teacher-0.jsonl").exists()


def test_prompts_without_any_response_are_named_where_there_are_no_rounds(tmp_path: Path) -> None:
    where = around(tmp_path)
    others = {p.content: Response(p, (9, tiny.END), "teacher") for p in where.prompts[:5]}
    where = replace(where, external_responses={"gemma": others}, teacher=None)
    side = {"name": "gemma", "data": "gemma.jsonl"}
    running = policy({"teacher_responses": side, "refresh": "step"}, where)
    with pytest.raises(DataError, match=r"7 of 12 prompts have no response, first train:5.*refresh: epoch"):
        drawn(running, where)


def test_likelihoods_are_kept_and_filter(tmp_path: Path) -> None:
    where = around(tmp_path)
    options = {
        "filters": [{"kind": "logprob_floor", "drop_share": 0.25}],
        "scores": ["student"],
        "chunk_size": 5,
    }
    drawn(policy(options, where), where)
    rows = list(read_rows(tmp_path / "teacher-0.jsonl"))
    lowest = sorted(rows, key=lambda row: row["scores"]["teacher"])[:3]
    dropped = {row["id"] for row in read_rows(tmp_path / "curation-0.jsonl")}
    assert dropped == {row["id"] for row in lowest}
    student = list(read_rows(tmp_path / "student-0.jsonl"))
    assert all(set(row["scores"]) == {"student"} for row in student)
    with pytest.raises(ModelError, match="needs its model in this process"):
        policy(options, replace(where, scorers={}))


def test_generated_is_filtered_too(tmp_path: Path) -> None:
    where = around(tmp_path)
    options = {"kind": "generated", "by": "teacher", "filters": [RARE]}
    groups = REGISTRY.parse(options).build(where).draw(None, where.prompts, at(0))
    assert all(len(group) == 1 and passes(group[0]) for group in groups)
    assert 0 < summary(tmp_path)["kept"] < 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refresh": "step", "filters": ["empty"]}, "need whole rounds"),
        ({"teacher_responses": ["teacher", "fixed"]}, "teacher must come last"),
        ({"teacher_responses": {"name": "student", "data": "a.jsonl"}}, "a name of its own"),
        ({"filters": ["truncate"]}, "did you mean 'truncated'"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairsConfig.model_validate({"kind": "pairs", **options})


def test_shards_that_a_kill_left_beside_the_finished_file_go(tmp_path: Path) -> None:
    where = around(tmp_path)
    options = GenerationOptions(decode=words)
    path = tmp_path / "whole.jsonl"
    before = generate_stage(path, request(where), options, HEAD, "")
    stage = StageFile(path, HEAD)
    stage.append(stage.rows() or [])  # as it was before the shard was deleted
    other = StageFile(path, {**HEAD, "seed": -1}, index=7, count=8)
    other.append([])
    assert len(stage.shards()) == 2
    assert generate_stage(path, request(where), options, HEAD, "") == before
    assert stage.shards() == [other.shard], "a shard of another generation is not ours to delete"
