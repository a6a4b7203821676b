"""Likelihood of given text, and fidelity to the teacher and calibration on it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.core.batch import Batch
from stillhouse.core.distributed import SINGLE_PROCESS, World, is_sharded
from stillhouse.core.host import Ints
from stillhouse.core.types import Prompt, Response
from stillhouse.data.collate import collate, read_by_teacher
from stillhouse.errors import DataError
from stillhouse.evaluate.metrics.distributions import Calibration, Fidelity, FidelityScores
from stillhouse.models import head_of, hidden_rows

logger = logging.getLogger("stillhouse")

TokenSums = dict[str, dict[str, list[float]]]
"""By the id of a prompt and the name of a mean over tokens: the sum over the tokens of its responses, and how
many these are."""

FIDELITY = ("kl_to_teacher", "reverse_kl_to_teacher", "tvd", "top1_agreement")
"""What `Fidelity.update` returns, in order."""

CHUNK = 1024
"""Response positions whose logits are in memory at a time."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Means over response tokens.

    Example: `Likelihood(1.02, tokens=3310, fidelity=None, calibration_error=0.04,
    teacher_calibration_error=None)`
    """

    loss: float
    """-log q(token), in nats per token."""
    tokens: int
    fidelity: FidelityScores | None
    """Of the student to the teacher at the same positions; None without a teacher."""
    calibration_error: float
    """Expected calibration error of the student, 0 to 1."""
    teacher_calibration_error: float | None
    """That of the teacher on the same text; None without a teacher."""
    sums: TokenSums = field(default_factory=dict)
    """Of the loss and the measures of fidelity, for intervals over prompts."""


def likelihood(
    student: nn.Module,
    responses: Sequence[Response],
    pad_id: int,
    *,
    teacher: nn.Module | None = None,
    vocab_size: int | None = None,
    batch_size: int = 32,
    world: World = SINGLE_PROCESS,
) -> Likelihood:
    """Loss and calibration of a student on given responses; with a teacher also fidelity to it.

    Of several processes each reads every n-th batch, unless the weights of a model are spread over them, and
    all get the whole.

    Args:
        student: a causal language model; it is in eval mode meanwhile.
        responses: with at least one token each.
        pad_id: right-pads shorter sequences.
        teacher: the model to compare with.
        vocab_size: number of token ids that both share. A response is cut at its first token beyond, which a
            padded head can generate and no other model can read; a warning says how many were.
        batch_size: sequences per forward pass.
        world: the processes that share the work.

    Raises:
        DataError: there are no responses.
    """
    responses = _readable(responses, vocab_size)
    training = student.training
    student.eval()
    if any(model is not None and is_sharded(model) for model in (student, teacher)):
        world = SINGLE_PROCESS
    found = _Measured()
    try:
        with torch.no_grad():
            for some in islice(_batches(responses, batch_size), world.rank, None, world.size):
                found.measure(student, teacher, some, pad_id, vocab_size)
    finally:
        student.train(training)
    if world.size > 1:
        found = _Measured.of_all(world.gather(found))
    return found.means(teacher is not None)


@dataclass
class _Measured:
    """What is added up over batches."""

    total: float = 0.0
    tokens: int = 0
    fidelity: Fidelity = field(default_factory=Fidelity)
    calibration: Calibration = field(default_factory=Calibration)
    teacher_calibration: Calibration = field(default_factory=Calibration)
    sums: TokenSums = field(default_factory=dict)

    def measure(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        responses: list[Response],
        pad_id: int,
        vocab_size: int | None,
    ) -> None:
        """Add one batch."""
        batch = collate(responses, pad_id).to(next(student.parameters()).device)
        labels = batch.row_labels()
        hidden = hidden_rows(student, batch)
        teacher_hidden = _teacher_hidden(teacher, batch, pad_id)
        parts = []
        for rows in torch.arange(len(labels)).split(CHUNK):
            logits = head_of(student, vocab_size).logits(hidden[rows])
            nats = -logits.log_softmax(-1).gather(1, labels[rows, None])[:, 0].double()
            self.total += nats.sum().item()
            values = nats[None]
            self.calibration.update(logits, labels[rows])
            if teacher is not None and teacher_hidden is not None:
                teacher_logits = head_of(teacher, vocab_size).logits(teacher_hidden[rows])
                values = torch.cat([values, self.fidelity.update(logits, teacher_logits).double()])
                self.teacher_calibration.update(teacher_logits, labels[rows])
            parts.append(values)
        self.tokens += len(labels)
        _add_sums(self.sums, responses, torch.cat(parts, dim=1), batch.row_sequences)

    @classmethod
    def of_all(cls, shares: Sequence[_Measured]) -> _Measured:
        """Of several processes together."""
        whole = cls(sum(one.total for one in shares), sum(one.tokens for one in shares))
        whole.fidelity.add([one.fidelity for one in shares])
        whole.calibration.add([one.calibration for one in shares])
        whole.teacher_calibration.add([one.teacher_calibration for one in shares])
        for one in shares:
            for id, own in one.sums.items():
                known = whole.sums.setdefault(id, {name: [0.0, 0] for name in own})
                for name, (total, tokens) in own.items():
                    known[name][0] += total
                    known[name][1] += tokens
        return whole

    def means(self, with_teacher: bool) -> Likelihood:
        """Over all tokens."""
        return Likelihood(
            self.total / self.tokens,
            self.tokens,
            self.fidelity.scores() if with_teacher else None,
            self.calibration.error(),
            self.teacher_calibration.error() if with_teacher else None,
            self.sums,
        )


def _teacher_hidden(teacher: nn.Module | None, batch: Batch, pad_id: int) -> Tensor | None:
    return None if teacher is None else hidden_rows(teacher, read_by_teacher(batch, pad_id))


def _readable(responses: Sequence[Response], vocab_size: int | None) -> Sequence[Response]:
    found = responses if vocab_size is None else _cut_at_unknown_tokens(responses, vocab_size)
    if not found:
        raise DataError(
            "there are no responses to measure a likelihood on; evaluation needs rows with references."
        )
    return found


def _add_sums(sums: TokenSums, responses: Sequence[Response], values: torch.Tensor, sequences: Ints) -> None:
    """Add the values of each row, [1 or 5, N], to those of the row's prompt."""
    names = ("loss", *FIDELITY)[: len(values)]
    whole = torch.zeros(len(values), len(responses), dtype=torch.float64, device=values.device)
    whole.index_add_(1, torch.from_numpy(sequences).to(values.device), values)
    for response, own_values in zip(responses, whole.T.tolist(), strict=True):
        own = sums.setdefault(response.prompt.id, {name: [0.0, 0] for name in names})
        for name, value in zip(names, own_values, strict=True):
            own[name][0] += value
            own[name][1] += len(response.token_ids) if response.trained is None else sum(response.trained)


def _cut_at_unknown_tokens(responses: Sequence[Response], vocab_size: int) -> list[Response]:
    """The responses up to the first token id that the tokenizer does not have."""
    kept, cut = [], 0
    for response in responses:
        unknown = (index for index, token in enumerate(response.token_ids) if token >= vocab_size)
        end = next(unknown, None)
        cut += end is not None
        if end is None:
            kept.append(response)
        elif end:
            trained = None if response.trained is None else response.trained[:end]
            if trained is None or any(trained):
                ids = response.token_ids[:end]
                kept.append(replace(response, token_ids=ids, finished=False, trained=trained))
    if cut:
        logger.warning(
            "%d of %d responses hold token ids from %d on, which the tokenizer does not have; likelihoods "
            "are measured up to there",
            cut,
            len(responses),
            vocab_size,
        )
    return kept


def likelihood_metrics(
    model: nn.Module,
    teacher: nn.Module | None,
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    **options: Any,
) -> tuple[dict[str, float], TokenSums]:
    """Loss on the references; with a teacher also fidelity there and (`_on_own_text`) on the responses.

    Args:
        model: the model that generated the responses.
        teacher: the model to compare with.
        prompts: those without a reference take no part in the loss.
        responses: at least one.
        **options: `pad_id`, `vocab_size` and `batch_size` of `likelihood`.

    Returns:
        The measures, and what each prompt adds to them.
    """
    metrics: dict[str, float] = {}
    sums: TokenSums = {}
    references = references_of(prompts)
    if references:
        result = likelihood(model, references, teacher=teacher, **options)
        metrics["loss"] = result.loss
        if result.fidelity is not None:
            metrics |= result.fidelity.as_metrics()
        sums = result.sums
    if teacher is not None:
        own = likelihood(model, responses, teacher=teacher, **options)
        assert own.fidelity is not None
        metrics |= {f"{name}_on_own_text": value for name, value in own.fidelity.as_metrics().items()}
        merge_sums(sums, own.sums, "_on_own_text")
    return metrics, sums


def merge_sums(sums: TokenSums, more: TokenSums, ending: str = "") -> None:
    """Add the sums of other measures, under names with an ending."""
    for id, own in more.items():
        sums.setdefault(id, {}).update({f"{name}{ending}": pair for name, pair in own.items()})


def references_of(prompts: Iterable[Prompt]) -> list[Response]:
    """The data set's own responses; prompts without one are left out."""
    found = (prompt.reference_response() for prompt in prompts)
    return [response for response in found if response is not None]


def _batches(responses: Sequence[Response], size: int) -> Iterable[list[Response]]:
    by_length = sorted(responses, key=lambda r: len(r.prompt.token_ids) + len(r.token_ids))
    for start in range(0, len(by_length), size):
        yield by_length[start : start + size]
