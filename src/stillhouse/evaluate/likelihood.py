"""Likelihood of given text and fidelity to the teacher on it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.core.types import Prompt, Response
from stillhouse.data.collate import collate
from stillhouse.errors import DataError
from stillhouse.evaluate.metrics.calibration import Calibration
from stillhouse.evaluate.metrics.fidelity import Fidelity, FidelityScores
from stillhouse.models import head_of, hidden_rows

logger = logging.getLogger("stillhouse")

ROWS = 1024
"""Response positions whose logits are held at a time."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Means over response tokens.

    Example: `Likelihood(loss=1.02, tokens=3310, fidelity=None, calibration=0.04, teacher_calibration=None)`
    """

    loss: float
    """-log q(token), in nats per token."""
    tokens: int
    fidelity: FidelityScores | None
    """How near the student is to the teacher at the same positions; None without a teacher."""
    calibration: float
    """Expected calibration error of the student, 0 to 1."""
    teacher_calibration: float | None
    """That of the teacher on the same text; None without a teacher."""


def likelihood(
    student: nn.Module,
    responses: Sequence[Response],
    pad_id: int,
    *,
    teacher: nn.Module | None = None,
    vocab: int | None = None,
    batch_size: int = 32,
) -> Likelihood:
    """Measure a student, and the teacher beside it, on given responses.

    Args:
        student: a causal language model; its mode is put back.
        responses: with at least one token each.
        pad_id: fills the right of shorter sequences.
        teacher: also measure how near the student is to it.
        vocab: number of token ids that both share. A response is cut at its first token beyond them, which a
            padded head may write and nobody else can read; how many were is warned of.
        batch_size: sequences in one forward pass.

    Raises:
        DataError: there are no responses.
    """
    responses = responses if vocab is None else _shared(responses, vocab)
    if not responses:
        raise DataError(
            "there are no responses to measure a likelihood on; evaluation needs rows with references."
        )
    training = student.training
    student.eval()
    fidelity, calibration, theirs_too = Fidelity(), Calibration(), Calibration()
    total, tokens = 0.0, 0
    try:
        with torch.no_grad():
            for part in _batches(responses, batch_size):
                batch = _on(collate(part, pad_id), student)
                labels = batch["labels"][batch["response_mask"]]
                hidden = hidden_rows(student, batch)
                theirs = None if teacher is None else hidden_rows(teacher, batch)
                for rows in torch.arange(len(labels)).split(ROWS):
                    logits = head_of(student, vocab).logits(hidden[rows])
                    total -= logits.log_softmax(-1).gather(1, labels[rows, None]).double().sum().item()
                    calibration.update(logits, labels[rows])
                    if teacher is not None and theirs is not None:
                        wanted = head_of(teacher, vocab).logits(theirs[rows])
                        fidelity.update(logits, wanted)
                        theirs_too.update(wanted, labels[rows])
                tokens += len(labels)
    finally:
        student.train(training)
    return Likelihood(
        total / tokens,
        tokens,
        None if teacher is None else fidelity.scores(),
        calibration.error(),
        None if teacher is None else theirs_too.error(),
    )


def _shared(responses: Sequence[Response], vocab: int) -> list[Response]:
    """The responses up to the first token that is none of the tokenizer's."""
    found, cut = [], 0
    for response in responses:
        foreign = (place for place, token in enumerate(response.token_ids) if token >= vocab)
        end = next(foreign, None)
        cut += end is not None
        if end is None:
            found.append(response)
        elif end:
            found.append(replace(response, token_ids=response.token_ids[:end], finished=False))
    if cut:
        logger.warning(
            "%d of %d responses hold token ids from %d on, which the tokenizer does not know; likelihoods "
            "are measured up to there",
            cut,
            len(responses),
            vocab,
        )
    return found


def closeness(
    model: nn.Module,
    teacher: nn.Module | None,
    prompts: Sequence[Prompt],
    answers: Sequence[Response],
    **options: Any,
) -> dict[str, float]:
    """Loss on the references; with a teacher also fidelity there and (`_on_own_text`) on the answers.

    Args:
        model: the model that wrote the answers.
        teacher: what to compare it with.
        prompts: those without a reference take no part in the loss.
        answers: at least one.
        **options: `pad_id`, `vocab` and `batch_size` of `likelihood`.
    """
    metrics: dict[str, float] = {}
    references = references_of(prompts)
    if references:
        found = likelihood(model, references, teacher=teacher, **options)
        metrics["loss"] = found.loss
        if found.fidelity is not None:
            metrics |= found.fidelity.as_metrics()
    if teacher is not None:
        own = likelihood(model, answers, teacher=teacher, **options).fidelity
        assert own is not None
        metrics |= {f"{name}_on_own_text": value for name, value in own.as_metrics().items()}
    return metrics


def references_of(prompts: Iterable[Prompt]) -> list[Response]:
    """The data set's own responses, as far as there are any."""
    return [
        Response(prompt, prompt.response_ids, "fixed", prompt.response_finished)
        for prompt in prompts
        if prompt.response_ids is not None
    ]


def _batches(responses: Sequence[Response], size: int) -> Iterable[list[Response]]:
    by_length = sorted(responses, key=lambda r: len(r.prompt.token_ids) + len(r.token_ids))
    for start in range(0, len(by_length), size):
        yield by_length[start : start + size]


def _on(batch: Any, model: nn.Module) -> dict[str, Tensor]:
    moved = batch.to(next(model.parameters()).device)
    return {name: getattr(moved, name) for name in ("input_ids", "attention_mask", "response_mask", "labels")}
