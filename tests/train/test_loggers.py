"""What a logger of `train.report_to` is told: once, by one process, and what metrics.jsonl has."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from tests.children import ranks
from tests.small_runs import nth, rows_of, run, tree, write_data
from transformers import TrainerCallback
from transformers.integrations import integration_utils

PHASES = {"train": ("learning_rate", ""), "valid": ("eval_loss", "eval_")}
"""phase of metrics.jsonl -> (a value that such rows alone have, what a logger's names begin with)"""


class Notebook(TrainerCallback):
    """Writes a line for each row, as the loggers of transformers do: in the first process alone."""

    def __init__(self) -> None:
        self._began = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        assert self._began, "a logger opens its page when the training begins"
        if state.is_world_process_zero:
            with open(os.environ["NOTEBOOK"], "a", encoding="utf-8") as file:
                file.write(json.dumps({"rank": args.process_index, "step": state.global_step, **logs}) + "\n")


def watched(made: dict[str, Any], resume: bool, stopped: bool, notebook: str) -> None:
    os.environ["NOTEBOOK"] = notebook
    integration_utils.INTEGRATION_TO_CALLBACK["notebook"] = Notebook
    at_step_4 = nth(1, "os.rename", "checkpoint-4/complete.json") if stopped else None
    run(made, resume, at_step_4, signal.SIGTERM)


def test_one_process_reports_the_rows_of_the_log_and_none_twice(tmp_path: Path) -> None:
    write_data(tmp_path)
    made = tree(tmp_path, "two", recipe="kd", train={"report_to": ["notebook"], "validate_rouge": True})
    notebook = tmp_path / "notebook.jsonl"
    assert ranks(2, watched, made, False, True, str(notebook)) == [0, 0]
    assert not (tmp_path / "two" / "student").exists(), "the signal came before the end"
    assert ranks(2, watched, made, True, False, str(notebook)) == [0, 0]
    told = [json.loads(line) for line in notebook.read_text(encoding="utf-8").splitlines()]
    assert {row.pop("rank") for row in told} == {0}
    rows = {phase: [row for row in rows_of(tmp_path / "two") if row["phase"] == phase] for phase in PHASES}
    assert [row["step"] for row in rows["train"]] == [2, 4, 6, 8, 9]
    assert [row["step"] for row in rows["valid"]] == [0, 3, 6, 9]
    for phase, (mark, prefix) in PHASES.items():
        reported = [row for row in told if mark in row]
        for row, wanted in zip(reported, rows[phase], strict=True):
            values = {name: value for name, value in wanted.items() if name not in ("phase", "step")}
            values.pop("seconds/evaluate", None)
            if phase == "valid":
                del row["epoch"]  # which the trainer adds
            assert row == {"step": wanted["step"]} | {f"{prefix}{key}": x for key, x in values.items()}
    assert not any("train_loss" in row for row in told), "of one process alone where a signal ended it"
