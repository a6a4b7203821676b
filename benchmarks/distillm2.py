"""DistiLLM-2 and its ablations against SFT, KD, SeqKD, GKD, DistiLLM, CSD and DPKD on a real task.

Task: the cleaned E2E NLG set that Stillhouse brings along. A teacher of 5.0 M parameters, trained on all
8,349 texts; a student of 1.4 M, warm-started by SFT on 300 labelled rows, from which every method starts.
All methods take the same number of optimiser steps of 32 responses: 32 prompts, or 16 for methods that train
on a pair for each prompt. SFT goes on with its 300 rows; all others know prompts only, and the teacher's text
is written once for each seed and used by all methods of that seed. GKD and DistiLLM take their off-policy
part from it. Text is sampled at temperature 1, as it is evaluated; a probe has DistiLLM-2's own settings.

    python benchmarks/distillm2.py --folder runs/distillm2          # three seeds: about an hour of one core
    python benchmarks/distillm2.py --folder runs/distillm2 --probes # then the probes, one or three seeds each
    python benchmarks/distillm2.py --folder runs/small --small      # a check that it runs

Seconds are processor seconds of training on one thread; the student's writing is in them, the teacher's is
not (it is shared, and stated apart). Each student answers 100 held-out prompts greedily and, as the
papers do, five times by sampling at temperature 1. Writes benchmarks/results/distillm2.{json,png,md} (with
--small into --folder) after every seed. A folder that holds finished runs is gone on with.
"""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from _distillm2_methods import METHODS, OTHERS, PAIRED, PROBES
from _distillm2_table import bleu, lines, markdown, plot, summary
from _distillm_runs import DATA, RESULTS, done, llama, measure_processor_time, parser
from _distillm_runs import run as once
from _result import result, save

measure_processor_time()
SAMPLED = (10, 20, 30, 40, 50)


@dataclass(frozen=True)
class Size:
    """How large everything is, and what the probes vary."""

    teacher: tuple[int, int, int] = (256, 6, 8)
    student: tuple[int, int, int] = (160, 4, 5)
    """Width, layers, heads."""
    teacher_epochs: float = 6.0
    labelled: int = 300
    warm_steps: int = 150
    prompts: int = 512
    steps: int = 96
    batch: int = 32
    """Responses in an optimiser step."""
    lr: float = 2e-3
    temperature: float = 1.0
    top_p: float = 1.0
    """How all text for training is sampled."""
    limit: int = 100
    seeds: int = 3


SMALL = Size(
    teacher=(64, 2, 2), student=(48, 2, 2), teacher_epochs=0.04, labelled=16, warm_steps=3, prompts=16,
    steps=4, batch=16, limit=4, seeds=1,
)  # fmt: skip

WRITERS = {"student": 0, "teacher": 0}
"""Response tokens written since the counter was last emptied."""


def count_what_is_written() -> None:
    """Count tokens wherever a model writes for training."""
    from stillhouse.rollouts.generator import ResponseGenerator

    generate = ResponseGenerator.generate

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        responses = generate(self, *arguments, **options)
        WRITERS[self.source] += sum(len(response.token_ids) for response in responses)
        return responses

    ResponseGenerator.generate = counted  # type: ignore[method-assign]


def tree(size: Size, folder: Path, name: str, **more: Any) -> dict[str, Any]:
    """What all runs share."""
    train = {
        "batch_size": size.batch, "micro_batch_size": size.batch, "lr": size.lr, "warmup": 0.05,
        "max_steps": size.steps, "log_every": max(1, size.steps // 24), "save_every": "never",
        "validate_every": "never", "validate_rouge": False, "precision": "bfloat16", **more.pop("train", {}),
    }  # fmt: skip
    return {
        "name": name,
        "data": {
            "train": {"kind": "jsonl", "path": f"{DATA}/train.jsonl", "limit": size.prompts},
            "valid": f"{DATA}/dev.jsonl", "template": {"kind": "plain"},
            "max_prompt": 128, "max_response": 96, **more.pop("data", {}),
        },
        "engine": {
            "kind": "transformers", "batch_size": 256,
            "sampling": {"temperature": size.temperature, "top_p": size.top_p},
        },
        "train": train,
        "evaluate": {
            "data": f"{DATA}/eval.jsonl", "before": False, "teacher": False, "limit": size.limit,
            "sampling": {"temperature": 1.0}, "seeds": list(SAMPLED), **more.pop("evaluate", {}),
        },
        "output": {"folder": str(folder / name), "report": False},
        **more,
    }  # fmt: skip


def model(size: tuple[int, int, int]) -> dict[str, Any]:
    """A Llama over the demo's own byte-level BPE of 1,024."""
    return llama("package:stillhouse/demo/teacher", *size)


def run(config: dict[str, Any]) -> Path:
    """Run a configuration unless it has been, and count what is written; its folder."""
    folder = Path(config["output"]["folder"])
    if not done(folder):
        WRITERS.update(student=0, teacher=0)
        once(config, kept={"responses"})
        (folder / "written.json").write_text(json.dumps(WRITERS), encoding="utf-8")
    return folder


def make_teacher(size: Size, folder: Path) -> Path:
    """The teacher, trained on every text; its folder."""
    config = tree(
        size, folder, "teacher", recipe="sft", student=model(size.teacher),
        data={"train": {"kind": "jsonl", "path": f"{DATA}/train.jsonl", "each_output": True}},
        train={"epochs": size.teacher_epochs, "max_steps": None, "lr": 2e-3, "log_every": 50,
               "batch_size": 32, "micro_batch_size": 32},
        evaluate={"sampling": {"temperature": 0.0}, "seeds": [10]},
    )  # fmt: skip
    return run(config) / "student"


def make_student(size: Size, folder: Path) -> Path:
    """The student that every method starts from, fine-tuned on the labelled rows; its folder."""
    rows = {"kind": "jsonl", "path": f"{DATA}/train.jsonl", "limit": size.labelled}
    config = tree(
        size, folder, "warm-start", recipe="sft", student=model(size.student), data={"train": rows},
        train={"max_steps": size.warm_steps, "lr": 2e-3},
        evaluate={"sampling": {"temperature": 0.0}, "seeds": [10]},
    )  # fmt: skip
    return run(config) / "student"


def slug(name: str) -> str:
    """The name of a folder for a method."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def method_run(
    size: Size, folder: Path, models: tuple[Path, Path], name: str, method: dict[str, Any], seed: int
) -> Path:
    """Train one method with one seed, on the teacher's text of that seed."""
    teacher, student = models
    run_name = f"{slug(name)}-{seed}"
    config = tree(
        size, folder, run_name, student={"path": str(student)}, **method,
        teacher={"kind": "live", "path": str(teacher), "dtype": "bfloat16"},
    )  # fmt: skip
    recipe = method["recipe"]
    config["train"]["seed"] = seed
    if name == "SeqKD" and seed == 0:
        config["evaluate"] |= {"before": True, "teacher": True}
    if recipe in PAIRED:
        config["train"] |= {"batch_size": size.batch // 2, "micro_batch_size": size.batch // 2}
    if recipe == "distillm":
        config["train"]["validate_every"] = max(1, size.steps // 8)
    if recipe == "sft":
        config["data"]["train"] = {**config["data"]["train"], "limit": size.labelled}
    text = folder / f"seqkd-{seed}" / "responses"
    own = folder / run_name / "responses"
    if text.is_dir() and text != own and recipe != "sft":
        own.mkdir(parents=True, exist_ok=True)
        for path in text.glob("teacher*"):
            shutil.copy2(path, own)
    return run(config)


def greedy(size: Size, folder: Path, student: Path, name: str) -> dict[str, Any]:
    """ROUGE-L and BLEU of greedy answers; kept beside the run."""
    from stillhouse.engines.base import Sampling
    from stillhouse.evaluate import generate_and_score
    from stillhouse.runs.build import assemble
    from stillhouse.runs.evaluation import held_out_prompts
    from stillhouse.runs.resolve import resolve

    kept = folder / name / "greedy.json"
    if not kept.exists():
        config = resolve(
            tree(size, folder, "greedy", recipe="sft", student={"path": str(student)},
                 data={"train": {"kind": "jsonl", "path": f"{DATA}/train.jsonl", "limit": 1}})
        ).config  # fmt: skip
        parts = assemble(config)
        parts.student.eval()
        prompts = held_out_prompts(config, parts.data, parts.tokenizer)
        sampling = Sampling(temperature=0.0, max_tokens=config.data.max_response)
        engine = parts.engine(parts.student)
        found = generate_and_score(engine, prompts, sampling, (10,), parts.tokenizer)
        kept.parent.mkdir(parents=True, exist_ok=True)
        scores = {"rouge_l": found.metrics["rouge_l"], "bleu": bleu(found.rows)}
        kept.write_text(json.dumps(scores), encoding="utf-8")
    loaded: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return loaded


def measure(size: Size, folder: Path, run_folder: Path) -> dict[str, Any]:
    """What one run came to."""
    rows = lines(run_folder / "metrics.jsonl")
    after = json.loads((run_folder / "evaluation" / "student-after.json").read_text())["metrics"]
    found = greedy(size, folder, run_folder / "student", run_folder.name)
    train = [row for row in rows if row["phase"] == "train"]
    written = json.loads((run_folder / "written.json").read_text())
    writing = sum(row.get("seconds/generate", 0.0) for row in train)
    by_student = writing if written["student"] else 0.0
    mixed = bool(written["student"] and written["teacher"])  # then the clock does not tell the two apart
    return {
        "rouge_l_greedy": found["rouge_l"], "bleu_greedy": found["bleu"],
        "rouge_l_sampled": after["rouge_l"],
        "bleu_sampled": bleu(lines(run_folder / "evaluation" / "student-after.jsonl")),
        "kl": after.get("kl_to_teacher"), "reverse_kl": after.get("reverse_kl_to_teacher"),
        "kl_own": after.get("kl_to_teacher_on_own_text"),
        "reverse_kl_own": after.get("reverse_kl_to_teacher_on_own_text"),
        "distinct_2": after["distinct_2"], "mean_length": after["mean_length"],
        "seconds": None if mixed else sum(row["seconds"] for row in train) - (writing - by_student),
        "seconds_writing": None if mixed else by_student,
        "trained_tokens": sum(row["tokens"] for row in train),
        "steps": max(row["step"] for row in train),
        "student_wrote": written["student"],
    }  # fmt: skip


def systems(size: Size, folder: Path, models: tuple[Path, Path]) -> list[dict[str, Any]]:
    """Teacher and warm-started student under both decodings."""
    found = []
    for system, name, path in (
        ("Teacher", "teacher", models[0]),
        ("Student before", "student-before", models[1]),
    ):
        sampled = json.loads((folder / "seqkd-0" / "evaluation" / f"{name}.json").read_text())["metrics"]
        scores = greedy(size, folder, path, name)
        found.append({
            "system": system, "parameters": sampled["parameters"], "rouge_l_greedy": scores["rouge_l"],
            "bleu_greedy": scores["bleu"], "rouge_l_sampled": sampled["rouge_l"],
            "kl": sampled.get("kl_to_teacher"), "reverse_kl": sampled.get("reverse_kl_to_teacher"),
        })  # fmt: skip
    return found


def write(out: Path, record: dict[str, Any]) -> None:
    """JSON, table and plot."""
    from stillhouse.files import atomic

    out.mkdir(parents=True, exist_ok=True)
    save(out / "distillm2.json", record)
    with atomic(out / "distillm2.md") as handle:
        handle.write(markdown(record))
    plot(record["rows"], out / "distillm2.png")


def main() -> None:
    """Train what is missing, measure, write."""
    import torch

    known = parser(__doc__, "runs/distillm2")
    known.add_argument("--only", action="append", choices=METHODS, help="some methods only")
    known.add_argument("--finished", action="store_true", help="train nothing: write what there is")
    known.add_argument("--probes", action="store_true", help="run the probes as well")
    options = known.parse_args()
    torch.set_num_threads(1)
    count_what_is_written()
    size = SMALL if options.small else Size()
    folder, out = options.folder.resolve(), options.folder.resolve() if options.small else RESULTS
    models = make_teacher(size, folder), make_student(size, folder)
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in options.only or METHODS}
    record = result(
        [],
        ("transformers", "rouge-score", "sacrebleu"),
        cpu=torch.backends.cpu.get_cpu_capability(),
        size=asdict(size),
    )
    for seed in range(options.seeds or size.seeds):
        for name in found:
            if options.finished and not done(folder / f"{slug(name)}-{seed}"):
                continue
            ended = method_run(size, folder, models, name, METHODS[name], seed)
            found[name][seed] = score = measure(size, folder, ended)
            print(f"{ended.name}: ROUGE-L {score['rouge_l_sampled']:.1f} sampled, "
                  f"{score['rouge_l_greedy']:.1f} greedy", flush=True)  # fmt: skip
        record |= {"rows": summary(found), "systems": systems(size, folder, models), "probes": []}
        write(out, record)
    if options.probes:
        record["probes"] = probed(size, folder, models, options.finished)
        write(out, record)
    print(markdown(record))


def probed(size: Size, folder: Path, models: tuple[Path, Path], only_finished: bool) -> list[dict[str, Any]]:
    """For each probe the rows of its methods."""
    found = []
    for title, (changes, methods, seeds) in PROBES.items():
        varied, inside = replace(size, **changes), folder / "probes" / slug(title)
        start = make_student(varied, inside) if "warm_steps" in changes else models[1]
        scores: dict[str, dict[int, dict[str, Any]]] = {}
        for seed, name in itertools.product(range(seeds), methods):
            if only_finished and not done(inside / f"{slug(name)}-{seed}"):
                continue
            ended = method_run(varied, inside, (models[0], start), name, {**METHODS, **OTHERS}[name], seed)
            scores.setdefault(name, {})[seed] = measure(varied, inside, ended)
        if not scores:
            continue
        found.append({"title": title, "changes": changes, "rows": summary(scores)})
    return found


if __name__ == "__main__":
    main()
