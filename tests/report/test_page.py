"""What the page says, read out of the HTML."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from stillhouse.console import visible
from stillhouse.report import find_runs, load_run, load_runs, summary_table
from stillhouse.report.breakdown import phase_tables, seconds_by_phase
from stillhouse.report.comparison import comparison_tables, comparison_text
from stillhouse.report.configuration import config_diff
from stillhouse.report.plots import Curve, line_plot, running_mean, thinned
from stillhouse.report.systems import gather
from tests.report.made_runs import HOSTILE, make_run
from tests.report.reading import answers, page


def test_the_comparison_says_what_the_files_say(three_runs, tmp_path):
    _, tags = page([three_runs], tmp_path / "report.html", "Three students")
    for words in (
        "Three students", "student after distillm2", "58.3", "+16.5", "90% of the gap closed", "12.4×",
        "31 prompt too long", "skew_kl", "command line", "recipe distillm2", "KL to teacher",
        "Steps 120", "Tokens 312k", "More measures",
    ):  # fmt: skip
        assert words in tags.text, words
    assert "/home/me" not in tags.text
    assert "/opt/bin" not in tags.text
    assert tags.tags.count("svg") >= 7
    assert len(tags.ids) == len(set(tags.ids))


def test_the_page_needs_no_other_file(three_runs, tmp_path):
    html, tags = page([three_runs], tmp_path / "report.html")
    assert all(address.startswith(("#", "data:")) for address in tags.addresses)
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert "default-src 'none'" in html


def test_model_text_cannot_become_markup(three_runs, tmp_path):
    html, tags = page([three_runs], tmp_path / "report.html")
    assert tags.tags.count("script") == 2
    assert "img" not in tags.tags
    assert "<img src=x" not in html
    row = next(row for row in answers(html)["rows"] if row["id"] == "e2e:3")
    assert row["responses"]["0"][2][0][0] == visible(HOSTILE)
    assert not re.search("[\x00\x1b\u2028\u202e\ud800]", html)


def test_names_and_settings_cannot_become_markup(tmp_path):
    folder = make_run(tmp_path / "run")
    state = json.loads((folder / "state.json").read_text())
    told = {"name": HOSTILE, "message": HOSTILE, "command": HOSTILE, "recipe": HOSTILE, "state": HOSTILE}
    (folder / "state.json").write_text(json.dumps({**state, **told}))
    (folder / "environment.json").write_text(json.dumps({"stillhouse": HOSTILE, HOSTILE: HOSTILE}))
    sets = [{"name": HOSTILE, "path": HOSTILE, "sha256": HOSTILE, "rows": HOSTILE, "dropped": {HOSTILE: 3}}]
    (folder / "data.json").write_text(json.dumps({"sets": sets, "warnings": [HOSTILE]}))
    (folder / "models.json").write_text(json.dumps({HOSTILE: {"path": HOSTILE, "parameters": 3}}))
    for path in (folder / "evaluation").glob("*.json"):
        found = json.loads(path.read_text())
        metrics = {**found["metrics"], HOSTILE: 1.0, "curve": [HOSTILE, {"temperature": HOSTILE}]}
        path.write_text(json.dumps({**found, "label": HOSTILE, "task": HOSTILE, "metrics": metrics}))
    entry = {"value": HOSTILE, "origin": HOSTILE}
    (folder / "provenance.json").write_text(json.dumps({"student.path": entry, HOSTILE: entry}))
    log = {"phase": "train", "step": 1, "loss": 1.0, f"schedule/{HOSTILE}": 0.5, f"loss/{HOSTILE}": 2.0,
           f"other/{HOSTILE}": 1.0, HOSTILE: 2.0}  # fmt: skip
    valid = [{"phase": "valid", "step": step, f"v{HOSTILE}": step / 2} for step in (1, 2)]
    rows = "".join(json.dumps(row) + "\n" for row in (log, *valid))
    (folder / "metrics.jsonl").write_text(rows)
    html, tags = page([folder], tmp_path / "report.html")
    assert tags.tags.count("script") == 2
    assert not {"img", "a><script"} & set(tags.tags)
    assert not any("javascript:" in address for address in tags.addresses)
    assert "{{ 7 * 7 }}" in tags.text
    assert not re.search("[\x00\x1b\u2028\u202e\ud800]", html)
    assert len(tags.ids) == len(set(tags.ids))


def test_everything_that_a_run_logs_is_on_the_page(tmp_path):
    make_run(tmp_path / "runs" / "distillm2", "distillm2", tasks=True)
    make_run(tmp_path / "runs" / "kd", "kd", tasks=True)
    html, tags = page([tmp_path / "runs"], tmp_path / "report.html")
    for words in (
        "All tasks", "maths Accuracy", "objective.alpha (α)", "Buffer: age of the responses",
        "Buffer: responses held", "Quality and diversity: Self-BLEU", "Quality and diversity: distinct-2",
        "Validation ROUGE-L over time", "backward the backward pass", "108k", "43 repetition: loops",
        "31 repetition: loops", "2 form: empty", "Resampled", "Keys",
        "Round 1, student · repetition: loops (4-gram 9 times)",
    ):  # fmt: skip
        assert words in tags.text, words
    assert ">T=0.5</text>" in html
    assert tags.tags.count("script") == 2
    assert len(tags.ids) == len(set(tags.ids))


def test_error_bars_reach_as_far_as_the_interval(three_runs, tmp_path):
    html, _ = page([three_runs], tmp_path / "report.html")
    rows = summary_table(load_runs([three_runs])).records()
    widest, own = max(row["rouge_l_high"] for row in rows), rows[-1]
    left = 100 * own["rouge_l_low"] / widest
    width = 100 * (own["rouge_l_high"] - own["rouge_l_low"]) / widest
    assert f'<b style="left: {left:.1f}%; width: {width:.1f}%">' in html
    path = three_runs / "kd" / "evaluation" / "student_after.json"
    path.write_text(path.read_text().replace('"rouge_l_std": 0.3', '"rouge_l_std": NaN'))
    assert "55.2" in page([three_runs], tmp_path / "report.html")[1].text


def test_a_judges_interval_is_the_error_bar(tmp_path):
    folder = make_run(tmp_path / "run")
    metrics = {
        "win_rate": 0.6,
        "win_rate_low": 0.5,
        "win_rate_high": 0.75,
        "first_position_rate": 0.52,
        "pairs": 80,
    }
    found = {"system": "student after", "label": "kd", "task": "judge", "metrics": metrics}
    (folder / "evaluation/student-after.judge.json").write_text(json.dumps(found))
    html, tags = page([folder], tmp_path / "report.html")
    assert "60.0% (50.0% to 75.0%)" in tags.text
    assert '<b style="left: 66.7%; width: 33.3%">' in html
    assert "Win rate low" not in tags.text
    row = summary_table(load_runs([folder])).records()[-1]
    assert (row["win_rate"], row["win_rate_low"], row["win_rate_high"]) == (0.6, 0.5, 0.75)


def test_scores_of_any_task_stand_beside_the_answers(tmp_path):
    folder = make_run(tmp_path / "run", tasks=True)
    found = answers(page([folder], tmp_path / "report.html")[0])
    index = next(str(n) for n, one in enumerate(found["systems"]) if one["task"] == "maths")
    row = next(row for row in found["rows"] if row["id"] == "maths:1")
    assert row["responses"][index] == [1.0, "", [["2", "Accuracy 100.0% · 3 tokens", 0]]]
    (cut,) = next(row for row in found["rows"] if row["id"] == "e2e:0")["responses"]["0"][2]
    assert cut[1].startswith("ROUGE-L ")
    assert cut[1].endswith("12 tokens · cut off")


def test_speeds_that_were_timed_in_turns_tell_how_much_faster(tmp_path):
    folder = make_run(tmp_path / "run")
    for system, tokens in (("teacher", 100.0), ("student after", 5000.0)):
        metrics = {"parameters": 10, "tokens_per_second": tokens, "first_token_seconds": 0.1}
        if system != "teacher":
            metrics |= {"decode_speed_up": 2.5, "first_token_speed_up": 4.0}
        found = {"system": system, "label": "student after kd", "task": "cost", "metrics": metrics}
        found["settings"] = {"kind": "cost"}
        (folder / f"evaluation/{system}.cost.json".replace(" ", "-")).write_text(json.dumps(found))
    text = page([folder], tmp_path / "report.html")[1].text
    assert "5,000 2.5× the teacher" in text
    assert "0.1 0.25× the teacher" in text
    assert "50× the teacher" not in text
    assert "2.5× faster decoding, the two timed in turns" in text


def test_whole_numbers_have_whole_ticks():
    curve = Curve("kd", "--run-0", [(gamma, 1.0 + gamma / 9) for gamma in range(1, 9)])
    ticks = re.findall(r">([\d.]+)</text>", line_plot("draft", "Draft", [curve], "gamma", "tokens").svg)
    assert "1.5" not in [tick for tick in ticks[:6]]
    assert {"2", "4"} <= set(ticks)


def test_a_standard_error_becomes_an_interval(tmp_path):
    folder = make_run(tmp_path / "run")
    metrics = {
        "acc": 0.6,
        "acc_se": 0.05,
        "exact_match.strict-match": 0.25,
        "exact_match.strict-match_se": 0.1,
    }
    found = {"system": "student after", "label": "kd", "task": "arc", "metrics": metrics}
    (folder / "evaluation/student-after.arc.json").write_text(json.dumps(found))
    html, tags = page([folder], tmp_path / "report.html")
    assert "60.0% ± 9.8%" in tags.text
    assert "25.0% ± 19.6%" in tags.text
    assert "Exact match (strict-match)" in tags.text
    low, high = 0.6 - 1.959964 * 0.05, 0.6 + 1.959964 * 0.05
    assert f'<b style="left: {100 * low / high:.1f}%; width: {100 * (high - low) / high:.1f}%">' in html


def test_the_time_is_counted_by_phase_and_the_rest_is_other(tmp_path):
    run = load_run(make_run(tmp_path / "run", "gkd"))
    spent = seconds_by_phase(run)
    assert spent["backward"] == pytest.approx(12)
    assert list(spent) == ["generate", "teacher", "student", "backward", "optimiser"]
    whole = sum(spent.values())
    longer = replace(run, state={**run.state, "seconds": whole + 5})
    assert seconds_by_phase(longer)["other"] == pytest.approx(5)
    ((name, rows),) = phase_tables([run])
    generate = next(row for row in rows if row.name == "generate")
    assert (name, generate.seconds, generate.tokens, generate.rate) == ("gkd", "24 s", "108k", "4,500")


def test_differences_leave_out_what_follows_from_a_kind(three_runs):
    runs = [load_run(folder) for folder in find_runs([three_runs])]
    found = {row.path: row.values for row in config_diff(runs)}
    assert found["objective.alpha"][0] == "not set"
    assert list(found)[-1] == "objective.alpha"
    runs[0].config["responses.extra"] = replace(runs[0].config["train.seed"], origin="default")
    assert "responses.extra" not in {row.path for row in config_diff(runs)}


def test_a_teacher_that_a_sweep_shares_is_the_teacher_that_was_asked_for(three_runs):
    runs = [load_run(folder) for folder in find_runs([three_runs])]
    before = config_diff(runs)
    entry = replace(runs[0].config["train.seed"], origin="sweep")
    own = {path: one for path, one in runs[0].config.items() if path.startswith("teacher.")}
    assert own, "the run names its teacher"
    for path in own:
        del runs[0].config[path]
        runs[0].config[path.replace("teacher.", "teacher.of.")] = replace(own[path], origin="sweep")
    runs[0].config["teacher.kind"] = replace(entry, value="cache")
    runs[0].config["teacher.folder"] = replace(entry, value="shared")
    assert config_diff(runs) == before
    for path, one in runs[0].config.items():
        runs[0].config[path] = replace(one, origin="run.yaml:3")
    assert "teacher.folder" in {row.path for row in config_diff(runs)}, "a cache that somebody chose is shown"


def test_the_shared_teacher_is_shown_once(three_runs):
    runs = [load_run(folder) for folder in find_runs([three_runs])]
    assert [(system.label, system.run) for system in gather(runs)] == [
        ("teacher", None), ("student before", None), ("student after kd", 0), ("student after gkd", 1),
        ("student after distillm2", 2),
    ]  # fmt: skip


def test_teachers_that_differ_are_shown_each(three_runs):
    path = three_runs / "gkd" / "evaluation" / "teacher.json"
    result = json.loads(path.read_text())
    result["metrics"]["rouge_l"] = 50.0
    path.write_text(json.dumps(result))
    rows = summary_table(load_runs([three_runs])).records()
    assert [row["system"] for row in rows[:3]] == ["teacher · kd", "teacher · gkd", "teacher · distillm2"]
    assert [row["rouge_l"] for row in rows[:3]] == [60.1, 50.0, 60.1]


def test_summary_rows_and_cells(three_runs):
    rows = summary_table(load_runs([three_runs])).records()
    assert rows[2]["run"] == "kd"
    assert rows[2]["rouge_l"] == 55.2
    assert rows[0]["run"] is None
    (table,) = comparison_tables(load_runs([three_runs]))
    assert [column.heading for column in table.columns[:3]] == ["System", "ROUGE-L", "KL to teacher"]
    cells = [[f"{cell.text} {cell.spread}".rstrip() for cell in row] for row in table.rows]
    assert cells[2][0] == "student after kd"
    assert re.fullmatch(r"55.2 ± \d\.\d", cells[2][1])
    assert re.fullmatch(r"0.210 ± 0.0\d\d", cells[2][2])
    assert all(len(line) == len(table.columns) for line in cells)


@pytest.mark.parametrize(
    "missing", ["evaluation", "metrics.jsonl", "data.json", "models.json", "provenance.json"]
)
def test_any_part_may_be_missing(three_runs, tmp_path, missing):
    path = three_runs / "kd" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "58.3" in page([three_runs], tmp_path / "all.html")[1].text
    assert "kd" in page([three_runs / "kd"], tmp_path / "one.html")[1].text


def test_a_failed_run_says_why(tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    message = "loss is NaN at step 3"
    (folder / "state.json").write_text(json.dumps({"state": "failed", "name": "broken", "message": message}))
    (folder / "metrics.jsonl").write_text('{"phase": "train", "step": 3, "loss": NaN}\n{"cut": ')
    text = page([folder], tmp_path / "report.html")[1].text
    for words in ("failed", message, "1 line could not be read"):
        assert words in text


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("evaluation/student_after.json", '"tvd": 0.2', f'"tvd": 1{"0" * 400}'),
        ("evaluation/student_after.json", '"tvd": 0.2', f'"tvd": {"[" * 100_000}'),
        ("responses/curation.json", '"prompts": 3300', '"prompts": Infinity'),
        ("responses/curation.json", '"examples": [', '"examples": 7, "other": ['),
        ("metrics.jsonl", '"seconds": 0.5', f'"seconds": 1{"0" * 400}'),
        ("evaluation/student_after.jsonl", '"seed": 1', '"seed": {"a": [null]}'),
    ],
)
def test_odd_values_spoil_no_page(tmp_path, name, old, new):
    path = make_run(tmp_path / "run", tasks=True) / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert "KL to teacher" in page([tmp_path / "run"], tmp_path / "report.html")[1].text
    assert comparison_text(load_runs([tmp_path / "run"]), "latex")


def test_plots_are_themed_and_named():
    curve = Curve("kd", "--run-0", [(step, 1 / (step + 1)) for step in range(50)], smooth=True)
    plot = line_plot("loss", "Loss <of> kd", [curve], "step", "nats per token")
    assert "var(--run-0)" in plot.svg
    assert "var(--soft)" in plot.svg
    assert not re.search(r"#0102|#000000|#ffffff", plot.svg)
    assert "Loss &lt;of&gt; kd</title>" in plot.svg
    assert ">nats per token</text>" in plot.svg
    assert plot == line_plot("loss", "Loss <of> kd", [curve], "step", "nats per token")


def test_thinning_keeps_the_mean_and_smoothing_a_constant():
    points = [(float(x), float(x * x)) for x in range(1000)]
    few = thinned(points, 100)
    assert len(few) == 100
    assert sum(y for _, y in few) / 100 == pytest.approx(sum(y for _, y in points) / 1000)
    assert thinned(points[:5]) == points[:5]
    assert running_mean([2.0] * 7, 2) == [2.0] * 7
    assert running_mean([0.0, 3.0, 0.0], 1) == [1.5, 1.0, 1.5]


def test_the_report_loads_no_torch(three_runs, tmp_path):
    script = (
        "import sys; from pathlib import Path; from stillhouse.report import write_report;"
        f"write_report([Path({str(three_runs)!r})], Path({str(tmp_path / 'r.html')!r}));"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
