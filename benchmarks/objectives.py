"""Time and memory of the fused objectives against bare matrix products, full logits, TRL and Liger, on CPU.

    python benchmarks/objectives.py            # about half an hour on free cores
    python benchmarks/objectives.py --small    # under a minute: small vocabulary, few objectives

A step is value and gradients for hidden states and head, of 4 x 256 tokens of which 40% are response.
Everybody takes turns within one run; a ratio is the median over rounds of time / time of the floor just
before.

- floor: the four products that no method can do without (student and teacher logits, gradients of hidden
  states and head), on the response rows alone.
- full: logits of all tokens and the loss as the papers' released code forms it, masked afterwards.
- trl: `ChunkedDivergenceFunction` of TRL. liger: `LigerFusedLinearJSDFunction`, not compiled. Both get
  the response rows only, which is generous: their callers may pass all. They are measured where they can
  be imported (`pip install --no-deps trl liger-kernel`; Liger imports Triton's package when it is there,
  and runs without).

`..._cpu_over_floor` is the same ratio of processor time, which other work on the machine disturbs less.
Peak memory is the highest resident set during a step beyond that before it, less the gradients that are
returned.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _peers import FULL, peer
from _result import result, save
from torch import Tensor

from stillhouse.core.head import ModelHead, ModelSignal
from stillhouse.core.rows import Rows
from stillhouse.fused import fused_loss
from stillhouse.objectives import Objective, build

RESULTS = Path(__file__).parent / "results"
TOKENS, SHARE = 1024, 0.4
OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {"terms": [{"kind": "forward_kl"}, {"kind": "cross_entropy"}]},
    "by_source": {"teacher": {"kind": "skew_kl"}, "student": {"kind": "skew_rkl"}},
}
KL_FAMILY = ("forward_kl", "reverse_kl", "symmetric_kl", "jeffreys", "jsd", "skew_kl", "skew_rkl")
OTHERS = ("csd", "dld", "tvd", "taid", "ab", "adaptive_kl", "alpha_mixture", "contrastive", "by_source")
MORE = ("cross_entropy", "sum", "uld", "advantage", "aligned_teacher", "dpkd", "policy_gradient")
NOTES = {
    "skew_kl": "a second pass of exponentials and a logarithm over the vocabulary, for the mixture",
    "skew_rkl": "a second pass of exponentials and a logarithm over the vocabulary, for the mixture",
    "symmetric_kl": "both divergences and their two gradients",
    "jeffreys": "both divergences and their two gradients",
    "jsd": "exponentials of both models and the logarithm of their mixture",
    "contrastive": "the arithmetic of skew_kl and skew_rkl",
    "by_source": "the arithmetic of skew_kl and skew_rkl",
    "ab": "two powers of the vocabulary's probabilities",
    "adaptive_kl": "sorts the teacher's distribution to find its head",
    "alpha_mixture": "the arithmetic of skew_kl and a normalisation of the mixture",
    "advantage": "a fifth product: the reference teacher",
    "aligned_teacher": "a fifth product: the reference teacher",
    "dpkd": "a fifth product: label log-probabilities of all rows come first",
    "policy_gradient": "a fifth product: label log-probabilities of all rows come first",
    "uld": "sorts both distributions",
    "cross_entropy": "no teacher: three products",
    "sum": "two objectives, each with its own arithmetic",
}


class Step:
    """The tensors of one setting."""

    def __init__(self, vocab: int, width: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(dtype)

        spread = 4 / width**0.5  # logits of standard deviation 4: an entropy of about 3 nats
        self.head = drawn(vocab, width, scale=spread).requires_grad_()
        self.teacher_head = (self.head.detach() + drawn(vocab, width, scale=0.2 * spread)).to(dtype)
        self.hidden = drawn(TOKENS, width).requires_grad_()
        self.teacher = (self.hidden.detach() + drawn(TOKENS, width, scale=0.3)).to(dtype)
        self.mask = torch.arange(TOKENS) % 256 >= 256 * (1 - SHARE)
        count = int(self.mask.sum())
        self.rows_hidden = self.hidden.detach()[self.mask].requires_grad_()
        self.rows_teacher = self.teacher[self.mask]
        self.gradient = drawn(count, vocab, scale=1e-3)
        sequence = torch.arange(TOKENS)[self.mask] // 256
        self.labels = torch.randint(vocab, (count,), generator=generator)
        self.rows = Rows(
            labels=self.labels,
            sources=sequence % 2 + 1,
            sequence_ids=sequence,
            pair_ids=sequence // 2,
        )
        self.teachers = {
            "main": ModelSignal(self.rows_teacher, ModelHead(self.teacher_head)),
            "reference": ModelSignal(self.rows_teacher * 0.9, ModelHead(self.teacher_head)),
        }

    def floor(self) -> None:
        """The four products."""
        hidden, head = self.rows_hidden.detach(), self.head.detach()
        _ = hidden @ head.t(), self.rows_teacher @ self.teacher_head.t()
        _ = self.gradient @ head, self.gradient.t() @ hidden

    def ours(self, objective: Objective) -> Callable[[], Any]:
        """The fused path."""

        def step() -> Any:
            loss = fused_loss(objective, self.rows_hidden, self.head, self.teachers, rows=self.rows)
            return torch.autograd.grad(loss, (self.rows_hidden, self.head))

        return step

    def full(self, kind: str) -> Callable[[], Any] | None:
        """Logits of all tokens, then the loss the way the released code forms it."""
        if kind not in FULL:
            return None

        def step() -> Any:
            student, teacher = self.hidden @ self.head.t(), self.teacher @ self.teacher_head.t()
            infinite = torch.isinf(student)
            loss = (FULL[kind](student, teacher, infinite) * self.mask).sum() / self.mask.sum()
            return torch.autograd.grad(loss, (self.hidden, self.head))

        return step

    def peer(self, name: str, kind: str) -> Callable[[], Any] | None:
        """TRL's or Liger's chunked loss, or None where it cannot be imported or has no such loss."""
        loss = peer(name, kind, self.labels)
        if loss is None:
            return None
        heads = (self.rows_hidden, self.head, self.rows_teacher, self.teacher_head)
        return lambda: torch.autograd.grad(loss(*heads), (self.rows_hidden, self.head))


def timed(step: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of one call by the clock, and of the processor."""
    start, busy = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - start, time.process_time() - busy


def resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def peak(step: Callable[[], Any]) -> int:
    """Extra bytes at the highest point of a step, less what it returns."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    returned = step()
    after = resident("VmHWM")
    return after - before - sum(tensor.numel() * tensor.itemsize for tensor in returned)


def measure(step: Step, kind: str, rounds: int) -> dict[str, Any]:
    """One row: everybody in turn, medians."""
    competitors: dict[str, Callable[[], Any] | None] = {
        "ours": step.ours(build(kind, **OPTIONS.get(kind, {}))),
        "full": step.full(kind),
        "trl": step.peer("trl", kind),
        "liger": step.peer("liger", kind),
    }
    running = {name: run for name, run in competitors.items() if run is not None}
    seconds: dict[str, list[float]] = {name: [] for name in ("floor", *running)}
    ratios: dict[str, list[float]] = {name: [] for name in running}
    busy: dict[str, list[float]] = {name: [] for name in running}
    memory = {name: peak(run) for name, run in running.items()}  # also warms up
    for _ in range(rounds):
        for name, run in running.items():
            floor = timed(step.floor)
            spent = timed(run)
            seconds["floor"].append(floor[0])
            seconds[name].append(spent[0])
            ratios[name].append(spent[0] / floor[0])
            busy[name].append(spent[1] / floor[1])
    row: dict[str, Any] = {"objective": kind, "family": family(kind)}
    row |= {f"{name}_seconds": round(statistics.median(values), 4) for name, values in seconds.items()}
    row |= {f"{name}_over_floor": round(statistics.median(values), 3) for name, values in ratios.items()}
    row |= {f"{name}_cpu_over_floor": round(statistics.median(values), 3) for name, values in busy.items()}
    row |= {f"{name}_peak_mb": round(value / 2**20, 1) for name, value in memory.items()}
    for name in set(running) - {"ours"}:
        row[f"{name}_over_ours"] = round(row[f"{name}_seconds"] / row["ours_seconds"], 2)
    if kind in NOTES:
        row["note"] = NOTES[kind]
    return row


def family(kind: str) -> str:
    """Which target of the objective applies: 1.15 for KL, 1.25 for other token-level ones, none for the
    rest."""
    return "kl" if kind in KL_FAMILY else "token" if kind in OTHERS else "other"


def settings(small: bool) -> list[tuple[int, int, torch.dtype, int, tuple[str, ...], int]]:
    """Vocabulary, width, precision, threads, objectives, rounds."""
    if small:
        few = ("forward_kl", "jsd", "contrastive")
        return [(8192, 384, dtype, 1, few, 3) for dtype in (torch.float32, torch.bfloat16)]
    most, half = (*KL_FAMILY, *OTHERS, *MORE), (*KL_FAMILY, "csd", "contrastive", "tvd")
    rows = []
    for threads in (1, 2):
        for dtype in (torch.bfloat16, torch.float32):
            rows.append((50257, 768, dtype, threads, most if threads == 1 else half, 5))
            rows.append((151936, 1024, dtype, threads, half, 3))
    return rows


def versions() -> dict[str, str]:
    """Of everything measured."""
    found = {"python": platform.python_version(), "processor": processor()}
    for package in ("torch", "trl", "liger-kernel", "stillhouse"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed: its rows are missing"
    return found


def processor() -> str:
    """The model name of the CPU."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time over the floor, one panel per setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = sorted({row["setting"] for row in rows})
    figure, axes = pyplot.subplots(1, len(names), figsize=(3.1 * len(names), 5), sharey=True, squeeze=False)
    order = list(dict.fromkeys(row["objective"] for row in rows))
    for axis, name in zip(axes[0], names, strict=True):
        here = {row["objective"]: row for row in rows if row["setting"] == name}
        for who, mark in (("ours", "o"), ("full", "s"), ("trl", "^"), ("liger", "v")):
            points = [
                (here[kind].get(f"{who}_over_floor"), i) for i, kind in enumerate(order) if kind in here
            ]
            points = [point for point in points if point[0] is not None]
            if points:
                axis.plot(*zip(*points, strict=True), mark, label=who, markersize=4)
        axis.set_xscale("log")
        axis.set_xlim(0.6, 16)
        axis.set_xticks([1, 2, 5, 10], ["1", "2", "5", "10"])
        axis.minorticks_off()
        axis.axvline(1.15, color="#999", linewidth=0.8)
        axis.axvline(1.25, color="#ccc", linewidth=0.8)
        axis.set_title(name, fontsize=8)
        axis.set_xlabel("time / four bare products (grey: 1.15, 1.25)", fontsize=8)
    axes[0][0].set_yticks(range(len(order)), order, fontsize=7)
    axes[0][0].invert_yaxis()
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a sketch in under a minute")
    parser.add_argument("--output", type=Path, help="where the JSON goes; the plot goes beside it")
    parser.add_argument("--only", action="append", help="settings whose name holds this text, e.g. 'V=50257'")
    parser.add_argument("--rounds", type=int, help="how often everybody takes a turn")
    arguments = parser.parse_args()
    name = "objectives_small.json" if arguments.small else "objectives.json"
    output = arguments.output or RESULTS / name
    record = result([], versions=versions(), threads=[])
    for vocab, width, dtype, threads, kinds, rounds in settings(arguments.small):
        precision = str(dtype).removeprefix("torch.")
        setting = f"V={vocab} D={width} {precision} threads={threads}"
        if arguments.only and not any(text in setting for text in arguments.only):
            continue
        torch.set_num_threads(threads)
        record["threads"] = sorted({*record["threads"], threads})
        step = Step(vocab, width, dtype)
        for kind in kinds:
            row = {"setting": setting, **measure(step, kind, arguments.rounds or rounds)}
            record["rows"].append(row)
            print(" ".join(f"{key}={value}" for key, value in row.items() if key != "note"), flush=True)
            save(output, record)  # after each row: a run that is cut off has measured something
    plot(record["rows"], output.with_suffix(".png"))


if __name__ == "__main__":
    main()
