"""A run folder says what happened: what a resumption may change, on which data and models, who is at work."""

from __future__ import annotations

import json
import os
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stillhouse import locks
from stillhouse.errors import ConfigError
from stillhouse.locks import only_one
from stillhouse.runs.execute import execute
from stillhouse.runs.folder import RunFolder
from stillhouse.runs.resolve import resolve
from stillhouse.train import checkpoints, interrupt
from tests import small_runs
from tests.children import end, start
from tests.small_runs import differences, in_child, in_two, nth, outcome, rows_of, write_data
from tests.workshop import Workshop, copied, sends

RUN = ("run", "run.yaml", "train.max_steps=6", "train.save_every=2", "train.validate_every=never")
CONSTANT = "train.schedule=constant"


def tree(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """A small run; against the data set's responses unless it says otherwise."""
    return small_runs.tree(folder, name, **{"objective": "reverse_kl", **changes})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file with what is in it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in files if path.name != locks.FILE}


def refused(workshop: Workshop, *arguments: str) -> str:
    """What a command says that must change nothing at all."""
    before = contents(workshop.folder / "runs")
    said = workshop.stillhouse(*arguments)
    assert said.code == 2, said.err
    assert said.err.count("error:") == 1, said.err
    assert contents(workshop.folder / "runs") == before
    return " ".join(said.err.split())


_MADE: dict[tuple[str, ...], Path] = {}
"""Run folders that several tests begin with, by what was run; each gets a copy."""


def begun(workshop: Workshop, make: Callable[[], None], *by: str) -> None:
    """The folder runs/kd as `make` leaves it, which is called once for all tests of this process."""
    folder = workshop.folder / "runs" / "kd"
    if by in _MADE:
        shutil.copytree(_MADE[by], folder)
        return
    make()
    _MADE[by] = Path(shutil.copytree(folder, workshop.folder.parent / f"begun-{len(_MADE)}"))


def killed(workshop: Workshop, *more: str, step: int = 5) -> None:
    """A run that dies after so many steps."""

    def make() -> None:
        said = workshop.in_child(*RUN, *more, hook=sends(("metrics.jsonl", step + 1), sig=signal.SIGKILL))
        assert said.code == -signal.SIGKILL, said.err

    begun(workshop, make, "killed", str(step), *more)


def finished(workshop: Workshop) -> None:
    """A run that came to its end."""

    def make() -> None:
        assert workshop.stillhouse(*RUN).code == 0

    begun(workshop, make, "finished")


def rates(workshop: Workshop) -> list[float]:
    rows = rows_of(workshop.folder / "runs/kd")
    return [row["learning_rate"] for row in rows if row["phase"] == "train"]


def test_a_finished_run_is_not_rewritten(workshop: Workshop) -> None:
    finished(workshop)
    for change in ("recipe=rkl", "train.seed=7", "train.lr=1e-5", "objective.kind=jsd"):
        told = refused(workshop, *RUN, change, "--resume")
        assert "was finished with other values" in told
        assert "--from runs/kd" in told
    assert "has done 6 steps already" in refused(workshop, *RUN, "train.max_steps=4", "--resume")
    took = workshop.state()["seconds"]
    longer = workshop.stillhouse(*RUN, "train.max_steps=8", "train.log_every=2", "--resume")
    assert longer.code == 0, longer.err
    state = workshop.state()
    assert (state["state"], state["max_steps"], len(state["segments"])) == ("done", 8, 2)
    assert state["segments"][1]["from_step"] == 6
    assert state["segments"][1]["changed"] == {"train.max_steps": [6, 8], "train.log_every": [1, 2]}
    assert state["seconds"] == pytest.approx(took + state["segments"][1]["seconds"], abs=0.002)
    assert state["started"] == state["segments"][0]["started"]
    listed = json.loads(workshop.stillhouse("runs", "--json").out)
    assert (listed[0]["step"], listed[0]["max_steps"], listed[0]["seconds"]) == (8, 8, state["seconds"])


def test_evaluation_of_a_finished_run_may_change_and_takes_its_own_time(workshop: Workshop) -> None:
    finished(workshop)
    weights = (workshop.folder / "runs/kd/student/model.safetensors").read_bytes()
    log = (workshop.folder / "runs/kd/metrics.jsonl").read_bytes()
    said = workshop.stillhouse(*RUN, "evaluate.limit=2", "--resume")
    assert said.code == 0, said.err
    assert (workshop.folder / "runs/kd/student/model.safetensors").read_bytes() == weights
    assert (workshop.folder / "runs/kd/metrics.jsonl").read_bytes() == log
    first, second = workshop.state()["segments"]
    assert (first["changed"], second["from_step"]) == ({}, 6)
    assert second["changed"] == {"evaluate.limit": [None, 2]}


def test_a_changed_rate_holds_from_the_resumed_step_on(workshop: Workshop) -> None:
    killed(workshop, CONSTANT, "train.lr=3e-3")
    new = (CONSTANT, "train.lr=1e-5", "train.weight_decay=0.3")
    assert workshop.stillhouse(*RUN, *new, "--resume").code == 0
    assert rates(workshop) == [3e-3] * 4 + [1e-5] * 2
    run = workshop.folder / "runs/kd"
    last = run / "checkpoints/checkpoint-6"
    groups = torch.load(last / "optimizer.pt", weights_only=True)["param_groups"]
    assert {(group["lr"], group["initial_lr"]) for group in groups} == {(1e-5, 1e-5)}
    assert {group["weight_decay"] for group in groups} == {0.3, 0.0}
    assert torch.load(last / "scheduler.pt", weights_only=True)["base_lrs"] == [1e-5, 1e-5]
    line = "train.lr: 0.003 to step 4, then 1e-05"
    assert f"# {line}" in (run / "resolved.yaml").read_text(encoding="utf-8")
    assert line in (run / "student/README.md").read_text(encoding="utf-8")
    workshop.stillhouse(*RUN, "name=other", CONSTANT, "train.lr=1e-5", "train.weight_decay=0.3")
    found = json.loads(workshop.stillhouse("compare", "runs", "--format", "json").out)["differences"]
    assert [row["value"] for row in found["train.lr"]] == ["0.003 to step 4, then 1e-05", "1e-05"]
    page = workshop.folder / "page.html"
    assert workshop.stillhouse("report", "runs/kd", "-o", str(page)).code == 0
    assert "0.003 to step 4, then 1e-05" in page.read_text(encoding="utf-8")


def test_a_changed_schedule_holds_from_the_resumed_step_on(workshop: Workshop) -> None:
    """And one that has not changed goes on as if nothing had happened."""
    for name, schedule in (("cosine", "cosine"), ("linear", "linear")):
        assert workshop.stillhouse(*RUN, f"train.schedule={schedule}", f"name={name}").code == 0
    killed(workshop, "train.schedule=cosine")
    assert workshop.stillhouse(*RUN, "train.schedule=linear", "--resume").code == 0
    cosine, linear = (
        [row["learning_rate"] for row in rows_of(workshop.folder / "runs" / name)]
        for name in ("cosine", "linear")
    )
    assert rates(workshop) == cosine[:4] + linear[4:]


def test_what_could_not_take_effect_is_refused_in_an_unfinished_run(workshop: Workshop) -> None:
    killed(workshop)
    for change in ("objective.kind=jsd", "train.seed=7", "train.batch_size=8", "data.max_response=6"):
        assert "was started with other values" in refused(workshop, *RUN, change, "--resume")
    assert "has done 4 steps already" in refused(workshop, *RUN, "train.max_steps=3", "--resume")
    smaller = workshop.stillhouse(*RUN, "train.micro_batch_size=4", "--resume")
    assert smaller.code == 0, smaller.err
    assert workshop.state()["segments"][1]["changed"] == {"train.micro_batch_size": [2, 4]}


def edit_rows(workshop: Workshop) -> None:
    path = workshop.folder / "train.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(reversed(lines)) + "\n", encoding="utf-8")


def edit_weights(workshop: Workshop, name: str) -> None:
    changed = copied(workshop.folder, name)
    weights = load_file(changed / "model.safetensors")
    weights["model.norm.weight"] += 0.5
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    (workshop.folder / name).unlink()
    changed.rename(workshop.folder / name)


def edit_template(workshop: Workshop) -> None:
    changed = copied(workshop.folder, "student")
    (changed / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    (workshop.folder / "student").unlink()
    changed.rename(workshop.folder / "student")


@pytest.mark.parametrize(
    ("edit", "names"),
    [
        (edit_rows, ["data.train"]),
        (lambda workshop: edit_weights(workshop, "student"), ["student"]),
        (lambda workshop: edit_weights(workshop, "teacher"), ["teacher"]),
        (edit_template, ["template"]),
    ],
    ids=["data", "student", "teacher", "template"],
)
def test_what_was_changed_under_its_path_is_found(workshop: Workshop, edit: Any, names: list[str]) -> None:
    killed(workshop)
    edit(workshop)
    told = refused(workshop, *RUN, "--resume")
    for name in names:
        assert f"{name}: is not what the run was started with: digest" in told
    assert told.count("is not what the run was started with") == len(names)


def test_what_has_only_moved_is_the_same(workshop: Workshop) -> None:
    killed(workshop)
    for name in ("train.jsonl", "student", "teacher"):
        (workshop.folder / name).rename(workshop.folder / f"moved-{name}")
    moved = ("data.train=moved-train.jsonl", "student.path=moved-student", "teacher.path=moved-teacher")
    said = workshop.stillhouse(*RUN, *moved, "--resume")
    assert said.code == 0, said.err


def reseal(checkpoint: Path) -> None:
    (checkpoint / checkpoints.MANIFEST).unlink()
    checkpoints.seal(checkpoint)


class Poison:
    """Unpickled, it would make a file."""

    def __reduce__(self) -> Any:
        return (os.system, ("touch poisoned",))


@pytest.mark.parametrize("name", ["optimizer.pt", "stillhouse.pt", "model.safetensors", "rng_state.pth"])
def test_a_checkpoint_that_cannot_be_used_is_named(workshop: Workshop, name: str) -> None:
    """It is sealed, so its checksum says nothing: it was made so, or copied from elsewhere."""
    killed(workshop, step=5)
    checkpoint = workshop.folder / "runs/kd/checkpoints/checkpoint-4"
    if name == "model.safetensors":
        weights = load_file(checkpoint / name)
        save_file({key: value[:1] for key, value in weights.items()}, checkpoint / name, {"format": "pt"})
    else:
        torch.save({"step": Poison()}, checkpoint / name)
    reseal(checkpoint)
    said = workshop.stillhouse(*RUN, "--resume")
    assert said.code == 2, said.err
    told = " ".join(said.err.split())
    assert "checkpoint-4" in told
    assert "Delete this checkpoint to go on from the one before it" in told
    assert "Traceback" not in told
    assert not (workshop.folder / "poisoned").exists()
    shutil.rmtree(checkpoint)
    assert workshop.stillhouse(*RUN, "--resume").code == 0


def test_a_folder_with_files_of_no_run_is_refused(workshop: Workshop) -> None:
    folder = workshop.folder / "runs/kd"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    assert "has files of no run (thesis.tex)" in refused(workshop, *RUN)
    (folder / "thesis.tex").unlink()
    assert workshop.stillhouse(*RUN).code == 0


def test_of_runs_that_start_together_one_goes_on(tmp_path: Path) -> None:
    write_data(tmp_path)
    for number in range(3):
        run = tree(tmp_path, f"run-{number}", train={"max_steps": 3})
        children = [start(_run_quietly, run) for _ in range(3)]
        codes = sorted(end(child) for child in children)
        assert codes[0] == 0
        assert set(codes[1:]) <= {2}, codes
        rows = [row["step"] for row in rows_of(tmp_path / f"run-{number}") if row["phase"] == "train"]
        assert rows == [2, 3]


def _run_quietly(run: dict[str, Any]) -> None:
    try:
        execute(resolve(run))
    except ConfigError as error:
        told = str(error)
        os._exit(2 if "is still running in" in told or "already contains a run" in told else 3)
    os._exit(0)


def test_a_lock_outlives_neither_a_kill_nor_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "for it"
    file = folder / ".lock"
    holder = start(_hold, file)
    while not file.exists() or not file.read_text():
        assert holder.is_alive()
    with (
        pytest.raises(ValueError, match=f"process {holder.pid} is still running in"),
        only_one(file, "output.folder", folder, "Wait."),
    ):
        raise AssertionError("two at once")
    holder.kill()
    holder.join()
    with only_one(file, "output.folder", folder, "Wait."):
        assert json.loads(file.read_text())["process"] == os.getpid()
    with pytest.raises(ZeroDivisionError), only_one(file, "output.folder", folder, "Wait."):
        raise ZeroDivisionError
    assert not file.exists()
    assert folder.exists(), "it was there before"
    shutil.rmtree(tmp_path / "made")
    with only_one(file, "output.folder", folder, "Wait."):
        pass
    assert not (tmp_path / "made").exists()


def _hold(file: Path) -> None:
    with only_one(file, "output.folder", file.parent, "Wait."):
        signal.pause()


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_scheduler_s_signal_saves_and_says_how_to_go_on(workshop: Workshop, by: signal.Signals) -> None:
    more = ("train.save_every=100",)
    said = workshop.in_child(*RUN, *more, hook=sends(("metrics.jsonl", 4), sig=by))
    assert said.code == 128 + by, said.err
    assert f"Interrupted by {by.name}. Continue with: stillhouse run run.yaml" in said.err
    assert "Traceback" not in said.err
    assert (workshop.state()["state"], workshop.state()["message"]) == (
        "interrupted",
        f"stopped by {by.name}",
    )
    newest = checkpoints.newest_whole(workshop.folder / "runs/kd/checkpoints")
    assert newest is not None
    assert newest.name == f"checkpoint-{len(rows_of(workshop.folder / 'runs/kd'))}"
    assert workshop.stillhouse(*RUN, *more, "--resume").code == 0
    assert workshop.state()["state"] == "done"


@pytest.mark.parametrize(
    ("place", "verb"),
    [
        ("student-after.jsonl", RUN),
        ("student.new/README.md", RUN),
        ("valid.jsonl", RUN),
        ("shard-0-of-1", ("generate", "run.yaml", "-o", "teacher.jsonl", "--chunk", "8")),
    ],
    ids=["evaluation", "export", "loading", "generate"],
)
def test_outside_training_it_stops_at_once(workshop: Workshop, place: str, verb: tuple[str, ...]) -> None:
    said = workshop.in_child(
        *verb, hook=sends((place, 2 if place.startswith("shard") else 1), sig=signal.SIGTERM)
    )
    assert said.code == 143, said.err
    assert "Traceback" not in said.err
    assert "Interrupted by SIGTERM." in said.err
    more = ["--resume"] if (workshop.folder / "runs/kd/state.json").exists() else []
    again = workshop.stillhouse(*verb, *more)
    assert again.code == 0, again.err


PAIRS = {"objective": {"teacher": "skew_kl", "student": "skew_rkl"}}
ROUNDS = {"responses": {"kind": "pairs", "refresh": "epoch", "chunk_size": 4}}


def test_a_step_that_generates_for_long_is_given_up(tmp_path: Path) -> None:
    """Nothing was saved yet; the checkpoint is that of the step before, and the run ends as it would have."""
    write_data(tmp_path)
    options = {**PAIRS, **ROUNDS, "train": {"save_every": "never", "max_steps": 7}}
    straight, stopped = (tree(tmp_path, name, **options) for name in ("straight", "stopped"))
    assert in_child(straight) == 0
    hook = nth(3, "open", "student-1.shard-0-of-1.jsonl")
    assert end(start(_impatient, stopped, hook)) == 143
    assert [path.name for path in (tmp_path / "stopped/checkpoints").iterdir()] == ["checkpoint-5"]
    assert in_child(stopped, resume=True) == 0
    for run in ("straight", "stopped"):
        (tmp_path / run / "checkpoints").mkdir(exist_ok=True)
    weights = [load_file(tmp_path / run / "student/model.safetensors") for run in ("straight", "stopped")]
    assert differences(*weights) == []
    logs = [rows_of(tmp_path / run) for run in ("straight", "stopped")]
    assert differences(*logs) == []


def _impatient(run: dict[str, Any], hook: Any) -> None:
    interrupt.GRACE_SECONDS = 1e-6
    small_runs.announce(_Term(hook), signal.SIGTERM)
    try:
        result = execute(resolve(run))
    except BaseException:  # noqa: BLE001  (the child must end here, whatever it was)
        traceback.print_exc()
        os._exit(1)
    os._exit(128 + (result.signal or 0))


def test_tokens_of_a_round_are_counted_once(tmp_path: Path) -> None:
    """Killed between the teacher's stage and the first step, and in the middle of the student's."""
    write_data(tmp_path)
    options = {**PAIRS, **ROUNDS, "train": {"max_steps": 7, "log_every": 1}}
    assert in_child(tree(tmp_path, "straight", **options)) == 0
    wanted = [row.get("tokens/generate") for row in rows_of(tmp_path / "straight")]
    for name, die in {
        "between": nth(1, "open", "student-0.shard-0-of-1.jsonl"),
        "within": nth(3, "open", "student-1.shard-0-of-1.jsonl"),
    }.items():
        run = tree(tmp_path, name, **options)
        assert in_child(run, die=die) == -9
        assert in_child(run, resume=True) == 0
        assert [row.get("tokens/generate") for row in rows_of(tmp_path / name)] == wanted


def test_counts_are_those_of_all_processes(tmp_path: Path) -> None:
    write_data(tmp_path, rows=16)
    options = {"train": {"max_steps": 4, "log_every": 1, "hf": {"ddp_backend": "gloo"}}, "responses": "fixed"}
    one, two = (tree(tmp_path, name, **options) for name in ("one", "two"))
    one["train"] = {**one["train"], "hf": {}}
    assert in_child(one) == 0
    assert in_two(two) == [0, 0]
    alone, together = (
        [row for row in rows_of(tmp_path / name) if row["phase"] == "train"] for name in ("one", "two")
    )
    for name in ("tokens", "sequences", "tokens/student", "tokens/teacher"):
        assert [row[name] for row in together] == [row[name] for row in alone], name
    for name in ("loss", "loss/fixed"):
        assert together[0][name] == pytest.approx(alone[0][name], rel=1e-3), name  # by its own dropout


def test_a_run_whose_process_died_says_so(tmp_path: Path) -> None:
    write_data(tmp_path)
    run = tree(tmp_path, "two", train={"max_steps": 6, "hf": {"ddp_backend": "gloo"}})
    codes = in_two(run, die=nth(1, "os.rename", "checkpoint-4/stillhouse-1.pt"))
    assert codes[1] == -9
    state = json.loads((tmp_path / "two/state.json").read_text(encoding="utf-8"))
    assert state["state"] == "failed"
    assert "another of the 2 processes has died" in state["message"]
    assert "--resume" in state["message"]
    assert in_two(run, resume=True) == [0, 0]


def test_processes_stop_after_the_same_step(tmp_path: Path) -> None:
    write_data(tmp_path)
    options = {"train": {"save_every": "never", "hf": {"ddp_backend": "gloo"}}}
    run = tree(tmp_path, "two", **options)
    assert in_two(run, die=_Term(nth(3, "open", "metrics.jsonl"))) == [0, 0]
    state = json.loads((tmp_path / "two/state.json").read_text(encoding="utf-8"))
    assert (state["state"], state["message"]) == ("interrupted", "stopped by SIGTERM")
    newest = checkpoints.newest_whole(tmp_path / "two/checkpoints")
    assert newest is not None
    assert in_two(run, resume=True) == [0, 0]


class _Term:
    """Sends SIGTERM to the process where a hook says so, and never asks for its death."""

    def __init__(self, when: Any) -> None:
        self.when = when

    def __call__(self, event: str, file: str) -> bool:
        if self.when(event, file):
            os.kill(os.getpid(), signal.SIGTERM)
        return False


def test_a_new_run_starts_from_the_student_of_another(workshop: Workshop) -> None:
    finished(workshop)
    said = workshop.stillhouse(*RUN, "name=second", "recipe=rkl", "--from", "runs/kd")
    assert said.code == 0, said.err
    parent = workshop.state("second")["parent"]
    assert (parent["run"], parent["folder"]) == ("kd", "runs/kd")
    first, second = (
        json.loads((workshop.folder / "runs" / run / "inputs.json").read_text()) for run in ("kd", "second")
    )
    assert parent["digest"] == second["student"]["digest"] != first["student"]["digest"]
    card = (workshop.folder / "runs/second/student/README.md").read_text(encoding="utf-8")
    assert f"run kd (student {parent['digest'][:12]})" in card
    assert "path: runs/kd" in (workshop.folder / "runs/second/resolved.yaml").read_text(encoding="utf-8")
    found = json.loads(workshop.stillhouse("compare", "runs", "--format", "json").out)["differences"]
    assert f"run kd (student {parent['digest'][:12]})" in found["student.path"][1]["value"]
    killed_state = refused(workshop, *RUN, "name=third", "--from", "student")
    assert "--from: is not the folder of a run" in killed_state


def test_outcome_is_the_same_for_a_resumed_longer_run(tmp_path: Path) -> None:
    """With a constant rate, one that is made longer ends as one that was as long from the start."""
    write_data(tmp_path)
    steady = {"schedule": "constant"}
    long, short = (
        tree(tmp_path, name, train={**steady, "max_steps": n}) for name, n in (("long", 8), ("short", 5))
    )
    assert in_child(long) == 0
    assert in_child(short) == 0
    short["train"]["max_steps"] = 8
    assert in_child(short, resume=True) == 0
    wanted, found = outcome(tmp_path / "long"), outcome(tmp_path / "short")
    assert differences(wanted["weights"], found["weights"]) == []
    assert differences(wanted["optimizer"], found["optimizer"]) == []


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (("generate", "run.yaml", "-o", "out.jsonl"), ".out.jsonl.lock"),
        (("curate", "train.jsonl", "-o", "out.jsonl", "-f", "empty"), ".out.jsonl.lock"),
        (
            ("eval", "student", "--data", "valid.jsonl", "--template", "plain", "-o", "out.json"),
            ".out.json.lock",
        ),
        (("eval", "student", "teacher", "--data", "valid.jsonl", "-o", "out"), "out/.lock"),
        (("quickstart", "--folder", "out"), "out/.lock"),
    ],
    ids=["generate", "curate", "eval", "eval of several", "quickstart"],
)
def test_what_other_commands_write_is_locked_too(
    workshop: Workshop, command: tuple[str, ...], file: str
) -> None:
    place = workshop.folder / file
    with only_one(place, "--output", place.parent, "Wait."):
        assert f"process {os.getpid()} is still running in out" in workshop.refused(*command)


@pytest.mark.parametrize(
    ("argv", "recorded"),
    [
        (["/opt/site-packages/stillhouse/__main__.py", "run", "a.yaml"], "python -m stillhouse run a.yaml"),
        (["/opt/bin/stillhouse", "run", "a.yaml"], "/opt/bin/stillhouse run a.yaml"),
    ],
)
def test_the_recorded_command_can_be_typed_again(
    argv: list[str], recorded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", argv)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.start("run", None)
    assert folder.saved_state()["command"] == recorded
