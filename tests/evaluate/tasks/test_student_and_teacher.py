"""Fidelity, diversity, speculative decoding and cost of a student beside its teacher."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from tests.evaluate.contexts import context, models

from stillhouse.core.journal import Journal
from stillhouse.errors import ConfigError
from stillhouse.evaluate.metrics.distributions import Calibration
from stillhouse.evaluate.metrics.text import self_bleu
from stillhouse.evaluate.tasks import REGISTRY, TaskResult
from stillhouse.files import locate
from stillhouse.report.scores import prompt_sums


def rows(folder: Path, count: int = 4) -> dict[str, Any]:
    lines = (locate("package:stillhouse/demo/data") / "eval.jsonl").read_text("utf-8").splitlines()
    (folder / "rows.jsonl").write_text("\n".join(lines[:count]) + "\n", "utf-8")
    return {"kind": "jsonl", "path": str(folder / "rows.jsonl")}


def measured(kind: str, system: str = "student after", **options: Any) -> TaskResult:
    return REGISTRY.parse({"kind": kind, **options}).evaluate(context(system))


def test_calibration_by_hand() -> None:
    calibration = Calibration()
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.62, 0.38], [0.38, 0.62]]).log()
    calibration.update(logits[:1], torch.tensor([0]))
    calibration.update(logits[1:], torch.tensor([1, 0, 1]))
    assert calibration.error() == pytest.approx((2 * abs(0.5 - 0.9) + 2 * abs(1 - 0.62)) / 4)


def test_a_model_is_calibrated_on_its_own_text_and_near_itself(tmp_path: Path) -> None:
    own = {"data": rows(tmp_path), "sampling": {"max_tokens": 48}, "seeds": [1, 2, 3]}
    teacher = measured("fidelity", "teacher", **own).metrics
    student = measured("fidelity", **own).metrics
    assert set(teacher) == {
        f"{name}{text}" for name in ("loss", "calibration_error") for text in ("", "_on_own_text")
    }
    assert teacher["calibration_error_on_own_text"] < 0.1
    measures = {"kl_to_teacher", "reverse_kl_to_teacher", "tvd", "top1_agreement", "calibration_error"}
    measures |= {"loss", "teacher_calibration_error"}
    assert set(student) == {
        f"{n}{text}" for n in measures for text in ("", "_on_own_text", "_on_teacher_text")
    }
    assert student["teacher_calibration_error_on_teacher_text"] == pytest.approx(
        teacher["calibration_error_on_own_text"]
    )
    # Each divergence is largest on the text of the model whose distribution it averages over.
    assert student["reverse_kl_to_teacher_on_own_text"] > student["reverse_kl_to_teacher_on_teacher_text"]
    assert student["kl_to_teacher_on_teacher_text"] > 0.1


def test_both_texts_are_kept(tmp_path: Path) -> None:
    found = measured("fidelity", data=rows(tmp_path, 2), sampling={"max_tokens": 8}, seeds=[1])
    assert [set(row) for row in found.rows] == [
        {"id", "seed", "prompt", "references", "response", "teacher_response", "tokens", "finished", "sums"}
    ] * 2
    # Every measure that is a mean over tokens is accounted for by the prompts.
    accounted = prompt_sums(found.metrics, found.rows)
    assert {name for name in found.metrics if "calibration" not in name} <= set(accounted)
    assert found.rows[0]["response"] != found.rows[0]["teacher_response"]


def test_the_curve_trades_quality_for_diversity(tmp_path: Path) -> None:
    found = measured(
        "curve",
        "teacher",
        data=rows(tmp_path, 6),
        temperatures=[0.5, 1.0, 1.3],
        sampling={"max_tokens": 40},
        seeds=[1, 2],
    )
    points = found.metrics["curve"]
    assert [point["temperature"] for point in points] == [0.5, 1.0, 1.3]
    assert points[0]["rouge_l"] > points[2]["rouge_l"]
    assert points[0]["self_bleu"] > points[2]["self_bleu"]
    assert points[0]["distinct_2"] < points[2]["distinct_2"]
    assert found.metrics["rouge_l"] == points[1]["rouge_l"]
    here = [row for row in found.rows if row["temperature"] == 0.5]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    by_hand = [scorer.score_multi(r["references"], r["response"])["rougeL"].fmeasure for r in here]
    assert points[0]["rouge_l"] == pytest.approx(100 * fmean(by_hand), abs=1e-3)
    texts = [[row["response"] for row in here if row["seed"] == seed] for seed in (1, 2)]
    assert points[0]["self_bleu"] == pytest.approx(fmean(self_bleu(one) for one in texts))


def test_an_interrupted_curve_keeps_its_points(tmp_path: Path) -> None:
    task = REGISTRY.parse(
        {
            "kind": "curve",
            "data": rows(tmp_path, 2),
            "temperatures": [0.5, 1.0],
            "sampling": {"max_tokens": 8},
            "seeds": [1],
        }
    )

    def kept(header: dict[str, Any], name: str) -> Journal:
        return Journal(tmp_path / f"{name}.jsonl", header)

    first = task.evaluate(context(open_journal=kept))
    assert {path.name for path in tmp_path.glob("T=*.jsonl")} == {"T=0.5.jsonl", "T=1.jsonl"}
    again = task.evaluate(context(open_journal=kept))
    assert again == first  # the time of writing included: nothing was written again


def test_speculative_decoding_is_counted_and_timed(tmp_path: Path) -> None:
    found = measured(
        "speculative",
        data=rows(tmp_path, 4),
        gammas=[1, 4],
        gamma=2,
        sampling={"temperature": 1.0, "max_tokens": 24},
    )
    points = found.metrics["by_gamma"]
    assert [point["gamma"] for point in points] == [1, 2, 4]
    for point in points:
        assert 1 <= point["block_efficiency"] <= point["gamma"] + 1
        assert point["acceptance_rate"] == pytest.approx(point["expected_acceptance_rate"], abs=0.2)
    assert points[0]["block_efficiency"] < points[2]["block_efficiency"]
    assert found.metrics["overlap_on_teacher_text"] == pytest.approx(
        found.metrics["expected_acceptance_rate"], abs=0.15
    )
    assert found.metrics["speed_up"] > 0
    assert {"acceptance_rate", "block_efficiency"} <= set(prompt_sums(found.metrics, found.rows))
    assert max(abs(found.metrics[f"{whose}distribution_z"]) for whose in ("", "assisted_")) < 4
    assert models()[2].generation_config.num_assistant_tokens != 2  # what was set is put back
    assert len(found.rows) == 4


def test_speculative_decoding_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sampling.top_p: is not supported.*got 0.9"):
        measured("speculative", data=rows(tmp_path), sampling={"top_p": 0.9})
    with pytest.raises(ConfigError, match="needs a teacher"):
        measured("speculative", "teacher", data=rows(tmp_path))


def test_cost_of_student_and_teacher() -> None:
    found = measured("cost", batch_size=4, prompt_tokens=32, new_tokens=16, repeats=3)
    _, teacher, student = models()
    count = sum(p.numel() for p in student.parameters())
    assert found.metrics["parameters"] == count
    assert found.metrics["bytes"] == 4 * count
    assert found.metrics["size_ratio"] == count / sum(p.numel() for p in teacher.parameters())
    assert {
        "prompt_tokens_per_second", "first_token_seconds", "tokens_per_second", "prompt_speed_up",
        "first_token_speed_up", "decode_speed_up",
    } <= set(found.metrics)  # fmt: skip
    assert all(value > 0 for value in found.metrics.values())
    assert json.dumps(found.settings)
    assert "prompt_speed_up" not in measured("cost", "teacher", repeats=1, batch_size=1).metrics
