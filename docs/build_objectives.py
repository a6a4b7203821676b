"""Writes docs/objectives.md and its plots from the docstrings and the objectives themselves."""

from __future__ import annotations

import inspect
import re
import textwrap

import torch
from torch import Tensor

from stillhouse.core.rows import Rows
from stillhouse.core.types import SOURCES
from stillhouse.objectives import REGISTRY, Objective, build

HEADINGS = ("Equation", "Gradient", "Character", "When", "Source")
OPTIONS = {
    "sum": {"terms": [{"kind": "forward_kl"}, {"kind": "cross_entropy", "loss_weight": 0.2}]},
    "by_source": {"teacher": {"kind": "skew_kl"}, "student": {"kind": "skew_rkl"}},
    "teacher_mixture": {
        "weights": {"main": 0.7, "code": 0.3},
        "objective": {"kind": "forward_kl"},
    },
    "by_teacher": {"objectives": {"main": {"kind": "forward_kl"}, "code": {"kind": "csd"}}},
    "clipped": {"objective": {"kind": "forward_kl"}},
    "agreement": {"contexts": ["main", "second"], "objective": {"kind": "forward_kl"}},
    "hidden_states": {"objective": {"kind": "forward_kl"}},
}
TOKENS = 60

INTRODUCTION = """# Objectives

This page is generated from the docstrings by `python docs/build.py`; edit those.

An objective compares student and teacher at one token and gives a number in nats. In YAML it is

```yaml
objective: {kind: skew_kl, alpha: 0.1}          # the same for all text
objective:                                      # by who wrote the text
  teacher: {kind: skew_kl, alpha: 0.1}
  student: {kind: skew_rkl, alpha: 0.1}
  text: {kind: cross_entropy, loss_weight: 0.2}
objective:                                      # a weighted sum on the same text
  kind: sum
  terms: [{kind: forward_kl}, {kind: cross_entropy, loss_weight: 0.5}]
```

and in Python

```python
import stillhouse

objective = stillhouse.objectives.build("skew_kl", alpha=0.1)
values = objective(student_logits, teacher_logits)  # [N], nats per token
loss = stillhouse.fused_loss(objective, student_hidden, student_head, teacher_hidden, teacher_head)
```

`fused_loss` never holds the logits of more rows than one chunk, projects each row once per model, and
leaves out rows of weight zero. Objectives over whole sequences need the log-probabilities of all labels
first, so their rows are projected twice.

Notation: z are the student's logits, q = softmax(z), p the teacher's distribution, r = z - z_teacher,
E_w[c] the mean of c under weights w. Every number except names and switches may be a schedule.

**What the numbers mean.** Values are true values: a divergence is zero where the models agree, and the
teacher's entropy is not left in. A value may differ from what a paper's code logs; the gradient is the
same. Entries whose logit is -inf in one model are left out of both. bf16 operands: all arithmetic after the
matrix product is fp32. On a GPU the product itself stays in fp32 (`FusedConfig(fp32_logits=False)` rounds
it); a CPU has no such product, so each logit is rounded to bf16 once, as the model's own head would do.
`FusedConfig(fp32_logits=True)` avoids that at the price of fp32 products. The gradient of the head is summed
in fp32 over chunks.

**The plots** show a teacher (grey) and a student (blue) with long tails over 60 tokens, on a logarithmic
scale, and below them the force -dL/dz on each logit, scaled to the largest: up raises a token. The student
misses the teacher's second mode (token 18) and has one of its own (token 40).
"""


def toy() -> tuple[Tensor, Tensor]:
    """Logits of a long-tailed teacher and student with one shared and one own mode each."""
    token = torch.arange(TOKENS, dtype=torch.float64)
    tail = -1.6 * torch.log1p(token)

    def bump(at: int, height: float) -> Tensor:
        return height * torch.exp(-((token - at) ** 2) / 8)

    teacher = tail + bump(18, 4.0) + 0.3 * torch.cos(3 * token)
    student = 0.8 * tail + bump(40, 4.0) + 0.3 * torch.sin(2 * token) - 0.3
    return student[None], teacher[None]


def force(objective: Objective) -> Tensor | None:
    """-dL/dz on the toy pair, [TOKENS]; None where a single token shows nothing."""
    if (
        objective.has_sequence_part
        or "sequences" in objective.requirements().rows
        or objective.other_models
        or objective.name in OPTIONS
    ):
        return None
    student, teacher = toy()
    rows = Rows(labels=torch.tensor([18]), sources=torch.tensor([SOURCES.index("teacher")]))
    leaf = student.requires_grad_()
    value = objective(leaf, teacher, rows).sum()
    return -torch.autograd.grad(value, leaf)[0][0]


def curve(values: Tensor, top: float, height: float, low: float, high: float) -> str:
    """The points of a polyline in the box that starts at `top`."""
    share = ((values - low) / (high - low)).clamp(0, 1)
    return " ".join(f"{6 + 6 * i:.0f},{top + height * (1 - y):.1f}" for i, y in enumerate(share.tolist()))


def plot(values: Tensor, kind: str) -> str:
    """Both distributions and the force, as SVG."""
    student, teacher = toy()
    p, q = (logits[0].log_softmax(-1) for logits in (teacher, student))
    scaled = values / values.abs().max()
    bars = "".join(
        f'<rect x="{4 + 6 * i}" y="{132 - max(y, 0):.1f}" width="4" height="{max(abs(y), 0.1):.1f}"/>'
        for i, y in enumerate((40 * scaled).tolist())
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 372 178" role="img" font-family="sans-serif">'
        f"<title>{kind}: distributions and force on the logits</title>"
        '<rect width="372" height="178" fill="#fff"/>'
        f'<polyline fill="none" stroke="#888" stroke-width="2" points="{curve(p, 8, 76, -9, -0.5)}"/>'
        f'<polyline fill="none" stroke="#1f6fb4" stroke-width="2" points="{curve(q, 8, 76, -9, -0.5)}"/>'
        f'<line x1="2" x2="370" y1="132" y2="132" stroke="#ccc"/><g fill="#c0392b">{bars}</g>'
        '<text x="366" y="16" font-size="9" text-anchor="end" fill="#555">log p (grey), log q (blue)</text>'
        '<text x="366" y="176" font-size="9" text-anchor="end" fill="#555">force -dL/dz</text></svg>\n'
    )


def sections(kind: str) -> tuple[str, dict[str, str]]:
    """The summary and the headed paragraphs of a docstring."""
    text = inspect.getdoc(REGISTRY[kind]) or ""
    summary, _, body = text.partition("\n\n")
    parts = re.split(rf"^({'|'.join(HEADINGS)}): ", body, flags=re.MULTILINE)
    headed = {parts[i]: " ".join(parts[i + 1].split()) for i in range(1, len(parts), 2)}
    return " ".join(summary.split()), headed


def options(kind: str) -> list[str]:
    """A table of the fields of an objective."""
    rows = []
    for name, field in REGISTRY[kind].model_fields.items():
        if name in ("kind", "loss_weight"):
            continue
        default = "required" if field.is_required() else f"`{str(field.default).lower()}`"
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        rows.append(f"| `{name}` | {default} | {meaning} |")
    return ["| option | default | |", "|---|---|---|", *rows, ""] if rows else []


def needs(objective: Objective) -> str:
    """What it requires, in words."""
    required = objective.requirements()
    rows = sorted(required.rows - {"label_logprobs"})
    teacher = ["teacher (" + " or ".join(sorted(objective.forms)) + ")"] if objective.needs_teacher else []
    return ", ".join([*teacher, *sorted(objective.other_models), *rows]) or "what its parts need"


def chapter(kind: str) -> tuple[str, str | None]:
    """The text of one objective, and its plot."""
    objective = build(kind, **OPTIONS.get(kind, {}))
    summary, headed = sections(kind)
    lines = [f"## `{kind}`", "", summary, ""]
    pushed = force(objective)
    if pushed is not None:
        lines += [f"![gradient of {kind}](images/objectives/{kind}.svg)", ""]
    for heading in HEADINGS:
        lines += textwrap.wrap(f"- **{heading}.** {headed[heading]}", 110, subsequent_indent="  ")
    lines += [f"- **Needs.** {needs(objective)}", "", *options(kind)]
    return "\n".join(lines), None if pushed is None else plot(pushed, kind)


def pages() -> dict[str, str]:
    """Every generated file by its path below docs/."""
    kinds = sorted(REGISTRY.kinds())
    chapters = {kind: chapter(kind) for kind in kinds}
    index = ["| kind | character |", "|---|---|"]
    for kind in kinds:
        character = sections(kind)[1]["Character"].replace("|", "\\|")
        index.append(f"| [`{kind}`](#{kind}) | {character} |")
    text = "\n".join([INTRODUCTION, *index, "", *(chapter_text for chapter_text, _ in chapters.values())])
    images = {f"images/objectives/{kind}.svg": image for kind, (_, image) in chapters.items() if image}
    return {"objectives.md": text.rstrip("\n") + "\n", **images}
