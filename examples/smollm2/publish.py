"""Makes the committed result of this example from its run folder: numbers, curves and the README's table.

python examples/smollm2/publish.py [RUN_FOLDER]     # default: runs/smollm2
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from stillhouse.files import write_json
from stillhouse.report import RunRecord, load_run

HERE = Path(__file__).parent
RESULT = HERE.parent.parent / "benchmarks" / "results" / "smollm2.json"
SYSTEMS = ("teacher", "student before", "student after")
SHOWN = {
    "rouge_l": "ROUGE-L",
    "kl_to_teacher": "KL to teacher",
    "top1_agreement": "top-1 agreement",
    "loss": "loss on references",
    "finished": "answers that end",
    "parameters": "parameters",
}
START, END = "<!-- result -->", "<!-- end of result -->"


def main() -> None:
    """Write smollm2.json and smollm2.svg, and fill the table of README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/smollm2"))
    run = load_run(parser.parse_args().folder)
    if run.status != "done":
        raise SystemExit(f"{run.folder}: the run is {run.status}; publish a finished one")
    result = summary(run)
    write_json(RESULT, result)
    plot(result, RESULT.with_suffix(".svg"))
    readme = HERE / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{START}\n{table(result['rows'])}\n{END}{after}", encoding="utf-8")
    print(json.dumps(result["rows"], indent=2))


def summary(run: RunRecord) -> dict[str, Any]:
    """The systems' metrics, the gain with its uncertainty, and both curves."""
    found = {one.system: one for one in run.evaluations}
    environment = run.environment
    gains = [
        late["rouge_l"] - early["rouge_l"]
        for early, late in zip(found["student before"].rows, found["student after"].rows, strict=True)
    ]
    return {
        "command": "stillhouse run examples/smollm2/run.yaml",
        "date": str(run.state["ended"])[:10],
        "versions": {name: environment[name] for name in ("stillhouse", "python", "torch", "transformers")},
        "threads": environment["threads"],
        "seconds": run.state["seconds"],
        "settings": found["teacher"].settings,
        "rouge_l_gain": {
            "mean": round(statistics.fmean(gains), 2),
            "standard_error": round(statistics.stdev(gains) / len(gains) ** 0.5, 2),
            "prompts": len(gains),
        },
        "rows": [{"system": name, **found[name].metrics} for name in SYSTEMS],
        "training": [
            {"step": row["step"], "kl": round(row["loss"], 4)} for row in run.log if row["phase"] == "train"
        ],
        "validation": [
            {"step": row["step"], "loss": round(row["loss"], 4)} for row in run.log if row["phase"] == "valid"
        ],
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Both curves over optimiser steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, value, label in (
        ("validation", "loss", "loss on 50 held-out responses"),
        ("training", "kl", "training: KL to the teacher"),
    ):
        rows = result[name]
        marker = "o" if name == "validation" else ""
        axes.plot([row["step"] for row in rows], [row[value] for row in rows], marker=marker, label=label)
    axes.set_xlabel("optimiser steps of 8 rows")
    axes.set_ylabel("nats per token")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def table(rows: list[dict[str, Any]]) -> str:
    """The systems as a Markdown table."""
    lines = [
        "| system | " + " | ".join(SHOWN.values()) + " |",
        "|---|" + "---|" * len(SHOWN),
    ]
    lines += [
        f"| {row['system']} | " + " | ".join(cell(name, row.get(name)) for name in SHOWN) + " |"
        for row in rows
    ]
    return "\n".join(lines)


def cell(name: str, value: float | None) -> str:
    """A number as people write it; nothing where it was not measured."""
    if value is None:
        return ""
    if name == "parameters":
        return f"{value / 1e6:.1f} M"
    if name == "finished":
        return f"{value:.0%}"
    return f"{value:.1f}" if name == "rouge_l" else f"{value:.2f}"


if __name__ == "__main__":
    main()
