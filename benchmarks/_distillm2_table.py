"""What benchmarks/distillm2.py reads from runs and writes: BLEU, means over seeds, tables, the plot."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any


def lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def bleu(rows: list[dict[str, Any]]) -> float:
    """Corpus BLEU, the mean over the seeds of the answers."""
    import sacrebleu

    scores = []
    for seed in sorted({row["seed"] for row in rows}):
        mine = [row for row in rows if row["seed"] == seed]
        most = max(len(row["references"]) for row in mine)
        references = [
            [row["references"][n] if n < len(row["references"]) else None for row in mine]
            for n in range(most)
        ]
        scores.append(sacrebleu.corpus_bleu([row["response"] for row in mine], references).score)
    return statistics.fmean(scores)


def summary(found: dict[str, dict[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row for each method: means and standard errors over seeds, and the distance to DistiLLM-2."""
    rows, ours = [], found.get("DistiLLM-2", {})
    for name, runs in found.items():
        if not runs:
            continue
        row: dict[str, Any] = {"method": name, "seeds": len(runs)}
        for key in next(iter(runs.values())):
            values = [run[key] for run in runs.values() if run[key] is not None]
            if values:
                row[key], row[f"{key}_se"] = mean_and_error(values)
        for key in ("rouge_l_greedy", "rouge_l_sampled"):
            ahead = [run[key] - ours[seed][key] for seed, run in runs.items() if seed in ours]
            if ahead:  # seeds share the teacher's text, so differences within a seed are less noisy
                row[f"{key}_over_distillm2"], row[f"{key}_over_distillm2_se"] = mean_and_error(ahead)
        rows.append(row)
    return sorted(rows, key=lambda row: -row["rouge_l_sampled"])


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), spread / len(values) ** 0.5


def markdown(record: dict[str, Any]) -> str:
    """The table, the systems that every method starts from and learns from, and the probes."""
    columns = (
        "| method | ROUGE-L, T = 1 | ROUGE-L, greedy | BLEU, T = 1 | BLEU, greedy | KL(p, q) | KL(q, p) "
        "| KL(q, p), own text | distinct-2 | student wrote | seconds | of it writing | seeds |"
    )
    head = [columns, "|---" * (columns.count("|") - 1) + "|"]
    parts = ["\n".join([*head, *(line(row) for row in record["rows"])])]
    parts += [
        f"{row['system']}: ROUGE-L {row['rouge_l_sampled']:.1f} at temperature 1, "
        f"{row['rouge_l_greedy']:.1f} greedy."
        for row in record["systems"]
    ]
    for probe in record["probes"]:
        title = f"## {probe['title']}\n"
        parts.append("\n".join([title, *head, *(line(row) for row in probe["rows"])]))
    return "\n\n".join(parts) + "\n"


def line(row: dict[str, Any]) -> str:
    """One line of a table."""

    def cell(key: str, digits: int = 1) -> str:
        if row.get(key) is None:
            return "-"
        error = f" ± {row[f'{key}_se']:.{digits}f}" if row.get(f"{key}_se") else ""
        return f"{row[key]:,.{digits}f}{error}"

    cells = [
        row["method"], cell("rouge_l_sampled"), cell("rouge_l_greedy"), cell("bleu_sampled"),
        cell("bleu_greedy"), cell("kl", 3), cell("reverse_kl", 3), cell("reverse_kl_own", 3),
        f"{row['distinct_2']:.3f}", f"{row['student_wrote']:,.0f}", cell("seconds", 0),
        cell("seconds_writing", 0), str(row["seeds"]),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """ROUGE-L of both decodings, with standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.4), sharey=True, layout="constrained")
    ordered = rows[::-1]
    names = [row["method"] for row in ordered]
    for axis, key, title in zip(
        axes,
        ("rouge_l_sampled", "rouge_l_greedy"),
        ("sampled at temperature 1, five times", "greedy"),
        strict=True,
    ):
        for place, row in enumerate(ordered):
            colour = "#c0392b" if row["method"].startswith("DistiLLM-2") else "#4c72b0"
            axis.errorbar(row[key], place, xerr=row[f"{key}_se"] or None, fmt="o", color=colour, capsize=3)
        axis.set_yticks(range(len(names)), names)
        axis.set(title=title, xlabel="ROUGE-L and standard error (none: one seed)")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
