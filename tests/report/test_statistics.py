"""Intervals, paired differences and seeds: against closed forms, known tables, and how often they hold."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.report import load_runs, summary_table
from stillhouse.report.comparison import comparison_tables
from stillhouse.report.metrics import metric_info
from stillhouse.report.ranking import best_students, differences_table
from stillhouse.report.scores import ResultScores, confidence_interval, prompt_sums
from stillhouse.report.seeds import common_name
from stillhouse.report.statistics import (
    bootstrap_interval,
    fewest_prompts,
    resampled,
    student_t,
    wilson_interval,
)
from stillhouse.report.systems import System, difference, gather
from tests.report.made_runs import make_run
from tests.report.reading import page


@pytest.mark.parametrize(
    ("share", "freedom", "known"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 4, 2.77645), (0.995, 3, 5.84091), (0.95, 149, 1.65514),
     (0.975, math.inf, 1.95996), (0.025, 2, -4.30265), (0.5, 7, 0.0)],
)  # fmt: skip
def test_quantiles_of_students_t(share, freedom, known):
    assert student_t(share, freedom) == pytest.approx(known, rel=2e-5, abs=1e-9)


def test_wilsons_interval_as_published():
    """Newcombe (1998), table I: 15 of 148 and 1 of 29, and none of 20."""
    assert wilson_interval(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson_interval(1 / 29, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)
    assert wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_the_spread_of_resampled_means_is_the_standard_error():
    values = np.random.default_rng(1).normal(50, 12, 400)
    drawn = resampled(values[:, None], np.ones((400, 1)))[:, 0]
    assert drawn.mean() == pytest.approx(values.mean(), abs=0.05)
    assert drawn.std() == pytest.approx(values.std() / 20, rel=0.04)
    assert (drawn == resampled(values[:, None], np.ones((400, 1)))[:, 0]).all()


def test_means_over_tokens_count_a_prompt_by_its_tokens():
    totals, tokens = np.array([[8.0], [30.0]]), np.array([[2.0], [10.0]])
    drawn = set(np.round(resampled(totals, tokens, 200)[:, 0], 6))
    assert drawn == {4.0, 3.0, round(38 / 12, 6)}


@pytest.mark.parametrize("prompts", [8, 60])
def test_an_interval_holds_the_truth_about_as_often_as_it_says(prompts):
    draw = np.random.default_rng(prompts)
    held = 0
    for _ in range(400):
        values = draw.normal(0, 1, prompts)
        low, high = bootstrap_interval(
            resampled(values[:, None], np.ones((prompts, 1)), 1000)[:, 0], prompts
        ) or (0, 0)
        held += low <= 0 <= high
    assert 0.92 <= held / 400 <= 0.985


def test_draws_are_paired():
    """A system that is better by the same on every prompt is told apart, however much prompts differ."""
    values = np.random.default_rng(0).normal(50, 30, 100)
    drawn = resampled(np.stack([values, values + 0.5], axis=1), np.ones((100, 2)))
    assert bootstrap_interval(drawn[:, 1] - drawn[:, 0], 100) == pytest.approx((0.5, 0.5))


def test_too_few_prompts_tell_nothing_apart():
    assert fewest_prompts() == 6  # by chance equal systems differ alike on five prompts in 1 of 16 cases
    assert fewest_prompts(12) > fewest_prompts()


def test_scores_come_from_the_rows_only_where_these_add_up():
    rows = [
        {"id": "a", "seed": 1, "rouge_l": 10.0, "finished": True, "sums": {"loss": [6.0, 3]}, "passed": 1.0},
        {"id": "a", "seed": 2, "rouge_l": 20.0, "finished": False, "passed": 0.0},
        {"id": "b", "seed": 1, "rouge_l": 40.0, "finished": True, "sums": {"loss": [1.0, 2]}, "passed": 0.0},
        {"id": "b", "seed": 2, "rouge_l": 30.0, "finished": True, "passed": 0.0},
    ]
    metrics = {"rouge_l": 25.0, "finished": 0.75, "loss": 1.4, "bleu": 12.0, "pass_at_1": 0.25,
               "pass_at_2": 0.5, "distinct_2": math.nan}  # fmt: skip
    found = prompt_sums(metrics, rows)
    assert found == {
        "rouge_l": {"a": (30.0, 2.0), "b": (70.0, 2.0)},
        "finished": {"a": (1.0, 2.0), "b": (2.0, 2.0)},
        "loss": {"a": (6.0, 3), "b": (1.0, 2)},
        "pass_at_1": {"a": (0.5, 1.0), "b": (0.0, 1.0)},
        "pass_at_2": {"a": (1.0, 1.0), "b": (0.0, 1.0)},
    }
    assert "rouge_l" not in prompt_sums({"rouge_l": 26.0}, rows)


def systems(folder: Path, *scores: list[float], seeds: tuple[Any, ...] = ()) -> list[System]:
    """Students with these scores on the same prompts; `seeds` makes them runs of one configuration."""
    for number, own in enumerate(scores):
        run = folder / f"run-{number}"
        (run / "evaluation").mkdir(parents=True)
        settings = {
            "train.lr": 1.0 if seeds else float(number),
            **({"train.seed": seeds[number]} if seeds else {}),
        }
        entries = {path: {"value": value, "origin": "default"} for path, value in settings.items()}
        (run / "provenance.json").write_text(json.dumps(entries))
        (run / "state.json").write_text(json.dumps({"name": f"kd-{number}", "state": "done"}))
        mean = sum(own) / len(own)
        found = {"system": "student after", "label": f"kd-{number}", "task": "e2e",
                 "metrics": {"rouge_l": mean}, "settings": {"prompts": len(own)}}  # fmt: skip
        (run / "evaluation/student-after.json").write_text(json.dumps(found))
        rows = [
            {"id": f"e2e:{n}", "seed": 1, "rouge_l": score, "response": "x"} for n, score in enumerate(own)
        ]
        (run / "evaluation/student-after.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return gather(load_runs([folder]))


def some_scores(prompts: int, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [min(95.0, max(5.0, draw.gauss(40, 12))) for _ in range(prompts)]


def test_a_little_more_is_not_best_alone(tmp_path):
    """+0.2 over 300 prompts, from noise: both are bold and the page says so."""
    base = some_scores(300)
    noise = random.Random(3)
    other = [score + 0.2 + noise.gauss(0, 6) for score in base]
    shift = (sum(other) - sum(base)) / 300 - 0.2
    found = systems(
        tmp_path / "runs", base, [score - shift for score in other], [score - 9 for score in base]
    )
    rouge = metric_info("rouge_l")
    assert {one.label for one in best_students(rouge, found)} == {"kd-0", "kd-1"}
    told = page([tmp_path / "runs"], tmp_path / "page.html")[1].text
    assert "kd-1 is first by ROUGE-L on 300 prompts, but cannot be told apart from kd-0" in told
    (table,) = comparison_tables(load_runs([tmp_path / "runs"]))
    assert [row[1].best for row in table.rows] == [True, True, False]
    assert table.title == "e2e (300 prompts)"
    apart = differences_table(rouge, found)
    assert apart is not None
    assert [(row["system"], row["told_apart"]) for row in apart.records()] == [
        ("kd-0", False),
        ("kd-2", True),
    ]
    assert apart.records()[1]["lower"] > 200


def test_the_same_on_every_prompt_but_a_bit_is_told_apart(tmp_path):
    base = some_scores(300)
    better, worse = systems(tmp_path, [score + 0.2 for score in base], base)
    apart = difference(metric_info("rouge_l"), better, worse)
    assert apart is not None
    assert apart.told_apart
    assert apart.value == pytest.approx(0.2)
    assert [one.label for one in best_students(metric_info("rouge_l"), [better, worse])] == ["kd-0"]


def test_three_prompts_choose_no_best(tmp_path):
    assert best_students(metric_info("rouge_l"), systems(tmp_path, [90.0, 91, 92], [10.0, 11, 12])) == []


def test_seeds_are_one_system_with_their_error(tmp_path):
    """Three seeds: the mean, its deviation, and an interval over prompts and seeds."""
    base = some_scores(200)
    runs = [[score + shift for score in base] for shift in (0.0, 1.0, 2.0)]
    (found,) = systems(tmp_path / "runs", *runs, seeds=(1, 2, 3))
    assert found.label == "kd (3 seeds)"
    assert found.metrics["rouge_l"] == pytest.approx(sum(base) / 200 + 1)
    assert found.metrics["rouge_l_std"] == pytest.approx(1.0)
    over_seeds = 4.30265 / math.sqrt(3)
    over_prompts = 1.972 * np.std(base, ddof=1) / math.sqrt(200)
    half = (found.metrics["rouge_l_high"] - found.metrics["rouge_l_low"]) / 2
    assert half == pytest.approx(math.hypot(over_seeds, over_prompts), rel=0.05)
    row = summary_table(load_runs([tmp_path / "runs"])).records()[0]
    assert (row["run"], row["prompts"]) == ("kd-0, kd-1, kd-2", 200)
    told = page([tmp_path / "runs"], tmp_path / "page.html")[1].text
    assert "kd (3 seeds)" in told
    assert "over the training seeds" in told


def test_over_few_seeds_a_share_stays_between_nothing_and_all():
    measured = {"finished": 0.84, "finished_std": 0.13, "rouge_l": 41.0, "rouge_l_std": 2.0}
    none = ResultScores({}, {})
    assert confidence_interval(measured, none, "finished", runs=2) == (0.0, 1.0), "Student's t reaches 1.17"
    low, high = confidence_interval(measured, none, "rouge_l", runs=2)
    assert (low, high) == pytest.approx(
        (41 - 12.706 * 2 / math.sqrt(2), 41 + 12.706 * 2 / math.sqrt(2)), rel=1e-3
    )


def test_two_runs_of_one_seed_are_no_two_seeds(tmp_path):
    assert len(systems(tmp_path, some_scores(20), some_scores(20, 1), seeds=(1, 1))) == 2


def test_seeds_are_part_of_how_sure_a_difference_is(tmp_path):
    """Equal on average, apart on every prompt of a single seed."""
    base = some_scores(100)
    kd = [[score + shift for score in base] for shift in (0.0, 3.0)]
    found = systems(tmp_path / "a", *kd, seeds=(1, 2))
    other = systems(tmp_path / "b", [score + 2.0 for score in base])
    both = gather(load_runs([tmp_path / "a", tmp_path / "b"]))
    assert len(found) == len(other) == 1
    rouge = metric_info("rouge_l")
    apart = difference(rouge, both[1], both[0])
    assert apart is not None
    assert not apart.told_apart
    single = systems(tmp_path / "c", kd[0], [score + 2.0 for score in base])
    told = difference(rouge, single[1], single[0])
    assert told is not None
    assert told.told_apart


@pytest.mark.parametrize(
    ("names", "shared"),
    [
        (("kd-seed-1", "kd-seed-2"), "kd"),
        (("kd_s1", "kd_s2"), "kd"),
        (("distillm2-1", "distillm2-2"), "distillm2"),
        (("gkd", "gkd"), "gkd"),
        (("kd-11", "kd-12"), "kd"),
        (("1", "2"), "1"),
    ],
)
def test_the_name_of_several_seeds(names, shared):
    assert common_name(names) == shared


def test_speeds_count_only_where_they_were_measured_for_their_own_sake(tmp_path):
    folder = make_run(tmp_path / "run")
    assert "Tokens/s" not in [column.heading for column in comparison_tables(load_runs([folder]))[0].columns]
    found = {"system": "student after", "label": "kd", "task": "cost", "settings": {"kind": "cost"},
             "metrics": {"tokens_per_second": 50.0, "decode_speed_up": 0.5}}  # fmt: skip
    (folder / "evaluation/student-after.cost.json").write_text(json.dumps(found))
    cost = comparison_tables(load_runs([folder]))[1]
    assert "Tokens/s" in [column.heading for column in cost.columns]


def test_a_draft_that_slows_the_teacher_down_is_told_in_words(tmp_path):
    folder = make_run(tmp_path / "run")
    for system, ratio in (("student before", 0.44), ("student after", 1.3)):
        metrics = {"acceptance_rate": 0.5, "speed_up": ratio}
        found = {"system": system, "label": system, "task": "draft", "metrics": metrics}
        found["settings"] = {"kind": "speculative"}
        (folder / f"evaluation/{system.replace(' ', '-')}.draft.json").write_text(json.dumps(found))
    words = "As a draft model student before makes the teacher slower: 0.44 times its own tokens per second."
    assert words in page([folder], tmp_path / "page.html")[1].text
    assert words in comparison_tables(load_runs([folder]))[1].note
    assert "student after makes" not in comparison_tables(load_runs([folder]))[1].note


def test_systems_of_one_name_are_told_apart_by_their_folder(tmp_path):
    base = some_scores(20)
    for number in (0, 1):
        systems(tmp_path / str(number), base)
        state = tmp_path / str(number) / "run-0/state.json"
        (tmp_path / str(number) / "run-0").rename(tmp_path / str(number) / f"kd-again-{number}")
        assert not state.exists()
        path = tmp_path / str(number) / f"kd-again-{number}" / "provenance.json"
        path.write_text(json.dumps({"train.lr": {"value": number, "origin": "default"}}))
    labels = [one.label for one in gather(load_runs([tmp_path / "0", tmp_path / "1"]))]
    assert labels == ["kd-0 · kd-again-0", "kd-0 · kd-again-1"]
