"""Ctrl-C and kills at chosen moments, by real signals; what is left can always be resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from stillhouse import signals
from stillhouse.train.checkpoints import fault_of, newest_whole
from tests.children import end, start, write_to
from tests.workshop import Workshop, sends

RUN = ("run", "run.yaml", "train.max_steps=12", "train.save_every=100", "train.validate_every=never")
LOG = "metrics.jsonl"


def finished(workshop: Workshop, *more: str) -> None:
    said = workshop.stillhouse(*RUN, *more, "--resume")
    assert said.code == 0, said.err
    assert workshop.state()["state"] == "done"
    rows = (workshop.folder / "runs/kd" / LOG).read_text(encoding="utf-8").splitlines()
    assert len(rows) == 12


def test_ctrl_c_finishes_the_step_and_saves(workshop: Workshop) -> None:
    said = workshop.in_child(*RUN, hook=sends((LOG, 4)))
    assert said.code == 130, said.err
    assert "stillhouse run run.yaml train.max_steps=12" in said.err
    assert "--resume" in said.err
    assert "Traceback" not in said.err
    assert workshop.state()["state"] == "interrupted"
    newest = newest_whole(workshop.folder / "runs/kd/checkpoints")
    assert newest is not None
    rows = (workshop.folder / "runs/kd" / LOG).read_text(encoding="utf-8").splitlines()
    assert newest.name == f"checkpoint-{len(rows)}"
    assert 0 < len(rows) < 12
    assert not (workshop.folder / "runs/kd/student").exists()
    finished(workshop)


def test_ctrl_c_twice_stops_at_once_and_leaves_no_half_checkpoint(workshop: Workshop) -> None:
    said = workshop.in_child(*RUN, "train.save_every=2", hook=sends((LOG, 4), ("stillhouse.pt", 1)))
    assert said.code == 130, said.err
    assert "Traceback" not in said.err
    assert workshop.state()["message"] == "stopped by Ctrl-C"
    checkpoints = workshop.folder / "runs/kd/checkpoints"
    assert [fault_of(path) for path in checkpoints.iterdir()] in ([], [None])
    finished(workshop, "train.save_every=2")


def test_ctrl_c_outside_training_stops_at_once(workshop: Workshop) -> None:
    said = workshop.in_child(*RUN, "evaluate.before=true", hook=sends(("student-before.jsonl", 1)))
    assert said.code == 130
    assert workshop.state()["state"] == "interrupted"
    assert not (workshop.folder / "runs/kd" / LOG).exists()
    finished(workshop)


def test_ctrl_c_while_loading_leaves_nothing(workshop: Workshop) -> None:
    before = workshop.listing()
    said = workshop.in_child(*RUN, hook=sends(("valid.jsonl", 1)))
    assert said.code == 130
    assert "stillhouse run run.yaml" in said.err.splitlines()[-1]
    assert said.err.count("Interrupted by") == 1
    assert "--resume" not in said.err
    assert workshop.listing() == before


def run_beside_a_thread(out: Path, err: Path) -> None:
    """A run that signals end, with a thread of a library that nobody will ever tell to end."""
    from stillhouse.commands import main

    write_to(out, err)
    signals.SECONDS_TO_END = 0.1
    threading.Thread(target=threading.Event().wait, daemon=False).start()
    interrupt, ended = sends(("valid.jsonl", 1)), signals.end_soon

    def end_under_more_signals(code: int) -> None:
        threading.Thread(target=press_ctrl_c, daemon=True).start()
        ended(code)

    signals.end_soon = end_under_more_signals
    sys.addaudithook(lambda event, args: interrupt(str(args[0])) if event == "open" else None)
    sys.argv = ["stillhouse", *RUN]
    main()


def press_ctrl_c() -> None:
    """Again and again."""
    while True:
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_thread_that_never_ends_keeps_no_process_from_ending(workshop: Workshop) -> None:
    out, err = workshop.folder / ".out", workshop.folder / ".err"
    assert end(start(run_beside_a_thread, out, err)) == 130
    assert "Interrupted by Ctrl-C. Continue with:" in err.read_text()


def test_killed_in_the_evaluation_and_resumed(workshop: Workshop) -> None:
    said = workshop.in_child(*RUN, hook=sends(("student-after.jsonl", 1), sig=signal.SIGKILL))
    assert said.code == -signal.SIGKILL
    assert workshop.state()["state"] == "running"
    weights = (workshop.folder / "runs/kd/student/model.safetensors").read_bytes()
    finished(workshop)
    assert (workshop.folder / "runs/kd/student/model.safetensors").read_bytes() == weights
    assert (workshop.folder / "runs/kd/evaluation/student-after.json").exists()


def test_a_run_that_is_going_on_is_not_resumed(workshop: Workshop) -> None:
    """A process of its own, as a user starts it; it must also answer Ctrl-C."""
    command = [str(Path(sys.executable).with_name("stillhouse")), *RUN, "train.max_steps=5000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = workshop.folder / "runs/kd" / LOG
    deadline = time.monotonic() + 120
    while (
        time.monotonic() < deadline and not (log.exists() and log.stat().st_size) and process.poll() is None
    ):
        time.sleep(0.02)
    message = workshop.stillhouse(*RUN, "--resume")
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert message.code == 2
    assert f"process {process.pid} is still running" in message.err
    assert process.returncode == 130, said
    assert "Stopping after this step" in said
    assert workshop.state()["state"] == "interrupted"


def test_ctrl_c_in_other_verbs_leaves_what_is_whole(workshop: Workshop) -> None:
    generate = ("generate", "run.yaml", "-o", "teacher.jsonl", "--chunk", "8")
    said = workshop.in_child(*generate, hook=sends(("shard-0-of-1", 3)))
    assert said.code == 130
    assert "Traceback" not in said.err
    assert said.err.strip().endswith("interrupted\nInterrupted by Ctrl-C.")
    again = workshop.stillhouse(*generate)
    assert again.code == 0, again.err
    assert "of them were there before" in again.out
    evaluate = ("eval", "student", "--data", "valid.jsonl", "--template", "plain", "-o", "out.json")
    said = workshop.in_child(*evaluate, hook=sends(("student/config.json", 1)))
    assert (said.code, (workshop.folder / "out.json").exists()) == (130, False)
    assert "Traceback" not in said.err
