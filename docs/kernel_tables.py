"""The tables of losses in docs/performance.md: the kernels as compiled, and the losses that have none."""

from __future__ import annotations

from typing import Any

from stillhouse.core.rows import Rows
from stillhouse.objectives import REGISTRY, Objective, build

HOLDERS = {
    "sum": "each of its terms in a kernel, added up, if all have one; cross-entropy goes with another term",
    "by_source": "the rows of each source with theirs",
    "by_teacher": "the rows of each teacher with theirs",
    "teacher_mixture": "its loss against the mixture in eager torch",
    "clipped": "its loss in eager torch",
    "agreement": "its loss in eager torch",
    "hidden_states": "its loss in eager torch",
}


def described(row: dict[str, Any]) -> str:
    """A loss with its options."""
    options = ", ".join(f"{key}: {value}" for key, value in row["options"].items())
    return f"`{row['objective']}`" + (f" ({options})" if options else "")


def kernels(found: dict[str, Any]) -> str:
    """One row for each kernel in a plain call."""
    lines = [
        "| loss | passes | registers sm_80, sm_90 | estimated ms, fp32 logits | estimated ms, bf16 logits |",
        "|---|--:|--:|--:|--:|",
    ]
    plain = [row for row in found["rows"] if row["call"] == "plain"]
    for first, second in zip(plain[::2], plain[1::2], strict=True):
        lines.append(
            f"| {described(first)} | {first['passes']} | {first['registers']}, {second['registers']} | "
            f"{first['estimated_ms_fp32']:g} | {first['estimated_ms_bf16']:g} |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return "\n".join([*lines, "", f"{found['date']}, {versions}, `{found['command']}`: compiled, not run."])


def otherwise(objective: Objective) -> str:
    """How a loss without a kernel of its own is computed."""
    if objective.granularity == "sequence" and not objective.shares_vocabulary:
        return "whole sequences of models with different tokenizers: eager, by autograd"
    if objective.sequence_level and objective.kernel_terms(Rows()) == ():
        return "no passes of its own: the kernel of `cross_entropy` takes its gradient through the labels"
    if type(objective).value_and_gradient is not Objective.value_and_gradient:
        return "closed form, eager"
    return "definition, eager, by autograd"


def without_kernel(found: dict[str, Any]) -> str:
    """One row for each loss that has no kernel of its own, and for those that hold others."""
    compiled = {row["objective"] for row in found["rows"]}
    lines = ["| loss | with `backend: triton` |", "|---|---|"]
    for kind in REGISTRY.kinds():
        if kind not in compiled:
            lines.append(f"| `{kind}` | {HOLDERS.get(kind) or otherwise(build(kind))} |")
    return "\n".join(lines)
