"""Sweeps: every combination checked first, killed anywhere and resumed, failures that cost one run."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from stillhouse import locks
from stillhouse.errors import ConfigError
from stillhouse.runs.sweep import SweepPlan, checked_members, sweep
from tests.children import end, start
from tests.small_runs import differences, outcome, tree, write_data

TRAIN = {"max_steps": 6, "save_every": 2, "validate_every": 2}


def made(folder: Path, **changes: Any) -> dict[str, Any]:
    """A sweep over two seeds of a run of 4 steps."""
    write_data(folder)
    run = tree(folder, "base", recipe="kd", train=TRAIN)
    run["output"] = {}
    del run["name"]
    return {
        "name": "small",
        "folder": str(folder / "sweep"),
        "run": run,
        "values": {"train.seed": [1, 2]},
        **changes,
    }


def refusal(tmp_path: Path, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        checked_members(SweepPlan(made(tmp_path, **changes)))
    return str(caught.value)


def test_a_grid_has_every_combination_and_names_that_seeds_share(tmp_path: Path) -> None:
    variants = {"method": {"KD": {"recipe": "kd"}, "SKL": {"recipe": "skl", "objective.alpha": 0.2}}}
    members, _ = checked_members(SweepPlan(made(tmp_path, variants=variants)))
    assert [one.name for one in members] == ["KD-seed-1", "KD-seed-2", "SKL-seed-1", "SKL-seed-2"]
    assert members[2].resolved.config.objective.alpha == 0.2
    assert members[2].labels == {"method": "SKL", "train.seed": "1"}


def test_what_one_combination_sets_is_as_the_run_has_it_in_the_others(tmp_path: Path) -> None:
    variants = {
        "method": {"KD": {"recipe": "kd"}, "SKL": {"recipe": "skl", "objective.alpha": 0.3}},
        "pace": {"slow": {"train.lr": 1e-4}, "warm": {"train.warmup": 0.5}},
    }
    members, _ = checked_members(SweepPlan(made(tmp_path, variants=variants, values={})))
    found = {
        one.name: (
            getattr(one.resolved.config.objective, "alpha", None),
            one.resolved.config.train.lr,
            one.resolved.config.train.warmup,
        )
        for one in members
    }
    base = SweepPlan(made(tmp_path)).member(SweepPlan(made(tmp_path)).grid()[0]).resolved.config.train
    assert found == {
        "KD-slow": (None, 1e-4, base.warmup),
        "KD-warm": (None, base.lr, 0.5),
        "SKL-slow": (0.3, 1e-4, base.warmup),
        "SKL-warm": (0.3, base.lr, 0.5),
    }


def test_values_have_the_origin_of_the_sweep_file(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    write_data(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(made(tmp_path)["run"]), encoding="utf-8")
    text = f"run: {tmp_path}/run.json\nvalues:\n  train.lr:\n    - 1e-3\n    - fast\n"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        checked_members(SweepPlan(file))
    assert f"train.lr ({file}:5): has the wrong type; got 'fast'" in str(caught.value)
    assert "in 1 of 2 runs: lr-fast" in str(caught.value)


def test_everything_that_is_wrong_is_told_at_once_with_the_runs_that_have_it(tmp_path: Path) -> None:
    message = refusal(tmp_path, values={"train.lr": [1e-3, -1.0], "train.batch_size": [4, 3]})
    assert "train.lr (dictionary): must be greater than 0.0; got -1.0 (in 2 of 4 runs" in message
    assert "batch_size (3) must be a multiple of micro_batch_size (2) (in 1 of 4 runs" in message


def test_a_warning_is_told_once_for_all_runs_of_whichever_room_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = made(tmp_path, values={"train.batch_size": [4, 8, 16], "train.seed": [1, 2]})
    tree["run"]["data"]["max_response"] = 2
    members, _ = checked_members(SweepPlan(tree))
    assert len(members) == 6
    said = [record.getMessage() for record in caplog.records if "response cut" in record.getMessage()]
    assert [text.partition(" (")[0] for text in said] == ["data.train", "data.valid"], said


def test_refused_combinations_can_be_left_out_and_are_counted(tmp_path: Path) -> None:
    values = {"train.batch_size": [4, 3], "train.seed": [1, 2]}
    members, refused = checked_members(SweepPlan(made(tmp_path, values=values, skip_refused=True)))
    assert [one.name for one in members] == ["batch-size-4-seed-1", "batch-size-4-seed-2"]
    assert list(refused.names) == ["batch-size-3-seed-1", "batch-size-3-seed-2"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"values": {}}, "values or variants must say what differs"),
        ({"values": {"train.seed": []}}, "values.train.seed: is an empty list"),
        ({"values": {"train.lr": {"low": 1e-4, "high": 1e-3}}}, "a range is for search: optuna"),
        ({"values": {"train.sead": [1, 2]}}, "train.sead (dictionary): unknown key (did you mean 'seed'?)"),
        ({"values": {"recipe": ["kd", "forward_kl"]}}, "forward_kl"),
        ({"values": {"train.seed": [1, 1]}}, "values.train.seed: is listed twice; got 1"),
        ({"values": {"evaluate.limit": [4, 40]}, "stop_early": {"runs": 1}, "metric": "rouge_l"}, "loss"),
    ],
)
def test_what_a_sweep_refuses(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    assert told in refusal(tmp_path, **changes)


def test_a_value_that_the_run_overrules_makes_no_difference(tmp_path: Path) -> None:
    run = {**made(tmp_path)["run"], "objective": {"kind": "forward_kl"}}
    message = refusal(tmp_path, run=run, values={"recipe": ["kd", "skl"]})
    assert "recipe: makes no difference: kd and skl would be the same run" in message


STOPPED = 130


def _signalled_sweep(source: dict[str, Any], workers: int, by: signal.Signals) -> None:
    """Signalled as soon as the first of its runs, whichever that is, has a checkpoint."""

    def watch() -> None:
        runs = Path(source["folder"]) / "runs"
        while not any(runs.glob("*/checkpoints/checkpoint-2/complete.json")):
            time.sleep(0.005)
        os.kill(os.getpid(), by)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=watch, daemon=True).start()
    try:
        sweep(source, workers=workers)
    except KeyboardInterrupt:
        os._exit(STOPPED)
    os._exit(0)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of a sweep that nothing has stopped."""
    folder = tmp_path_factory.mktemp("straight")
    sweep(made(folder))
    return folder / "sweep" / "runs"


def signalled(folder: Path, by: signal.Signals, workers: int, **changes: Any) -> tuple[int, dict[str, Any]]:
    """The exit code of a sweep that gets a signal while none of its runs is finished, and the sweep."""
    source = made(folder, **changes)
    return end(start(_signalled_sweep, source, workers, by)), source


def assert_same(runs: Path, others: Path) -> None:
    for name in ("seed-1", "seed-2"):
        assert differences(outcome(runs / name), outcome(others / name)) == []


def test_killed_and_resumed_is_as_straight_and_finished_runs_stay(tmp_path: Path, straight: Path) -> None:
    """The sweep's own process is killed in the middle of a run, whose process then saves and stops."""
    code, broken = signalled(tmp_path, signal.SIGKILL, workers=1)
    assert code == -signal.SIGKILL
    runs = tmp_path / "sweep" / "runs"
    result = sweep(broken)
    written = (runs / "seed-1" / "state.json").stat().st_mtime_ns
    again = sweep(broken, workers=2)
    assert result.states == again.states == {"seed-1": "done", "seed-2": "done"}
    assert (runs / "seed-1" / "state.json").stat().st_mtime_ns == written
    assert_same(straight, runs)
    assert not locks.is_held(tmp_path / "sweep" / locks.FILE)


def test_ctrl_c_saves_all_runs_that_are_going_on_and_starts_no_other(tmp_path: Path, straight: Path) -> None:
    code, source = signalled(tmp_path, signal.SIGINT, workers=2, values={"train.seed": [1, 2, 3]})
    assert code == STOPPED
    lines = json.loads((tmp_path / "sweep" / "sweep.json").read_text(encoding="utf-8"))["runs"]
    states = {lines["seed-1"]["state"], lines["seed-2"]["state"]}
    assert "interrupted" in states <= {"interrupted", "to do"}
    assert lines["seed-3"]["state"] == "to do"
    assert not (tmp_path / "sweep" / "runs" / "seed-3").exists()
    result = sweep(source, workers=2)
    assert result.states == dict.fromkeys(("seed-1", "seed-2", "seed-3"), "done")
    assert_same(straight, tmp_path / "sweep" / "runs")


def test_a_failing_run_costs_itself_and_is_tried_again(tmp_path: Path) -> None:
    source = made(tmp_path, values={"train.seed": [1, 2]})
    blocked = tmp_path / "sweep" / "runs" / "seed-1"
    blocked.mkdir(parents=True)
    (blocked / "notes.txt").write_text("not of a run", encoding="utf-8")
    result = sweep(source)
    assert result.states == {"seed-1": "failed", "seed-2": "done"}
    told = json.loads((tmp_path / "sweep" / "sweep.json").read_text(encoding="utf-8"))["runs"]["seed-1"]
    assert "has files of no run (notes.txt)" in told["message"]
    (blocked / "notes.txt").unlink()
    assert sweep(source).states == {"seed-1": "done", "seed-2": "done"}


def test_a_changed_sweep_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = made(tmp_path, values={"train.seed": [1]})
    sweep(source)
    more = {**source, "values": {"train.seed": [2]}}
    assert sweep(more).states == {"seed-2": "done"}
    told = capsys.readouterr().err
    assert "1 new runs (seed-2)" in told
    assert "1 runs are no longer part of it and stay as they are (seed-1)" in told
    changed = {**more, "run": {**more["run"], "train": {**more["run"]["train"], "lr": 1.0e-4}}}
    with pytest.raises(ConfigError, match=r"seed-2: .*was finished with other values; got train.lr"):
        sweep(changed)
