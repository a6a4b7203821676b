"""What response policies draw in one process or several, written to a file for each process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tests.rollouts.contexts import Clock, at, context

from stillhouse.core.distributed import Ranks, rank_and_size
from stillhouse.core.types import Response
from stillhouse.rollouts import REGISTRY, ResponsesConfig

BATCH, MICRO_BATCH, STEPS = 8, 2, 7
LOGPROBS = {"logprobs": True, "max_tokens": 8}
POLICIES: dict[str, dict[str, Any]] = {
    "on_policy": {"kind": "on_policy"},
    "mixed": {"kind": "mixed", "student_share": 0.6},
    "batched": {"kind": "batched", "generate_batches": 3, "epochs": 2, "sampling": LOGPROBS},
    "speculative": {"kind": "speculative", "block_size": 3},
    "each step": {"kind": "generated", "by": "teacher", "refresh": "step"},
    "fresh": {"kind": "adaptive", "student_share": 1.0, "fresh_share": 1.0, "train_on_fresh": True,
              "generate_batches": 2, "capacity": 41},
    "replayed": {"kind": "adaptive", "student_share": 0.8, "fresh_share": 0.4, "capacity": 41},
    "filtered": {"kind": "pairs", "refresh": "epoch", "chunk_size": 4,
                 "filters": [{"kind": "format", "forbid": r"\b2[0-4]\b", "source": "student"}]},
}  # fmt: skip


def draw(folder: Path) -> None:
    """Draw with every policy, the last step with 3 prompts, which the last processes then lack."""
    torch.set_num_threads(1)
    rank, size = rank_and_size()
    world = Ranks(rank, size, micro_batch_size=MICRO_BATCH)
    clock = Clock()
    found: dict[str, Any] = {}
    for name, given in POLICIES.items():
        around = context(folder / f"{name}-{size}", clock, prompts=40, world=world)
        around = replace(around, decode=lambda ids: " ".join(map(str, ids)))
        config: ResponsesConfig = REGISTRY.parse(given)
        policy = config.build(around)
        steps = []
        for step in range(STEPS):
            clock.step = step
            count = BATCH if step < STEPS - 1 else 3
            places = [one for one in world.local_indices(BATCH // size) if one < count]
            prompts = [around.prompts[(step * BATCH + place) % 40] for place in places]
            drawn = policy.draw(config, prompts, at(step))
            answers = {
                place: [plain(one) for one in group] for place, group in zip(places, drawn, strict=True)
            }
            steps.append({"drawn": answers, "metrics": policy.metrics()})
        found[name] = {"steps": steps, "state": policy.state_dict()}
    torch.save(found, folder / f"{rank}-of-{size}.pt")


def plain(response: Response) -> tuple[Any, ...]:
    """A response as plain values."""
    return response.prompt.id, response.token_ids, response.source, response.student_version
