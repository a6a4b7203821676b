"""Which plots a set of runs deserves: losses, validation, schedules, sources, speed, and the results that are
curves themselves. What nobody logged is not drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from stillhouse.console.format import compact_number, is_number
from stillhouse.report.breakdown import SOURCE_COLOURS
from stillhouse.report.metrics import metric_info
from stillhouse.report.plots import Curve, Plot, area_plot, line_plot
from stillhouse.report.record import Row, RunRecord
from stillhouse.report.seeds import name_of_seeds, seed_groups
from stillhouse.report.systems import System, run_colours


def series(rows: Sequence[Row], key: str, x: Sequence[float] | None = None) -> list[tuple[float, float]]:
    """The finite values of `key` over the step, or over `x` with one value a row."""
    xs = x if x is not None else [row["step"] for row in rows]
    return [
        (float(at), float(row[key]))
        for at, row in zip(xs, rows, strict=True)
        if is_number(row.get(key)) and math.isfinite(row[key])
    ]


def main_plots(runs: Sequence[RunRecord]) -> list[Plot]:
    """Validation quality over steps and over time, and the losses."""
    plots = [_over_steps(runs, "valid", "rouge_l", "Validation ROUGE-L", "ROUGE-L", marked=True)]
    plots.append(_quality_over_time(runs))
    plots.append(_training_loss(runs))
    plots.append(_over_steps(runs, "valid", "loss", "Validation loss", "nats per token", marked=True))
    shown = ("rouge_l", "loss", "epoch", "seconds")
    others = [name for name in _keys(runs, "valid", "") if name not in shown and "/" not in name]
    for name in others:
        known = metric_info(name)
        if len({row[name] for run in runs for row in run.metrics("valid") if is_number(row.get(name))}) > 1:
            title = f"Validation: {known.label}"
            plots.append(_over_steps(runs, "valid", name, title, known.label, marked=True))
    return [plot for plot in plots if plot]


SYMBOLS = {
    "responses.student_share": "φ",
    "responses.fresh_share": "λ / φ",
    "objective.student_share": "β",
    "alpha": "α",
    "loss_weight": "weight; β",
    "t": "t in TAID",
}
"""What the papers call a number that often follows a schedule: by its path, or by its last name anywhere."""


def constant_schedules(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Scheduled numbers that did not move in any run, with the value that each run had."""
    found = []
    for name in _keys(runs, "train", "schedule/"):
        values = {run.name: {y for _, y in series(run.metrics("train"), name)} for run in runs}
        if all(len(own) <= 1 for own in values.values()):
            known = {run: compact_number(next(iter(own))) for run, own in values.items() if own}
            same = len(set(known.values())) == 1
            text = next(iter(known.values())) if same else ", ".join(f"{v} ({r})" for r, v in known.items())
            found.append((name.removeprefix("schedule/"), text))
    return found


def schedule_plots(runs: Sequence[RunRecord]) -> list[Plot]:
    """Every scheduled number over the steps: phi, alpha, beta and t of the papers, or any other."""
    plots = []
    for name in _keys(runs, "train", "schedule/"):
        path = name.removeprefix("schedule/")
        symbol = SYMBOLS.get(path) or SYMBOLS.get(path.rpartition(".")[2])
        plots.append(_over_steps(runs, "train", name, f"{path} ({symbol})" if symbol else path, "value"))
    return [plot for plot in plots if plot]


def source_plots(runs: Sequence[RunRecord]) -> list[Plot]:
    """The shares of the sources over the steps, for each run in which they move."""
    plots: list[Plot] = []
    for index, run in enumerate(runs):
        rows = run.metrics("train")
        names = [name for name in _keys([run], "train", "responses/") if name.split("/")[1] in SOURCE_COLOURS]
        rows = [row for row in rows if any(is_number(row.get(name)) for name in names)]
        values = {name: [float(row.get(name) or 0.0) for row in rows] for name in names}
        if len(rows) < 3 or len(names) < 2 or all(max(line) - min(line) < 0.02 for line in values.values()):
            continue
        curves = [
            Curve(
                name.split("/")[1],
                SOURCE_COLOURS[name.split("/")[1]],
                list(zip(_steps(rows), line, strict=True)),
            )
            for name, line in values.items()
        ]
        title = "Sources of the responses" + (f" · {run.name}" if len(runs) > 1 else "")
        plots.append(area_plot(f"sources-{index}", title, curves, "step", "share"))
    return plots


BUFFER_PLOTS = {
    "replay/size": ("Buffer: responses held", "responses"),
    "replay/age": ("Buffer: age of the responses", "optimiser steps"),
    "replay/uses": ("Buffer: uses of a response so far", "draws"),
    "responses/student_age": ("Age of the student's responses", "optimiser steps"),
    "responses/on_policy": ("Steps on the student's text", "share"),
    "responses/fresh": ("Steps with fresh responses", "share"),
    "cache/hits": ("Teacher cache: found", "share of sequences"),
    "cache/megabytes": ("Teacher cache: size", "MB"),
    "curation/kept": ("Curation: prompts kept in the round", "share"),
    "curation/resampled": ("Curation: responses resampled", "responses"),
}
DRAWN_ELSEWHERE = ("schedule/", "loss/", "seconds/", "tokens/", "memory/", "teachers/")


def buffer_plots(runs: Sequence[RunRecord]) -> list[Plot]:
    """Age, size and uses of what is kept, and whatever else a part of the method logs about itself."""
    names = [
        name for name in BUFFER_PLOTS if any(name in row for run in runs for row in run.metrics("train"))
    ]
    for name in _keys(runs, "train", ""):
        source = name.removeprefix("responses/") in SOURCE_COLOURS
        if "/" in name and name not in BUFFER_PLOTS and not source and not name.startswith(DRAWN_ELSEWHERE):
            names.append(name)
    plots = []
    for name in names:
        title, unit = BUFFER_PLOTS.get(
            name, (name.replace("/", ": ").replace("_", " ").capitalize(), "value")
        )
        plots.append(_over_steps(runs, "train", name, title, unit))
    return [plot for plot in plots if plot]


def further_plots(runs: Sequence[RunRecord]) -> list[Plot]:
    """Learning rate, gradient norm, speed and whatever else was logged."""
    known = {  # the learning rate is no noisy measurement: smoothed it would be another one
        "learning_rate": ("Learning rate", "learning rate"),
        "grad_norm": ("Gradient norm", "norm before clipping"),
        "tokens_per_second": ("Training speed", "tokens per second"),
    }
    seen = ("loss", "epoch", "tokens", "sequences", "seconds", *known)
    rest = [name for name in _keys(runs, "train", "") if "/" not in name and name not in seen]
    titled = [(name, *labels) for name, labels in known.items()]
    titled += [(name, name.replace("_", " ").capitalize(), name.replace("_", " ")) for name in rest]
    plots = [
        _over_steps(runs, "train", name, title, y, smooth=name != "learning_rate")
        for name, title, y in titled
    ]
    return [plot for plot in plots if plot]


def elapsed(rows: Sequence[Row], step: float) -> float | None:
    """Seconds of training up to `step`, linear between log rows; None after the last row."""
    before, at = 0.0, 0.0
    for row in rows:
        seconds = row.get("seconds")
        spent = float(seconds) if is_number(seconds) else 0.0
        if step <= row["step"]:
            share = (step - at) / (row["step"] - at) if row["step"] > at else 1.0
            return before + max(0.0, share) * spent
        before, at = before + spent, row["step"]
    return None


def _training_loss(runs: Sequence[RunRecord]) -> Plot | None:
    if len(runs) > 1:
        caption = "Different objectives have different units of loss: compare the course, not the height."
        return _over_steps(runs, "train", "loss", "Training loss", "loss", smooth=True, caption=caption)
    rows = runs[0].metrics("train")
    parts = [name for name in _keys(runs, "train", "loss/") if series(rows, name)]
    curves = [Curve("total" if parts else "loss", "--run-0", series(rows, "loss"), smooth=True)]
    colours = {"loss/teacher": "--teacher", "loss/student": "--run-1", "loss/fixed": "--run-2"}
    curves += [
        Curve(f"on {name[5:]} responses", colours.get(name, "--run-4"), series(rows, name), smooth=True)
        for name in parts
    ]
    curves = [curve for curve in curves if curve.points]
    return None if _flat(curves) else line_plot("loss", "Training loss", curves, "step", "nats per token")


SQUEEZED = 6
"""How many times longer than another a run may take before the axis of time is logarithmic."""


def _quality_over_time(runs: Sequence[RunRecord]) -> Plot | None:
    """ROUGE-L against seconds of training; the validation loss where no ROUGE-L was taken."""
    names = ("rouge_l", "ROUGE-L"), ("loss", "nats per token")
    for name, unit in names:
        curves = []
        for run, label, colour in _labelled(runs):
            train = run.metrics("train")
            timed = [(elapsed(train, row["step"]), row) for row in run.metrics("valid")]
            known = [(at, row) for at, row in timed if at is not None]
            points = series([row for _, row in known], name, [at for at, _ in known])
            if len(points) > 1:
                curves.append(Curve(label, colour, points, marked=True))
        if not _flat(curves):
            title = f"Validation {metric_info(name).label} over time"
            caption = "Seconds of training with everything that it takes, generating responses included."
            ends = [curve.points[-1][0] for curve in curves]
            squeezed = min(ends) > 0 and max(ends) > SQUEEZED * min(ends)
            x = "seconds of training" + (", logarithmic" if squeezed else "")
            return line_plot("quality-time", title, curves, x, unit, caption, log_x=squeezed)
    return None


def _over_steps(
    runs: Sequence[RunRecord],
    phase: str,
    key: str,
    title: str,
    y: str,
    *,
    smooth: bool = False,
    marked: bool = False,
    caption: str = "",
) -> Plot | None:
    curves = [
        Curve(label, colour, points, smooth=smooth, marked=marked)
        for run, label, colour in _labelled(runs)
        if (points := series(run.metrics(phase), key))
    ]
    name = "".join(letter if letter.isalnum() else "-" for letter in f"{phase}-{key}")
    return None if _flat(curves) else line_plot(name, title, curves, "step", y, caption)


def _flat(curves: Sequence[Curve]) -> bool:
    """Whether there is nothing to see: no curve moves."""
    return all(len({y for _, y in curve.points}) < 2 for curve in curves)


def _labelled(runs: Sequence[RunRecord]) -> list[tuple[RunRecord, str, str]]:
    """Each run with its name in legends, which runs that differ in the seed alone share, and its colour."""
    labels: dict[int, str] = {}
    for members in seed_groups(runs):
        names = [runs[index].name for index in members]
        labels |= dict.fromkeys(members, name_of_seeds(names))
    return [
        (run, labels[n], colour) for n, (run, colour) in enumerate(zip(runs, run_colours(runs), strict=True))
    ]


def _keys(runs: Sequence[RunRecord], phase: str, prefix: str) -> list[str]:
    keys: dict[str, None] = {}
    for run in runs:
        for row in run.metrics(phase):
            keys.update(
                dict.fromkeys(
                    key
                    for key, value in row.items()
                    if key.startswith(prefix) and is_number(value) and key != "step"
                )
            )
    return list(keys)


def _steps(rows: Sequence[Row]) -> list[float]:
    return [row["step"] for row in rows]


DIVERSITY_METRICS = {
    "self_bleu": ("Quality and diversity: Self-BLEU", "Self-BLEU (left is more varied)"),
    "distinct_2": ("Quality and diversity: distinct-2", "distinct-2 (right is more varied)"),
}
DRAFT_METRICS = {
    "block_efficiency": ("Speculative decoding: block efficiency", "tokens a teacher pass"),
    "acceptance_rate": ("Speculative decoding: acceptance rate", "share of the student's tokens"),
}


def diversity_plots(systems: Sequence[System]) -> list[Plot]:
    """ROUGE-L against the diversity of the responses over temperatures, for every task `curve`: a system is
    better where its line lies higher at the same diversity. Error bars are standard deviations over seeds."""
    caption = "A point for each sampling temperature T. Higher at the same diversity is better."
    plots: list[Plot] = []
    for task, here in _with_list(systems, "curve"):
        for name, (title, unit) in DIVERSITY_METRICS.items():
            curves = [curve for system in here if (curve := _diversity_curve(system, name)) is not None]
            if curves:
                curves[1:] = [
                    replace(curve, notes=()) for curve in curves[1:]
                ]  # they would lie on each other
                key = f"diversity-{name}-{len(plots)}"
                plots.append(line_plot(key, f"{title}{task}", curves, unit, "ROUGE-L", caption))
    return plots


def draft_plots(systems: Sequence[System]) -> list[Plot]:
    """What the student saves as the teacher's draft model, over how many tokens it proposes at a time."""
    plots: list[Plot] = []
    for task, here in _with_list(systems, "by_gamma"):
        for name, (title, unit) in DRAFT_METRICS.items():
            curves = []
            for system in here:
                points = [
                    (point["gamma"], point[name])
                    for point in _points(system.metrics["by_gamma"], "gamma", name)
                ]
                if points:
                    curves.append(Curve(system.label, system.colour, points, marked=True))
            if curves:
                plots.append(line_plot(f"draft-{name}-{len(plots)}", f"{title}{task}", curves, "gamma", unit))
    return plots


def _with_list(systems: Sequence[System], name: str) -> Iterator[tuple[str, list[System]]]:
    """The systems of each task that have such a list; the task is a suffix for titles, where needed."""
    having = [system for system in systems if isinstance(system.metrics.get(name), list)]
    tasks = list(dict.fromkeys(system.task for system in having))
    for task in tasks:
        yield (f" · {task}" if len(tasks) > 1 else ""), [system for system in having if system.task == task]


def _diversity_curve(system: System, against: str) -> Curve | None:
    known = _points(system.metrics["curve"], against, "rouge_l", "temperature")
    points = sorted(known, key=lambda point: float(point["temperature"]))
    if not points:
        return None
    ends = (points[0], points[-1])
    spreads = [point.get("rouge_l_std") for point in points]
    return Curve(
        system.label,
        system.colour,
        [(point[against], point["rouge_l"]) for point in points],
        marked=True,
        notes=[f"T={point['temperature']:g}" if point in ends else "" for point in points],
        spread=[spread if is_number(spread) and math.isfinite(spread) else 0.0 for spread in spreads],
    )


def _points(found: list[Any], *names: str) -> list[dict[str, Any]]:
    """The points in which all these names are finite numbers."""
    return [
        point
        for point in found
        if isinstance(point, dict)
        and all(is_number(point.get(name)) and math.isfinite(point[name]) for name in names)
    ]
