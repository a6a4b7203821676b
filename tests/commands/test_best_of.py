"""The best of several responses: by the majority for `pairs`, by a reward model for `curate --best`."""

from __future__ import annotations

from pathlib import Path

import yaml

from stillhouse.data.datasets import dataset_at
from stillhouse.data.reading import Reading
from stillhouse.files import STAGE, read_jsonl, write_jsonl
from stillhouse.models import load_reward_model, rewards
from stillhouse.rollouts.offline.stage_files import stage_header
from tests.workshop import Workshop

ANSWERS = {"2+2?": ["4", "it is 4.0", "5"], "1+1?": ["2", "3"], "Why?": ["because", "so"]}


def written(folder: Path) -> None:
    """Answers of a teacher, and of a student that agrees with nobody or with the majority."""
    rows = [
        {"prompt": prompt, "response": text, "source": "teacher"}
        for prompt, texts in ANSWERS.items()
        for text in texts
    ]
    rows += [{"prompt": "2+2?", "response": text, "source": "student"} for text in ("= 4", "7", "7.0", "7")]
    header = stage_header("responses")
    numbered = [{**row, "number": n, "id": row["prompt"], "sample": n} for n, row in enumerate(rows)]
    write_jsonl(folder / "answers.jsonl", [{STAGE: header}, *numbered])


def test_the_majority_of_the_teacher_labels_its_own_answers_and_the_students(workshop: Workshop) -> None:
    written(workshop.folder)
    said = workshop.stillhouse("pairs", "answers.jsonl", "--rank", "majority", "-o", "pairs-by.jsonl")
    assert said.code == 0, said.err
    [pair] = read_jsonl(workshop.folder / "pairs-by.jsonl")[1:]
    assert (pair["chosen"], pair["rejected"], pair["scores"]) == ("4", "5", [1, 1, 0, 1, 0, 0, 0])
    rank = "{kind: majority, voters: all}"
    said = workshop.refused("pairs", "answers.jsonl", "--rank", rank, "-o", "all.jsonl")
    assert "3 x unanswerable" in said, "three say 4 and three say 7"


def test_a_reward_model_picks_the_best_of_what_was_written(workshop: Workshop) -> None:
    config = {
        "model": "student",
        "data": {"train": "pairs.jsonl", "template": "plain", "max_prompt": 64, "max_response": 24},
        "max_steps": 2,
        "batch_size": 8,
    }
    (workshop.folder / "reward.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    said = workshop.stillhouse("reward", "reward.yaml", "lr=0.01")
    assert said.code == 0, said.err
    assert "of the pairs" in said.out
    assert "is there already" in workshop.refused("reward", "reward.yaml")
    command = ("generate", "--model", "student", "--data", "train.jsonl", "--limit", "3", "-n", "3")
    said = workshop.stillhouse(*command, "--max-tokens", "6", "--template", "plain", "-o", "written.jsonl")
    assert said.code == 0, said.err
    best = (
        "curate",
        "written.jsonl",
        "--best",
        "{kind: reward, model: runs/reward/model}",
        "-o",
        "best.jsonl",
    )
    said = workshop.stillhouse(*best)
    assert said.code == 0, said.err
    assert "the best response to 3 of 3 prompts by reward" in said.out
    model = load_reward_model(str(workshop.folder / "runs" / "reward" / "model"))
    samples = read_jsonl(workshop.folder / "written.jsonl")[1:]
    given = rewards(model, [[*row["prompt_ids"], *row["token_ids"]] for row in samples])
    for row in read_jsonl(workshop.folder / "best.jsonl")[1:]:
        mine = [
            (reward, one["response"])
            for reward, one in zip(given, samples, strict=True)
            if one["id"] == row["id"]
        ]
        assert (row["response"], row["score"]) == (max(mine)[1], max(mine)[0])
    assert len(read_jsonl(workshop.folder / "best.dropped.jsonl")) == 6
    assert len(list(dataset_at(workshop.folder / "best.jsonl").rows(Reading()))) == 3, "a data set for SFT"
    assert "nothing to do" in workshop.stillhouse(*best).out
    assert "no effect with --best" in workshop.refused(*best[:-1], "other.jsonl", "-f", "empty")
    assert "has no token ids" in workshop.refused("curate", "train.jsonl", *best[2:-1], "x.jsonl")
