"""Fills the tables of docs/scale.md on 64 GPUs: what our own estimates say of a published pair of models.

What others have published stands at its beginning, with sources on the page; everything else is computed from
that and from the sizes of the models, by the functions that `stillhouse check` uses.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from tables import with_tables

from stillhouse.models.config import StudentConfig
from stillhouse.runs.memory import Devices, GpuSize, Workload, memory_by_phase
from stillhouse.runs.model_sizes import ModelSize, student_size
from stillhouse.runs.resolve import resolve
from stillhouse.teachers.store.codecs import (
    RECORD_OVERHEAD,
    HiddenCodec,
    LabelsCodec,
    SampledCodec,
    TopkCodec,
)

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "scale.md"
ROWS = DOCS.parent / "benchmarks" / "results" / "rows.json"
RUN = DOCS.parent / "examples" / "scale" / "run.yaml"

GPUS, GPUS_OF_A_MACHINE = 64, 8
PROMPT, RESPONSE = 1024, 1024
TOKENS = 10**9
"""Response tokens of the training; as many of prompts are read with them."""


CARD = GpuSize("H100 80GB", 80 * 10**9)
TRAINED_8B = 5762
"""Tokens/s of one GPU: Llama 3.1 8B in FSDP2 on 8 H100, 8,192 tokens a sequence, without torch.compile."""
NETWORK = 400e9 / 8
"""Bytes/s between machines for each GPU."""
SHAPES: dict[str, tuple[int, int, int, int]] = {"8B": (4096, 32, 32, 14_336), "70B": (8192, 80, 64, 28_672)}
"""Hidden size, layers, heads, width of the MLP."""
VOCAB = 128_256


def pages() -> dict[str, str]:
    """The page by its path below docs/."""
    student, teacher = size("8B", "float32"), size("70B", "bfloat16")
    return with_tables(
        PAGE,
        {
            "rows": rows_table(),
            "memory": memory_table(student, teacher),
            "throughput": throughput_table(student, teacher),
            "store": store_table(student, teacher),
            "network": network_table(student, teacher),
            "tenfold": tenfold_table(student, teacher),
        },
    )


def rows_table() -> str:
    """What `benchmarks/rows.py` has measured: peaks of processes, and seconds of one core."""
    found: dict[tuple[int, int], dict[str, str]] = {}
    for row in json.loads(ROWS.read_text(encoding="utf-8"))["rows"]:
        workers = f" + 2 x {row['worker_peak_mb']:,.0f}" if row["worker_peak_mb"] else ""
        cell = f"{row['peak_mb']:,.0f}{workers} MB, {row['cpu_seconds']:,.0f} s"
        found.setdefault((row["large_row_bytes"], row["rows"]), {})[row["work"]] = cell
    head = {
        "tokenise": "tokenised",
        "tokenise-2": "by 2 processes more",
        "cached": "from the cache",
        "curate": "`curate`",
    }
    rows = [
        [
            f"{count:,}{f', one of {large >> 20} MB' if large else ''}",
            *(cells.get(work, "–") for work in head),
        ]
        for (large, count), cells in sorted(found.items())
    ]
    return markdown(["rows", *head.values()], rows)


def size(name: str, dtype: str) -> ModelSize:
    """Of a Llama 3.1."""
    fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    options = {
        "model_type": "llama", "num_key_value_heads": 8, "vocab_size": VOCAB, "tie_word_embeddings": False,
        "max_position_embeddings": 131_072, **dict(zip(fields, SHAPES[name], strict=True)),
    }  # fmt: skip
    return student_size(StudentConfig(from_config=options, dtype=dtype), None, VOCAB)  # type: ignore[arg-type]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def memory_table(student: ModelSize, teacher: ModelSize) -> str:
    """By part, of one GPU in the step that trains, and below it the phase that takes most."""
    config = resolve(str(RUN)).config
    work = Workload(PROMPT + RESPONSE, evaluated=config.engine.batch_size)
    kinds = {
        "ddp": Devices(GPUS, "ddp"),
        "zero2": Devices(GPUS, "zero2"),
        "fsdp2": Devices(GPUS, "fsdp2"),
        "hsdp, 8 x 8": Devices(GPUS, "hsdp", GPUS_OF_A_MACHINE),
    }
    head = float(teacher.vocab * teacher.hidden_size * teacher.dtype_bytes)
    found = {name: memory_by_phase(config, student, (), work, CARD, one, head) for name, one in kinds.items()}
    columns = {name: phases["student forward and backward"] for name, phases in found.items()}
    for name in ("fsdp2", "hsdp, 8 x 8"):
        here = memory_by_phase(config, student, (replace(teacher, sharded=True),), work, CARD, kinds[name])
        columns[f"{name}, teacher sharded too"] = here["student forward and backward"]
    parts = list(dict.fromkeys(part for column in columns.values() for part in column))
    rows = [[part, *(gigabytes(column.get(part)) for column in columns.values())] for part in parts]
    rows.append(["**a step**", *(f"**{gigabytes(sum(column.values()))}**" for column in columns.values())])
    for phase in ("evaluation", "checkpoint"):
        rows.append([phase, *(gigabytes(sum(found[name][phase].values())) for name in kinds), "–", "–"])
    return markdown(["GB on each GPU", *columns], rows)


def flops(student: ModelSize, teacher: ModelSize) -> dict[str, float]:
    """FLOPs for a token that is read, half of them response tokens: 2 a parameter forward, 4 backward."""
    response = RESPONSE / (PROMPT + RESPONSE)
    body = student.parameters - 2 * student.vocab * student.hidden_size
    heads = 2 * response * student.vocab * (3 * student.hidden_size + teacher.hidden_size)
    read = 2 * (teacher.parameters - 2 * teacher.vocab * teacher.hidden_size)
    return {"student, activations recomputed": 8 * body + heads, "teacher's last hidden states": read}


def rates(student: ModelSize, teacher: ModelSize) -> dict[str, float]:
    """Tokens a second of one GPU, read by student and teacher at the published FLOP/s."""
    done = TRAINED_8B * 6 * student.parameters
    needed = flops(student, teacher)
    trained, read = (done / one for one in needed.values())
    return {"train": trained, "read": read}


def throughput_table(student: ModelSize, teacher: ModelSize) -> str:
    """Tokens a second of GPU and cluster, and hours."""
    rate, needed = rates(student, teacher), list(flops(student, teacher).values())
    both = 1 / (1 / rate["train"] + 1 / rate["read"])
    read = 2 * TOKENS
    rows = []
    for what, work, each in (
        ("student alone: teacher cached or elsewhere", needed[0], rate["train"]),
        ("teacher alone: fills the cache", needed[1], rate["read"]),
        ("both on the same GPUs", sum(needed), both),
    ):
        rows.append(
            [
                what,
                f"{work / 1e9:.0f}",
                f"{each:,.0f}",
                f"{GPUS * each:,.0f}",
                f"{read / GPUS / each / 3600:.1f}",
            ]
        )
    head = ["", "GFLOP a token", "tokens/s a GPU", "tokens/s on 64", "hours for 1B response tokens"]
    return markdown(head, rows)


def stores(teacher: ModelSize) -> dict[str, float]:
    """Bytes of a response token in each store, the record's own included."""
    codecs = {
        "hidden, bfloat16": HiddenCodec("bfloat16"),
        "hidden, int8": HiddenCodec("int8"),
        "topk, k = 256, float16": TopkCodec(256, "float16", VOCAB),
        "topk, k = 64, float16": TopkCodec(64, "float16", VOCAB),
        "topk, k = 64, uint8": TopkCodec(64, "uint8", VOCAB),
        "sampled, 50 samples": SampledCodec(50, 1.0, "float16", VOCAB),
        "labels": LabelsCodec(),
    }
    whole = {
        "full logits, float32 (no such store)": 4.0 * VOCAB,
        "full logits, bfloat16 (no such store)": 2.0 * VOCAB,
    }
    ours = {name: codec.row_bytes(teacher.hidden_size) for name, codec in codecs.items()}
    return {name: size + RECORD_OVERHEAD / RESPONSE for name, size in (whole | ours).items()}


def store_table(student: ModelSize, teacher: ModelSize) -> str:
    """Size, and the bandwidth at which it is read when the student alone sets the pace."""
    responses = GPUS * rates(student, teacher)["train"] * RESPONSE / (PROMPT + RESPONSE)
    rows = [
        [name, f"{each:,.0f}", size_of(each * TOKENS), size_of(each * responses) + "/s"]
        for name, each in stores(teacher).items()
    ]
    return markdown(["store", "bytes a token", "1B tokens", "read by 64 GPUs"], rows)


def network_table(student: ModelSize, teacher: ModelSize) -> str:
    """Bytes that one GPU receives in one optimiser step, and seconds at the published bandwidth."""
    config = resolve(str(RUN)).config
    each = config.train.batch_size * (PROMPT + RESPONSE) / GPUS
    compute = each / rates(student, teacher)["train"]
    micro = config.train.batch_size // (GPUS * config.train.micro_batch_size)
    many, ring = "es" if micro > 1 else "", (GPUS - 1) / GPUS
    gathered = 2 * student.parameters * ring
    gradient = 4 * student.parameters * ring
    machines = GPUS // GPUS_OF_A_MACHINE
    exchanged = 2 * 4 * student.parameters / GPUS_OF_A_MACHINE * (machines - 1) / machines
    responses = each * RESPONSE / (PROMPT + RESPONSE)
    sent = stores(teacher)
    inner = (
        1 / GPUS_OF_A_MACHINE
    )  # a ring over all GPUs enters a machine once, by one of its eight interfaces
    rows = []
    for what, (volume, crossing) in {
        f"fsdp2: weights in bf16, forward and backward of {micro} micro-batch{many}": (
            2 * micro * gathered,
            inner,
        ),
        "fsdp2: gradients in fp32, once": (gradient, inner),
        "hsdp, 8 x 8: gradients in fp32 of a GPU's eighth, once": (exchanged, 1),
        "ddp: gradients in fp32, once": (2 * gradient, inner),
        "remote teacher: hidden states in bfloat16": (sent["hidden, bfloat16"] * responses, 1),
        "remote teacher: hidden states in int8": (sent["hidden, int8"] * responses, 1),
        "if log-probabilities in bfloat16 were sent": (2 * VOCAB * responses, 1),
    }.items():
        eight = volume * crossing / NETWORK
        one = eight * GPUS_OF_A_MACHINE
        cells = [f"{eight:.2f}, {eight / compute:.0%}", f"{one:.2f}, {one / compute:.0%}"]
        rows.append([what, size_of(volume), size_of(volume * crossing), *cells])
    rows.append(["for comparison: the step's products", "", "", f"{compute:.1f}", f"{compute:.1f}"])
    head = [
        "one step, one GPU",
        "received",
        "from other machines",
        "seconds, 8 x 400 Gb/s",
        "seconds, 1 x 400 Gb/s",
    ]
    return markdown(head, rows)


def tenfold_table(student: ModelSize, teacher: ModelSize) -> str:
    """The quantities that grow, at 640 GPUs and 10B tokens."""
    rate = rates(student, teacher)
    responses = GPUS * rate["train"] * RESPONSE / (PROMPT + RESPONSE)
    hidden, top = stores(teacher)["hidden, bfloat16"], stores(teacher)["topk, k = 64, uint8"]
    one_server = rate["read"] * RESPONSE / (PROMPT + RESPONSE)
    batch = resolve(str(RUN)).config.train.batch_size
    rows = []
    for what, of in {
        "cache of hidden states in bfloat16, tokens of the run": lambda n: size_of(n * TOKENS * hidden),
        "the same in topk, k = 64, uint8": lambda n: size_of(n * TOKENS * top),
        "read from it": lambda n: size_of(n * responses * hidden) + "/s",
        "GPUs of teachers that keep up, if nothing is cached": lambda n: f"{n * responses / one_server:,.0f}",
        f"sequences of a batch of {batch} for each GPU": lambda n: f"{batch / GPUS / n:g}",
        "whole student in fp32, on each GPU while it is evaluated": lambda n: size_of(student.bytes),
        "a checkpoint, gathered by one process": lambda n: size_of(3 * student.bytes),
    }.items():
        rows.append([what, of(1), of(10)])
    return markdown(["", "64 GPUs, 1B tokens", "640 GPUs, 10B tokens"], rows)


def gigabytes(size: float | None) -> str:
    """With a digit."""
    return "–" if size is None else f"{size / 1e9:.1f}"


def size_of(size: float) -> str:
    """In a unit that suits it."""
    for unit, factor in {"PB": 1e15, "TB": 1e12, "GB": 1e9, "MB": 1e6}.items():
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"
