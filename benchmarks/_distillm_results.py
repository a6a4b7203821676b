"""What the runs of distillm_speed.py have come to: from their folders to rows, a table and a plot."""

from __future__ import annotations

import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

PARTS = ("generate", "teacher", "student")
NAMES = {"generate": "writing", "teacher": "teacher", "student": "forward", "rest": "backward and optimiser"}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run, each step's training before its validation."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda row: (row["step"], row["phase"]))


def measure(folder: Path) -> dict[str, Any]:
    """Quality: on held-out prompts at the end, on validation prompts along the way, and what phi did."""
    rows = rows_of(folder)
    after = json.loads((folder / "evaluation" / "student-after.json").read_text(encoding="utf-8"))["metrics"]
    train = [row for row in rows if row["phase"] == "train"]
    curve = [[row["step"], row["rouge_l"], row["loss"]] for row in rows if row["phase"] == "valid"]
    name = "schedule/responses.student_share"
    phi = [row[name] for row in train if name in row]
    return {
        "rouge_l": after["rouge_l"], "kl": after["kl_to_teacher_on_own_text"],
        "mean_length": after["mean_length"],
        "dev_loss": curve[-1][2], "curve": curve,
        "student_share": sum(row.get("responses/student", 0.0) for row in train) / len(train),
        "busy_seconds": sum(row["seconds"] for row in train),
        **({"phi": phi[-1], "phi_curve": phi} if phi else {}),
    }  # fmt: skip


def timed(folder: Path, steps: int) -> dict[str, Any]:
    """Speed: seconds of `steps` steps, where they go, and how many have passed at which step.

    The first row of the log is warm-up and counts as the others do, but for what the teacher wrote in it.
    """
    rows = [row for row in rows_of(folder) if row["phase"] == "train"]
    first, later = rows[0], rows[1:]
    scale = steps / (rows[-1]["step"] - first["step"])
    parts = {part: scale * sum(row.get(f"seconds/{part}", 0.0) for row in later) for part in PARTS}
    parts["rest"] = scale * sum(row["seconds"] for row in later) - sum(parts.values())
    once = first["seconds/generate"] if first.get("responses/teacher") else 0.0
    parts["generate"] += once
    clock, passed = [[0.0, once]], once
    for row in later:
        passed += scale * row["seconds"]
        clock.append([steps * (row["step"] - first["step"]) / (rows[-1]["step"] - first["step"]), passed])
    return {"seconds": passed, "parts": parts, "clock": clock, "steps": rows[-1]["step"]}


def between(points: list[list[float]], x: float) -> float:
    """The value at x of a line through points."""
    for (left, low), (right, high) in pairwise(points):
        if x <= right:
            return low + (high - low) * (x - left) / (right - left)
    return points[-1][1]


def time_to(curve: list[list[float]], target: float) -> float | None:
    """Seconds until a curve of (seconds, quality) reaches a quality, in straight lines between its points."""
    if curve[0][1] >= target:
        return curve[0][0]
    for (left, low), (right, high) in pairwise(curve):
        if high >= target:
            return left + (right - left) * (target - low) / (high - low)
    return None


def summary(found: dict[str, list[dict[str, Any]]], times: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each method: quality as means over seeds, speed from the timing. A peer has no parts."""
    rows = []
    curves = {}
    for name, runs in found.items():
        points = zip(*(run["curve"] for run in runs), strict=True)
        curves[name] = [
            [between(times[name]["clock"], same[0][0]), statistics.mean(point[1] for point in same)]
            for same in points
        ]
    target = curves["GKD"][-1][1]
    for name, time in times.items():
        runs = found.get(name, [time])
        rouge = [run["rouge_l"] for run in runs if "rouge_l" in run]
        keys = [key for key, value in runs[0].items() if isinstance(value, float | int)]
        row = {
            "method": name, "seeds": len(rouge),
            **{key: statistics.mean(run[key] for run in runs) for key in keys},
            "seconds": time["seconds"], "times_kd": time["seconds"] / times["KD"]["seconds"],
            "rouge_l_sd": statistics.stdev(rouge) if len(rouge) > 1 else None,
            "seconds_each": time["seconds_each"],
        }  # fmt: skip
        if "parts" in time:
            row["parts"] = {NAMES[part]: seconds for part, seconds in time["parts"].items()}
        if name in curves:
            row |= {
                "seconds_to_gkds_quality": time_to(curves[name], target), "curve": curves[name],
                "timed_steps": time["steps"], "each_seed": runs,
            }  # fmt: skip
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "| method | seconds | x KD | writing | teacher | forward | backward, optimiser "
        "| student text | phi at end | ROUGE-L (seeds) | KL to teacher on own text | s to GKD's ROUGE |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]

    def shown(row: dict[str, Any], name: str, digits: int) -> str:
        return "-" if row.get(name) is None else f"{row[name]:.{digits}f}"

    for row in rows:
        parts = " | ".join(f"{value:.1f}" for value in row.get("parts", {}).values()) or " | ".join("-" * 4)
        spread = "" if row["rouge_l_sd"] is None else f" ± {row['rouge_l_sd']:.1f}"
        quality = f"{row['rouge_l']:.1f}{spread} ({row['seeds']})" if row["seeds"] else "-"
        each = row["seconds_each"]
        spread_of_time = f" ({each[0]:.0f} to {each[-1]:.0f})" if len(each) > 1 else ""
        lines.append(
            f"| {row['method']} | {row['seconds']:.1f}{spread_of_time} | {row['times_kd']:.2f} | {parts} "
            f"| {shown(row, 'student_share', 2)} | {shown(row, 'phi', 2)} "
            f"| {quality} | {shown(row, 'kl', 3)} | {shown(row, 'seconds_to_gkds_quality', 1)} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Quality against time, and where the time of each method goes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for number, row in enumerate(rows):
        if "curve" not in row:
            continue
        x, y = zip(*row["curve"], strict=True)
        label = f"{row['method']} ({row['seeds']})"
        left.plot(x, y, marker="o", markersize=3, color=f"C{number}", label=label)
    left.set(xlabel="seconds of training", ylabel="validation ROUGE-L")
    left.set_title("the same number of steps; mean of (seeds)", fontsize=10)
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    rows = [row for row in rows if "parts" in row]
    names, start = [row["method"] for row in rows][::-1], [0.0] * len(rows)
    for number, part in enumerate(rows[0]["parts"]):
        widths = [row["parts"][part] for row in rows][::-1]
        right.barh(names, widths, left=start, color=f"C{number}", label=part)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    right.set(xlabel="seconds of training")
    right.set_title("where they go", fontsize=10)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=130)
