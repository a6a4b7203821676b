"""What readers of the page ran into: names, counts, colours, flat charts, the rows an evaluation was on."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.report import load_run, load_runs, write_report
from stillhouse.report import page as page_module
from stillhouse.report.breakdown import device_memory_told, generated_tokens
from stillhouse.report.configuration import model_name
from stillhouse.report.curves import constant_schedules, further_plots, main_plots, schedule_plots
from stillhouse.report.systems import run_colour
from tests.report.browser import browser, chromium
from tests.report.made_runs import make_run
from tests.report.reading import page


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def log(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/warm-start/student", "runs/warm-start/student"),
        ("/home/me/runs/warm-start/student", "warm-start/student"),
        ("/data/models/smollm2-135m", "smollm2-135m"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("package:stillhouse/demo/teacher", "demo/teacher"),
        ("/runs/kd/checkpoints/checkpoint-200/", "checkpoints/checkpoint-200"),
        ("C:\\models\\mine", "mine"),
    ],
)
def test_models_are_called_as_people_write_them(path, name):
    assert model_name(path) == name


def test_an_adapter_is_no_part_of_the_model(tmp_path):
    folder = make_run(tmp_path / "run")
    student = {"path": "org/base", "parameters": 135_000_000, "trainable": 1_200_000, "adapter": 1_200_000}
    change(folder / "models.json", student=student)
    text = page([folder], tmp_path / "page.html")[1].text
    assert "org/base, 135M parameters, an adapter of 1.2M trained" in text


def test_rows_of_the_data_are_not_counted_as_generated(tmp_path):
    """100 steps of 1,000 tokens, three quarters of them rows of the data: 25,000 of the 10,000 generated."""
    folder = make_run(tmp_path / "run")
    row = {"phase": "train", "tokens": 1000, "responses/fixed": 0.75, "responses/student": 0.25}
    log(folder, [{**row, "step": step, "tokens/generate": 100} for step in range(1, 101)])
    assert generated_tokens(load_run(folder)) == "10k tokens; trained on about 2.5 times each"


def test_the_rows_of_an_evaluation_stand_under_data(tmp_path):
    folder = make_run(tmp_path / "run")
    settings = {"prompts": 290, "questions_digest": "4cc41368498b23b5", "dropped": {"prompt too long": 10}}
    change(folder / "evaluation/student_after.json", settings={**settings, "data": "held/out.jsonl"})
    text = page([folder], tmp_path / "page.html")[1].text
    assert "evaluation: e2e held/out.jsonl 300 290 – 10 prompt too long none 4cc41368498b" in text


def test_what_does_not_move_is_said_and_not_drawn(tmp_path):
    folder = make_run(tmp_path / "run")
    train = [
        {"phase": "train", "step": step, "loss": 2 - step / 10, "schedule/responses.student_share": 0.0,
         "schedule/objective.alpha": step / 10, "replay/size": 64, "grad_norm": 1.0, "other/thing": 3.0}
        for step in range(1, 9)
    ]  # fmt: skip
    log(folder, [*train, {"phase": "valid", "step": 8, "loss": 1.0}])
    runs = [load_run(folder)]
    assert [plot.title for plot in main_plots(runs)] == ["Training loss"]  # one validation is no curve
    assert [plot.title for plot in schedule_plots(runs)] == ["objective.alpha (α)"]
    assert further_plots(runs) == []
    assert constant_schedules(runs) == [("responses.student_share", "0")]
    text = page([folder], tmp_path / "page.html")[1].text
    assert re.search(r"Did not move: responses\.student_share 0 ?\.", text)
    assert "Buffer: responses held" not in text


def test_the_learning_rate_is_drawn_as_it_was(tmp_path):
    """A warm-up of three steps has its peak; a running mean would cut it."""
    folder = make_run(tmp_path / "run")
    rates = [0.1, 0.2, 0.3, *(0.3 - 0.002 * n for n in range(100))]
    rows = [
        {"phase": "train", "step": n + 1, "learning_rate": rate, "grad_norm": rate}
        for n, rate in enumerate(rates)
    ]
    log(folder, rows)
    rate, norm = further_plots([load_run(folder)])
    assert (rate.title, norm.title) == ("Learning rate", "Gradient norm")
    lines = [plot.svg.count("stroke: var(--run-0)") for plot in (rate, norm)]
    assert lines[1] == lines[0] + 1  # the measured norm has its mean before it


@pytest.mark.parametrize(("slow", "logarithmic"), [(1.2, False), (40.0, True)])
def test_one_slow_method_does_not_squeeze_the_others(tmp_path, slow, logarithmic):
    for name, pace in (("kd", 1.0), ("gkd", slow)):
        folder = make_run(tmp_path / "runs" / name, name)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        log(folder, [{**row, "seconds": pace} if row["phase"] == "train" else row for row in rows])
    (plot,) = [one for one in main_plots(load_runs([tmp_path / "runs"])) if one.key == "quality-time"]
    assert ("seconds of training, logarithmic" in plot.svg) == logarithmic


def themes() -> list[dict[str, str]]:
    css = page_module._asset("page.css")
    light, dark = css.split("prefers-color-scheme: dark", 1)
    found = []
    for text in (light, dark.split("box-sizing")[0]):
        found.append(dict(re.findall(r"(--(?:run-[0-7]|teacher|before|card)): (#[0-9a-f]{6})", text)))
    return found


def oklab(colour: str) -> np.ndarray:
    """Ottosson (2020): distances in it are about as large as colours look different."""
    rgb = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    cones = [
        [0.41222147, 0.53633254, 0.05144599],
        [0.2119035, 0.68069955, 0.10739696],
        [0.08830246, 0.28171884, 0.6299787],
    ]
    lab = [
        [0.21045426, 0.79361779, -0.00407205],
        [1.9779985, -2.42859221, 0.45059371],
        [0.02590404, 0.78277177, -0.80867577],
    ]
    return np.array(lab) @ np.cbrt(np.array(cones) @ linear)


def test_colours_can_be_told_apart_in_both_themes():
    for theme in themes():
        lines = {name: colour for name, colour in theme.items() if name != "--card"}
        assert len(lines) == 10
        for one, other in itertools.combinations(lines, 2):
            assert np.linalg.norm(oklab(lines[one]) - oklab(lines[other])) > 0.11, (one, other)


def test_the_ninth_run_has_dashes(tmp_path):
    for number in range(9):
        folder = make_run(tmp_path / "runs" / f"run-{number}", "kd")
        found = json.loads((folder / "provenance.json").read_text())
        found["train.lr"]["value"] = number
        (folder / "provenance.json").write_text(json.dumps(found))
    html, _ = page([tmp_path / "runs"], tmp_path / "page.html")
    assert run_colour(8) == "--run-8"
    assert '<span class="dot again" style="--dot: var(--run-8)"' in html
    assert "stroke-dasharray" in html
    runs = load_runs([tmp_path / "runs"])
    assert (
        "stroke-dasharray" not in next(plot for plot in main_plots(runs[:8]) if plot.key == "train-loss").svg
    )


pytest_browser = pytest.mark.skipif(chromium() is None, reason="chromium is not installed")


@pytest_browser
def test_in_a_browser(tmp_path):
    """Two systems prompt by prompt; on a phone nothing is cut off."""
    for recipe, score in (("kd", 55.2), ("distillm2", 58.3)):
        make_run(tmp_path / "runs" / recipe, recipe, rows=30, score=score)
    path = write_report([tmp_path / "runs"], tmp_path / "report.html")
    with browser(tmp_path / "profile") as tab:
        tab.open(path)
        choose = "(() => { const one = document.getElementById('answer-%s'); one.value = %r;"
        choose += " one.dispatchEvent(new Event('change')); })()"
        assert tab.do("document.getElementById('answer-first-label').hidden")
        tab.do(choose % ("order", "above"))
        names = "document.getElementById('answer-%s').selectedOptions[0].textContent"
        assert tab.do(names % "first") == "student after distillm2"
        assert tab.do(names % "second") == "student after kd"
        told = tab.do("document.getElementById('answer-count').textContent")
        counts = re.search(
            r"higher on (\d+), lower on (\d+), equal on (\d+); mean difference \+(\d\.\d)", told
        )
        assert counts, told
        assert sum(int(counts[n]) for n in (1, 2, 3)) == 30
        assert float(counts[4]) == pytest.approx(3.1, abs=0.06)
        shown = "[...document.querySelectorAll('.answer .apart')].map(one => one.textContent)"
        ahead = [float(text.split()[1].replace("−", "-")) for text in tab.do(shown)]
        assert ahead == sorted(ahead, reverse=True)
        tab.do(choose % ("order", "below"))
        behind = [float(text.split()[1].replace("−", "-")) for text in tab.do(shown)]
        assert behind == sorted(behind)
        assert behind[0] < ahead[0]
        tab.do(choose % ("second", "0"))  # the teacher
        assert "against teacher" in tab.do("document.getElementById('answer-count').textContent")
        assert tab.troubles == []
        tab.open(path, width=390)
        outside = """[...document.querySelectorAll('nav a, .top .part')]
            .map(one => one.getBoundingClientRect())
            .filter(box => box.left < 0 || box.right > 390 || !box.width).length"""
        assert tab.do(outside) == 0
        assert tab.do("document.documentElement.scrollWidth") == 390


def test_the_memory_of_a_gpu_is_told_where_it_was_logged(tmp_path):
    folder = make_run(tmp_path / "run")
    assert device_memory_told(load_run(folder)) == ""
    row = {"phase": "train", "loss": 1.0, "memory/allocated": 1.5e9, "memory/reserved": 2.5e9}
    log(folder, [{**row, "step": step, "memory/peak": 2e9 + 1e7 * step} for step in range(1, 4)])
    text = page([folder], tmp_path / "page.html")[1].text.replace("\u00a0", " ")
    assert "2.03 GB at most, 1.5 GB between steps, 2.5 GB held by torch" in text
