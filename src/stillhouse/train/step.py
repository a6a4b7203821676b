"""One optimiser step of any method, top to bottom: whose responses, what the teacher says, the loss.

Data flows down. Two things flow back, both here: the student's weights to whoever writes with them (the
responses carry the version), and measured losses to the curriculum (`observe`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stillhouse.core.batch import Batch
from stillhouse.core.head import ModelHead
from stillhouse.core.rows import Rows
from stillhouse.core.sparse import SparseLogprobs
from stillhouse.core.types import SOURCES, Progress, Prompt, Response
from stillhouse.data.collate import collate, split
from stillhouse.data.translate import Translator, alignment_of
from stillhouse.errors import TrainingError
from stillhouse.fused import fused_label_facts, fused_rows
from stillhouse.models import head_of, hidden_rows, layer_rows
from stillhouse.objectives import Objective
from stillhouse.objectives.base import Layers, each_objective
from stillhouse.rollouts import ResponsePolicy, ResponsesConfig, TeacherHiddenCache
from stillhouse.schedules import ScheduleTracker
from stillhouse.teachers import AnyTeacher, Teacher
from stillhouse.teachers.base import LayerTeacher
from stillhouse.train.gaps import Gaps
from stillhouse.train.meter import Meter
from stillhouse.train.reduce import Normalise, token_weights
from stillhouse.train.signal import look_ahead, seen_by_teacher, teacher_signal


@dataclass(frozen=True)
class Method:
    """The scheduled parts of a method; the curriculum turns them into plain numbers at each step."""

    responses: ResponsesConfig
    objective: Objective
    normalise: Normalise


class World(Protocol):
    """What the step must know of other processes."""

    size: int

    def add(self, counts: Tensor) -> Tensor:
        """Sum over all ranks."""
        ...


class Alone:
    """A single process."""

    size = 1

    def add(self, counts: Tensor) -> Tensor:
        """The counts themselves."""
        return counts


class Step:
    """Prepares the micro-batches of an optimiser step and computes their losses."""

    def __init__(
        self,
        method: Method,
        policy: ResponsePolicy,
        teacher: AnyTeacher | None,
        pad_id: int,
        vocab: int,
        world: World | None = None,
        text: Callable[[int, int], list[Response]] | None = None,
        memory: TeacherHiddenCache | None = None,
    ) -> None:
        """Wire the parts of a method.

        Args:
            method: objective, response policy and normalisation, with schedules.
            policy: the running response policy.
            teacher: the running teacher; None if no objective needs one.
            pad_id: fills the right of shorter sequences.
            vocab: number of token ids that student and teacher share.
            world: other processes.
            text: (optimiser step, how many) -> plain-text sequences that are added to each step.
            memory: the policy's; what the teacher said about responses that come again.
        """
        self.method = method
        self.policy = policy
        self.teacher = teacher
        self.schedules = ScheduleTracker(_tree(method))
        self.meter = Meter()
        self.now: dict[str, Any] = _tree(method)
        self.last_loss = 0.0
        self.tokens = 0
        """Response tokens that this process has trained on."""
        self.translator: Translator | None = None
        """Set where the teacher has another tokenizer."""
        self.forward_ended = 0.0
        """When the last forward pass ended, by `time.perf_counter`; the backward pass follows."""
        self._pad_id = pad_id
        self._vocab = vocab
        self.world: World = world or Alone()
        self._text = text
        self._memory = TeacherHiddenCache() if memory is None else memory  # an empty one is falsy
        measured = method.objective.requirements().batch_statistics
        self._gaps = Gaps() if teacher is not None and "likelihood_gaps" in measured else None
        self._progress = Progress(step=0, max_steps=1, epoch=0.0, epochs=1.0)

    def prepare(
        self, prompts: Sequence[Prompt], progress: Progress, num_micro: int
    ) -> list[dict[str, Tensor]]:
        """Once for each optimiser step: responses, micro-batches and the weight of every token.

        Args:
            prompts: this rank's prompts of the step.
            progress: steps done before this one.
            num_micro: exactly so many micro-batches come back.
        """
        self._progress = progress
        values = self.schedules.resolve(_tree(self.method), progress)
        self.now = each_objective(values, lambda objective: objective.at(progress))
        with self.meter.seconds("generate"):
            drawn = self.policy.draw(self.now["responses"], prompts, progress)
        groups = drawn if self._in_pairs else [[response] for group in drawn for response in group]
        if self._text is not None:
            groups = [*groups, *([block] for block in self._text(progress.step, len(prompts)))]
        micro = [collate(part, self._pad_id) for part in split(groups, num_micro, by_length=True)]
        weights = token_weights(
            micro, groups_of(self.now["objective"]), self.method.normalise, self.world.add
        )
        teacher_inputs = [
            {} if self.translator is None else self.translator.teacher_inputs(b.responses) for b in micro
        ]
        self._note(micro, progress)
        self.last_loss = 0.0
        ready = [
            {**_tensors(batch, weight, self._memory), **more}
            for batch, weight, more in zip(micro, weights, teacher_inputs, strict=True)
        ]
        with self.meter.seconds("teacher"):
            look_ahead(self.teacher, [seen_by_teacher(batch) for batch in ready], self.now["objective"])
        return ready

    @property
    def looks_ahead(self) -> bool:
        """Whether `look` has something to do in this step."""
        objective: Objective = self.now["objective"]
        return "mean_likelihood_gaps" in objective.requirements().batch_statistics

    def look(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Between `prepare` and the first loss of a step: what an objective must know of the whole step.

        Both models read all micro-batches without gradients or dropout; nothing happens unless an objective
        refers to the batch.
        """
        if not self.looks_ahead:
            return
        gaps, training = Gaps(), model.training
        model.eval()
        with torch.no_grad(), self.meter.seconds("look"):
            for batch in batches:
                sides = self._sides(model, batch, self._teacher_signal(batch)[0])[0]
                gaps.add(fused_label_facts(self.now["objective"], *sides, rows=rows_of(batch)))
        model.train(training)
        means = gaps.means(self.world.add)
        self.now = each_objective(self.now, lambda objective: objective.with_batch_statistics(means))

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Once for each micro-batch: its part of the step's loss, a scalar in nats.

        The sum over micro-batches and ranks is the loss; the result is multiplied by the number of ranks,
        because data-parallel training averages gradients over them.

        Raises:
            TrainingError: the loss is not finite.
        """
        objective: Objective = self.now["objective"]
        mask = batch["response_mask"]
        theirs, their_layers = self._teacher_signal(batch)
        with self.meter.seconds("student"):
            sides, our_layers = self._sides(model, batch, theirs)
            rows = rows_of(batch, self.translator)
            if self._gaps is not None:
                rows = fused_label_facts(objective, *sides, rows=rows)
                self._gaps.add(rows)
            loss, values = fused_rows(objective, *sides, token_weight=batch["weight"][mask], rows=rows)
            if objective.depths:
                with torch.autocast(mask.device.type, enabled=False):
                    more = objective.per_layers(our_layers, their_layers, rows)
                loss = loss + (more * batch["weight"][mask]).sum()
                values = values + more.detach()
        self.meter.add("tokens/student", float(batch["attention_mask"].sum()))
        self._measure(loss.detach(), values, batch["sources"][mask.nonzero()[:, 0]])
        self.forward_ended = time.perf_counter()
        return loss * self.world.size

    def finish(self) -> None:
        """Once after each optimiser step, before anything is saved: tell the curriculum the step's loss."""
        if self.world.size > 1:
            self.last_loss = self.world.add(torch.tensor(self.last_loss, dtype=torch.float64)).item()
        self.meter.add_mean("loss", self.last_loss, 1)
        self.observe("train_loss", self.last_loss)
        if self._gaps is not None:
            for name, mean in self._gaps.means(self.world.add).items():
                self.observe(name, mean)
                self.meter.add_mean(f"gap/{name.removesuffix('_gap')}", mean, 1)

    def close(self) -> str | None:
        """Once at the end: let go of the teacher's files and connections; what it has to say about itself."""
        return self.teacher.close() if self.teacher is not None else None

    def observe(self, name: str, value: float) -> None:
        """Tell the curriculum what was measured ("dev_loss", "train_loss", "teacher_gap", "student_gap")."""
        self.schedules.observe(name, value, self._progress)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside weights, optimiser and random states of the trainer."""
        return {
            "schedules": self.schedules.state_dict(),
            "policy": self.policy.state_dict(),
            "meter": self.meter.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.schedules.load_state_dict(state["schedules"])
        self.policy.load_state_dict(state["policy"])
        self.meter.load_state_dict(state["meter"])

    @property
    def _in_pairs(self) -> bool:
        """Whether the responses of a prompt must stay together in a micro-batch."""
        return "pairs" in self.method.objective.requirements().rows

    def _teacher_signal(self, batch: Mapping[str, Tensor]) -> tuple[Tensor | SparseLogprobs | None, Layers]:
        """What the teacher says about a micro-batch and its layers that are compared, counted and timed."""
        if self.teacher is None:
            return None, {}
        seen = getattr(self.teacher, "tokens", 0)
        with self.meter.seconds("teacher"):
            seen_batch = seen_by_teacher(batch)
            objective: Objective = self.now["objective"]
            signal: Tensor | SparseLogprobs
            layers: Layers = {}
            if objective.depths:
                assert isinstance(self.teacher, LayerTeacher)
                signal, layers = self.teacher.layers(seen_batch, objective.depths)
            else:
                signal = teacher_signal(self.teacher, seen_batch, objective, self._memory)
        for name, (total, count) in self.teacher.pop_metrics().items():
            self.meter.add_mean(name, total, count)
        if tokens := getattr(self.teacher, "tokens", 0) - seen:
            self.meter.add("tokens/teacher", float(tokens))
        return signal, layers

    def _sides(
        self, model: nn.Module, batch: Mapping[str, Tensor], theirs: Tensor | SparseLogprobs | None
    ) -> tuple[tuple[Tensor, ModelHead, Tensor | SparseLogprobs | None, ModelHead | None], Layers]:
        """Hidden states and head of the student, then what the teacher says and its head, if it has one; and
        the student's layers that are compared."""
        head = self.teacher.head if isinstance(self.teacher, Teacher) else None
        depths = self.now["objective"].depths
        hidden, layers = (
            layer_rows(model, dict(batch), depths) if depths else (hidden_rows(model, dict(batch)), {})
        )
        return (hidden, head_of(model, self._vocab), theirs, head), layers

    def _note(self, micro: Sequence[Batch], progress: Progress) -> None:
        sources = torch.cat([batch.sources for batch in micro])
        for code, source in enumerate(SOURCES):
            share = (sources == code).float().mean().item()
            if share or source in self.method.responses.sources():
                self.meter.add_mean(f"responses/{source}", share, 1)
        ages = [
            progress.step - version
            for batch in micro
            for version in batch.student_versions.tolist()
            if version >= 0
        ]
        if ages:
            self.meter.add_mean("responses/student_age", float(sum(ages)), len(ages))
        for name, value in {
            **self.policy.metrics(),
            **_schedule_names(self.schedules.values(progress)),
        }.items():
            self.meter.add_mean(name, value, 1)
        if self.translator is not None:
            for name, (total, count) in self.translator.metrics().items():
                self.meter.add_mean(name, total, count)
        tokens = sum(batch.num_tokens for batch in micro)
        self.tokens += tokens
        self.meter.add("tokens", float(tokens))
        self.meter.add("sequences", float(sum(len(batch) for batch in micro)))

    def _measure(self, loss: Tensor, values: Tensor, sources: Tensor) -> None:
        total = loss.item()
        self.last_loss += total
        objective: Objective = self.now["objective"]
        for code in sources.unique().tolist():
            source = SOURCES[code]
            chosen = values[sources == code]
            weight = objective.source_weight(source)
            if weight:  # a map's values hold the loss weight; the log shows the divergence itself
                self.meter.add_mean(f"loss/{source}", chosen.sum().item() / weight, chosen.numel())
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss became {total} (objective {self.now['objective'].name}). No weights were changed "
                "by this step. Usual causes: train.lr too high, train.clip 0, or float16 weights; try a "
                "tenth of train.lr, or student.dtype: float32."
            )


def groups_of(objective: Objective) -> dict[str, tuple[int, float]]:
    """source -> (number of its mean, loss weight): sources under one objective share a mean.

    The weights within a map are part of its values already; here counts the weight of the whole.
    """
    apart = objective.sources
    numbers = dict.fromkeys(SOURCES, 0) if apart is None else {source: n for n, source in enumerate(apart)}
    return {source: (number, float(objective.loss_weight)) for source, number in numbers.items()}


def rows_of(batch: Mapping[str, Tensor], translator: Translator | None = None) -> Rows:
    """What objectives may ask about each response token of a micro-batch."""
    mask = batch["response_mask"]
    sequences = mask.nonzero()[:, 0]
    return Rows(
        labels=batch["labels"][mask],
        sources=batch["sources"][sequences],
        sequence_ids=sequences,
        pair_ids=batch["pair_ids"][sequences],
        positions=(mask.cumsum(1) - 1)[mask],
        sampled_logprobs=batch["logprobs"][mask] if "logprobs" in batch else None,
        alignment=None if translator is None else alignment_of(batch, translator.vocabulary_match),
    )


def _tensors(batch: Batch, weight: Tensor, memory: TeacherHiddenCache) -> dict[str, Tensor]:
    tensors = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "response_mask": batch.response_mask,
        "labels": batch.labels,
        "sources": batch.sources,
        "pair_ids": _pairs(batch.responses),
        "weight": weight,
    }
    if memory:
        tensors["kept"] = torch.tensor([memory.slot(response) for response in batch.responses])
    return tensors if batch.logprobs is None else {**tensors, "logprobs": batch.logprobs}


def _pairs(responses: Sequence[Response]) -> Tensor:
    """[B] the same number for the responses of a pair; a prompt that comes twice makes two pairs."""
    seen: Counter[tuple[str, str]] = Counter()
    numbers: dict[tuple[str, int], int] = {}
    found = []
    for response in responses:
        name = response.prompt.id
        pair = name, seen[name, response.source]
        seen[name, response.source] += 1
        found.append(numbers.setdefault(pair, len(numbers)))
    return torch.tensor(found)


def _tree(method: Method) -> dict[str, Any]:
    return {"responses": method.responses, "objective": method.objective}


def _schedule_names(values: Mapping[str, float]) -> dict[str, float]:
    return {f"schedule/{path}": value for path, value in values.items()}
