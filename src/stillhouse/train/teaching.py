"""Which teacher taught what: responses, tokens and loss of each, where there are several."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from stillhouse.core.batch import Batch
from stillhouse.core.host import RowIndex
from stillhouse.core.requirements import LOGPROBS
from stillhouse.core.rows import Rows
from stillhouse.objectives import Objective
from stillhouse.train.metrics import Metric


def by_teacher(objective: Objective, batch: Batch, rows: Rows, values: Tensor) -> dict[str, Metric]:
    """For each teacher `teachers/NAME/responses`, `/tokens` and `/loss`, the mean of the values of the tokens
    that it was asked about, with the weights that a map gives them; nothing where only one is asked.

    Args:
        objective: of the step.
        batch: the responses.
        rows: facts on their tokens; those of weight zero teach nothing.
        values: [N] nats.
    """
    asked = {need.model for need in objective.requirements().models if need.signals & LOGPROBS}
    if len(asked) < 2:
        return {}
    needs = [
        objective.teachers_of(response.source, response.prompt.facts.get("teacher"))
        for response in batch.responses
    ]
    trained = np.ones(values.shape[0], bool) if rows.loss_mask is None else rows.loss_mask
    found: dict[str, Metric] = {}
    for name in sorted(asked):
        theirs = [row for row, names in enumerate(needs) if name in names]
        chosen = np.flatnonzero(np.isin(batch.row_sequences, theirs) & trained)
        if not len(chosen):
            continue
        found[f"teachers/{name}/responses"] = Metric(float(len(theirs)))
        found[f"teachers/{name}/tokens"] = Metric(float(len(chosen)))
        total = RowIndex.of(chosen).pick(values).sum().double()
        found[f"teachers/{name}/loss"] = Metric(total, "mean", len(chosen))
    return found
