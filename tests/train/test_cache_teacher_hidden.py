"""`cache_teacher_hidden`: a replayed response costs the teacher nothing, and changes nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.small_runs import in_child, rows_of, tree, write_data


def test_replayed_responses_cost_no_teacher_and_give_the_same_losses(tmp_path: Path) -> None:
    write_data(tmp_path)
    tokens, losses = {}, {}
    for keep in (True, False):
        run = tree(
            tmp_path,
            f"keep-{keep}",
            recipe="distillm",
            # The buffer holds one batch, which the student writes at the first step and replays ever after.
            responses={"student_share": 1.0, "fresh_share": 0.0, "capacity": 6, "cache_teacher_hidden": keep},
            train={"max_steps": 6, "batch_size": 6, "micro_batch_size": 3, "log_every": 1},
        )
        run["teacher"]["dtype"] = "float32"
        assert in_child(run) == 0
        rows = [row for row in rows_of(tmp_path / f"keep-{keep}") if row["phase"] == "train"]
        tokens[keep] = [row.get("tokens/teacher", 0.0) for row in rows]
        losses[keep] = [row["loss"] for row in rows]
    assert tokens[True][0] == tokens[False][0] > 0
    assert tokens[True][1:] == [0.0] * 5
    assert all(count > 0 for count in tokens[False])
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
