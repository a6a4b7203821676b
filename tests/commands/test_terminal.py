"""`stillhouse run` as people see it: on a real (pseudo) terminal, and in a pipe."""

from __future__ import annotations

import json
import re

from stillhouse.files import STAGE, write_jsonl
from tests.workshop import Workshop

RUN = (
    "run",
    "run.yaml",
    "recipe=distillm2",
    "train.max_steps=8",
    "train.validate_every=4",
    "evaluate.before=true",
)
PHASES = (
    "Loading models and data",
    "Evaluating student before",
    "Student generates round 1",
    "Training kd",
    "Evaluating student after",
)


def test_a_terminal_shows_phases_rates_time_left_and_the_course_of_the_loss(workshop: Workshop) -> None:
    # Steps enough that a screen is drawn among them on a fast machine too.
    code, screens = workshop.in_terminal(*RUN, "train.max_steps=48", "train.validate_every=24")
    assert code == 0, screens[-1]
    last = screens[-1]
    at = [next(n for n, line in enumerate(last) if line.startswith(f"✓ {title}")) for title in PHASES]
    assert at == sorted(at)
    trained = [line for line in last if "Training kd" in line]
    assert len(trained) == 1, "\n".join(last)
    assert re.search(r"48/48 \(100%\)  [\d.]+/s  \d+ s  loss [\d.]+  [▁▂▃▄▅▆▇█]{2,8}", trained[0])
    assert any(
        re.search(r"^. Training kd +[━╸╺]+ +\d+/48 .* \d+ s left  loss", line)
        for screen in screens
        for line in screen
    )
    assert any(re.search(r"^  . Validating at step 24", line) for screen in screens for line in screen)
    assert not any("Validating" in line for line in last)
    assert "Student: runs/kd/student" in last[-1]


def test_a_narrow_terminal_is_not_torn(workshop: Workshop) -> None:
    code, screens = workshop.in_terminal(*RUN[:-1], columns=44)
    assert code == 0, screens[-1]
    assert sum("Training kd" in line for line in screens[-1]) == 1
    assert max(sum("Training kd" in line for line in screen) for screen in screens) == 1


def test_a_pipe_gets_plain_lines(workshop: Workshop) -> None:
    said = workshop.stillhouse(*RUN)
    assert said.code == 0, said.err
    for title in PHASES:
        assert re.search(rf"^{title}: ", said.err, flags=re.MULTILINE), said.err
    assert "\x1b" not in said.err + said.out
    assert "▁" not in said.err
    assert "Validating" not in said.err
    assert "Student: runs/kd/student" in said.out


def test_written_text_gives_the_terminal_no_orders(workshop: Workshop) -> None:
    row = {"number": 0, "id": "a", "prompt": "p\x1b[2J", "response": "r\x1b[8m\u202e", "source": "teacher"}
    write_jsonl(workshop.folder / "rows.jsonl", [{STAGE: {"stage": "responses"}}, row])
    code, screens = workshop.in_terminal("show", "responses", "rows.jsonl")
    assert code == 0
    assert any("p␛[2J" in line for line in screens[-1])
    assert any("r␛[8m[U+202E]" in line for line in screens[-1])
    piped = workshop.stillhouse("show", "responses", "rows.jsonl", "--json")
    assert json.loads(piped.out)["responses"]["teacher"]["response"] == row["response"]
