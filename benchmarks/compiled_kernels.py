"""Compiles the Triton kernels of the objectives for the GPUs that people have, and says what each takes.
Needs no GPU.

    python benchmarks/compiled_kernels.py            # two minutes: every kernel, for sm_80 and sm_90
    python benchmarks/compiled_kernels.py --small    # half a minute: one or two for each function of a loss

Each form is compiled as a call with plain heads, fp32 products, a bf16 gradient and rows filled up to a
multiple of 16 takes it; one of them also with what a call may bring besides. Registers and spilled bytes are
what ptxas says.
`estimated_ms` is the time in which 3 TB/s move the bytes of all passes for 8,192 rows of 151,936 entries: an
estimate, not a measurement, and without the products.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton
import triton.language as tl
from _result import result, save
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stillhouse.core.rows import Rows
from stillhouse.core.types import SOURCES
from stillhouse.fused.triton.launch import BLOCK, NUMBERS, compile_options, constants
from stillhouse.fused.triton.template import LabelRows, LogitRows, template
from stillhouse.objectives import REGISTRY, build
from stillhouse.objectives.combined import ObjectiveHolder
from stillhouse.objectives.kernels import KernelTerm

RESULT = Path(__file__).parent / "results" / "compiled_kernels.json"
ARCHITECTURES = {80: "sm_80", 90: "sm_90a"}
ROWS, HEIGHT, BANDWIDTH = 8192, 151_936, 3e12
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "alpha_mixture": [{"alpha": 1.0}, {"alpha": 1.0, "direction": "reverse"}]
    + [{"ab": (0.7, 0.2), "direction": direction} for direction in ("forward", "reverse")],
    "csd": [{}, {"w1": "mix", "w2": "uniform"}],
    "dld": [{}, {"center": True}],
}
"""Options that lead to other kernels than the defaults; each function is in one of them."""
MORE: dict[str, list[dict[str, Any]]] = {
    "csd": [{"w1": "teacher"}, {"w1": "uniform"}, {"w1": "uniform", "w2": "uniform"}],
    "dld": [{"weight": "teacher"}, {"weight": "uniform"}],
}
"""Options that lead to the same functions with other means."""


@dataclass(frozen=True)
class Call:
    """What a call brings, as far as a kernel is compiled for it."""

    products: str = "*fp32"
    bias: bool = False
    softcap: bool = False
    labels: bool = False
    row_number: bool = False
    add: bool = False
    gradient: bool = True


CALLS = {
    "plain": Call(),
    "bf16, bias, cap, labels": Call("*bf16", bias=True, softcap=True, labels=True),
    "number per row, added": Call(row_number=True, add=True),
    "value only": Call(gradient=False),
}


def forms(small: bool) -> Iterator[tuple[dict[str, Any], KernelTerm]]:
    """The options of every objective of its own that has a kernel form, and its term."""
    rows = Rows(sources=np.full(1, SOURCES.index("student")))
    for kind in REGISTRY.kinds():
        if not issubclass(REGISTRY[kind], ObjectiveHolder):
            for options in VARIANTS.get(kind, [{}]) + (MORE.get(kind, []) if not small else []):
                objective = build(kind, **options)
                if objective.sequence_level or not (terms := objective.kernel_terms(rows)):
                    continue
                yield {"kind": kind, **options}, terms[0]


def source(term: KernelTerm, call: Call) -> ASTSource:
    """The template as it is compiled for a term in a call whose rows are filled up."""
    fixed = constants(term, tl.float32, BLOCK, HEIGHT)
    model = LogitRows(call.products, "i32", "*fp32" if call.bias else call.products, "fp32", "fp32")
    labelled = call.labels or term.teacher_model is None
    signature: dict[str, Any] = {
        "student": model,
        "teacher": "constexpr" if term.teacher_model is None else model,
        "out": "*bf16" if call.gradient else "constexpr",
        "out_stride": "i32",
        "values": "*fp32",
        "token_weight": "*fp32",
        "loss_weight": "fp32",
        "labels": LabelRows("*i64", "*fp32", "fp32") if labelled else "constexpr",
        "height": "i32",
        "width": "i32",
        "inverse": "fp32",
        "numbers": ("fp32",) * NUMBERS,
        "first_number": "*fp32" if call.row_number else "constexpr",
        **dict.fromkeys((*fixed, "HEADS", "ADD"), "constexpr"),
    }
    given = {**fixed, "HEADS": 5 * (call.bias + 2 * call.softcap), "ADD": call.add}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    signature = {name: signature[name] for name in template.arg_names}
    for place, (name, kind) in enumerate(signature.items()):
        entries = enumerate(kind) if isinstance(kind, tuple) else [(None, kind)]
        for inner, one in entries:
            path = (place,) if inner is None else (place, inner)
            if one == "constexpr":
                constexprs[path] = given.get(name)
            elif one.startswith("*") or (one == "i32" and name != "height"):
                attributes[path] = [["tt.divisibility", 16]]
    return ASTSource(fn=template, signature=signature, constexprs=constexprs, attrs=attributes)


def compiled(term: KernelTerm, call: Call, architecture: int) -> dict[str, int]:
    """Registers and spilled bytes of a kernel, as ptxas tells them."""
    how = {**compile_options(), "num_stages": 3}
    kernel = triton.compile(source(term, call), target=GPUTarget("cuda", architecture, 32), options=how)
    ptxas = max(Path(triton.__file__).parent.rglob("bin/ptxas*"), key=lambda path: path.name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(kernel.asm["ptx"])
        command = [ptxas, "-v", f"--gpu-name={ARCHITECTURES[architecture]}", path, "-o", f"{folder}/kernel"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill", told)]
    return {"registers": int(re.findall(r"Used (\d+) registers", told)[0]), "spilled_bytes": sum(spilled)}


def estimated_ms(term: KernelTerm, logits: int) -> float:
    """How long the bandwidth takes for the passes, with logits of so many bytes and a bf16 gradient."""
    models = 1 if term.teacher_model is None else 2
    return 1000 * ROWS * HEIGHT * (term.passes * models * logits + 2) / BANDWIDTH


def rows(small: bool) -> Iterator[dict[str, Any]]:
    """One row for each kernel, call and architecture; objectives that share a kernel share its numbers."""
    known: dict[str, dict[str, int]] = {}
    for options, term in forms(small):
        also = [*CALLS] if options["kind"] == "skew_rkl" else ["plain"]
        for name in also:
            for architecture, target in ARCHITECTURES.items():
                kernel = f"{constants(term, 'fp32', BLOCK, HEIGHT)} {term.teacher_model} {name} {target}"
                if kernel not in known:
                    known[kernel] = compiled(term, CALLS[name], architecture)
                yield {
                    "objective": options["kind"],
                    "options": {key: value for key, value in options.items() if key != "kind"},
                    "call": name,
                    "target": target,
                    **known[kernel],
                    "passes": term.passes,
                    "estimated_ms_fp32": round(estimated_ms(term, 4), 1),
                    "estimated_ms_bf16": round(estimated_ms(term, 2), 1),
                }


def main() -> None:
    """Print the rows, and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, help="default: the committed results; nowhere with --small")
    asked = parser.parse_args()
    found = []
    for row in rows(asked.small):
        found.append(row)
        print(*row.values(), sep="  ", flush=True)
    save(asked.out or (None if asked.small else RESULT), result(found, ["triton"], threads=1))


if __name__ == "__main__":
    main()
