"""How far the gradient of the fused loss is off float64, with bf16 operands and logits in fp32 or in bf16.

Hidden states of both models follow the same 64 factors, so that the two distributions agree as far as a
student's and its teacher's do; three spreads of the logits. A CPU computes fp32 logits as a GPU does, by fp32
sums of products of bf16 numbers.

    python benchmarks/logit_precision.py            # half a minute, one thread
    python benchmarks/logit_precision.py --small    # one spread; writes nothing

Writes benchmarks/results/logit_precision.json.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _result import result, save
from torch import Tensor

from stillhouse.core.rows import Rows
from stillhouse.fused import FusedConfig, fused_rows
from stillhouse.objectives import build

RESULT = Path(__file__).parent / "results" / "logit_precision.json"
ROWS, WIDTH, TEACHER_WIDTH, VOCAB, FACTORS = 512, 128, 192, 6001, 64
SPREADS = (2.0, 4.0, 8.0)
KINDS = ("forward_kl", "reverse_kl", "skew_kl", "skew_rkl", "jsd", "csd", "tvd", "cross_entropy")


def main() -> None:
    """Compare every objective at every spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true", help="one spread; writes nothing")
    small = parser.parse_args().small
    rows = []
    for spread in SPREADS[: 1 if small else None]:
        models = pair(spread)
        for kind in KINDS:
            rows.append({"logit_spread": spread, "objective": kind, **errors(kind, models)})
            print(json.dumps(rows[-1]), flush=True)
    if not small:
        save(RESULT, result(rows, []))


def pair(spread: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and head of the student, and of the teacher, in bf16."""
    draw = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw)

    factors, meaning = normal(ROWS, FACTORS), normal(FACTORS, VOCAB)
    made = []
    for width in (WIDTH, TEACHER_WIDTH):
        hidden = factors @ normal(FACTORS, width) / FACTORS**0.5 + 0.3 * normal(ROWS, width)
        reading = torch.linalg.lstsq(hidden, factors).solution
        head = spread * ((reading @ meaning).t() / FACTORS**0.5 + 0.3 * normal(VOCAB, width) / width**0.5)
        made += [hidden.bfloat16(), head.bfloat16()]
    return tuple(made)  # type: ignore[return-value]


def errors(kind: str, models: tuple[Tensor, ...]) -> dict[str, Any]:
    """The relative error of both gradients by the precision of the logits."""
    exact = gradients(kind, [one.double() for one in models], FusedConfig())
    found: dict[str, Any] = {}
    for name, fp32 in (("fp32", True), ("bf16", False)):
        options = FusedConfig(chunk_rows=128, fp32_logits=fp32)
        got = gradients(kind, list(models), options)
        for part, one, wanted in zip(("hidden", "head"), got, exact, strict=True):
            found[f"{name}_{part}"] = float(f"{(one.double() - wanted).norm() / wanted.norm():.2g}")
    return found


def gradients(kind: str, models: list[Tensor], config: FusedConfig) -> tuple[Tensor, ...]:
    """Those of the student's hidden states and head."""
    leaves = [one.clone().requires_grad_() for one in models[:2]]
    rows = Rows(labels=torch.arange(ROWS) % VOCAB)
    loss, _ = fused_rows(build(kind), *leaves, *models[2:], rows=rows, config=config)
    return torch.autograd.grad(loss, leaves)


if __name__ == "__main__":
    main()
