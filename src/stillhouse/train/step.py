"""One optimiser step of any method, top to bottom: responses, teacher signals, the loss.

Data flows down: `prepare` gives a `PreparedStep`, `loss` a `StepLoss` for each of its micro-batches, `finish`
takes them together. Two things flow back, both here: the student's weights to whoever generates with them
(the responses carry the version), and measured losses to the schedules (`observe`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.core.batch import Batch, TokenBatch
from stillhouse.core.distributed import SingleProcess, World
from stillhouse.core.head import ModelHead, ModelSignal
from stillhouse.core.host import RowIndex
from stillhouse.core.requirements import MAIN
from stillhouse.core.rows import Rows
from stillhouse.core.types import SOURCES, Progress, Prompt, Response
from stillhouse.data.collate import alignment_with, collate, read_by_teacher, split, split_by_tokens
from stillhouse.data.translate import Translator
from stillhouse.errors import TrainingError
from stillhouse.fused import FusedConfig, fused_label_facts, fused_rows
from stillhouse.models import head_of, hidden_rows, layer_rows
from stillhouse.objectives import Objective
from stillhouse.objectives.base import Layers
from stillhouse.objectives.registry import each_objective
from stillhouse.rollouts import ResponsePolicy, ResponsesConfig, TeacherHiddenCache
from stillhouse.schedules import ScheduleTracker
from stillhouse.teachers import AnyTeacher, FollowingTeacher
from stillhouse.train.gaps import SequenceGaps, gap_means, gap_teacher
from stillhouse.train.metrics import Metric, MetricAccumulator, over_processes
from stillhouse.train.micro_batch import MicroBatch, PreparedStep, StepLoss
from stillhouse.train.reduce import Normalise, token_weights
from stillhouse.train.side_stream import Pending, SideStream
from stillhouse.train.teacher_signals import TeacherOutputs, TeacherSignals, prefetch
from stillhouse.train.teaching import by_teacher


@dataclass(frozen=True)
class Method:
    """The scheduled parts of a method; in each step schedules become plain numbers."""

    responses: ResponsesConfig
    objective: Objective
    normalise: Normalise

    @property
    def tree(self) -> dict[str, Any]:
        """The parts by the path at which a schedule within them is known."""
        return {"responses": self.responses, "objective": self.objective}


@dataclass
class TrainingClock:
    """The optimiser step of the student's weights, which versions what they generate."""

    step: int = 0


@dataclass
class Step:
    """Prepares the micro-batches of an optimiser step and computes their losses."""

    method: Method
    """Objective, response policy and normalisation, with schedules."""
    policy: ResponsePolicy
    """The running response policy."""
    teachers: Mapping[str, AnyTeacher]
    """The running teachers by name; those whose log-probabilities the objective needs."""
    pad_id: int
    """Fills the right of shorter sequences."""
    vocab: int
    """Number of token ids that student and teachers share."""
    translator: Translator | None = None
    """Between the two tokenizers, where the main teacher's differs."""
    world: World = field(default_factory=SingleProcess)
    """Other processes."""
    text: Callable[[int, int], list[Response]] | None = None
    """(optimiser step, how many) -> plain-text sequences that are added to each step."""
    hidden_cache: TeacherHiddenCache = field(default_factory=TeacherHiddenCache)
    """The policy's; the main teacher's hidden states of responses that are trained on again."""
    metrics: MetricAccumulator = field(default_factory=MetricAccumulator)
    clock: TrainingClock = field(default_factory=TrainingClock)
    """Set in `prepare`; what generates with the student's weights reads their version from it."""
    fused: FusedConfig = field(default_factory=FusedConfig)
    """Memory budget and precision of the loss over the language-model head."""
    head_dtype: torch.dtype | None = None
    """What the products of the head are computed in; None: the precision of its weights and the states."""
    micro_batch_tokens: int | None = None
    """Tokens that one micro-batch may have; None: the trainer says how many micro-batches there are."""
    packed: bool = False
    """Whether the student reads its sequences without padding, which the budget of tokens then leaves out."""

    def __post_init__(self) -> None:
        self.schedules = ScheduleTracker(self.method.tree)
        needed = self.method.objective.requirements()
        self._paired = "pairs" in needed.rows
        self._records_gaps = "likelihood_gaps" in needed.batch_statistics
        self.last_loss = 0.0
        """Of the last finished step, over all processes; nats."""
        self.tokens = 0
        """Response tokens that this process has trained on."""
        self.generating = False
        """Whether responses are drawn just now: giving the step up changes nothing but its metrics."""
        self._metrics_before: MetricAccumulator | None = None
        self._signals = TeacherSignals(self.teachers, self.hidden_cache, self.metrics)
        self._beside = SideStream()
        self._ahead: tuple[MicroBatch, Pending[TeacherOutputs]] | None = None
        """A micro-batch about which the teachers are asked already."""

    def prepare(
        self, prompts: Sequence[Prompt], progress: Progress, num_micro: int, num_new: int | None = None
    ) -> PreparedStep:
        """Once for each optimiser step: responses, micro-batches and the weight of every token.

        Args:
            prompts: this rank's prompts of the step.
            progress: steps done before this one.
            num_micro: so many micro-batches are made; fewer if there are fewer sequences. A budget of tokens
                makes as many as it needs instead.
            num_new: where the last step of an epoch has fewer prompts than the others: so many of `prompts`
                are this step's, and the others, which fill up the batches of all processes, are not answered
                or trained on.
        """
        new = prompts[:num_new]
        self.clock.step, self._ahead = progress.step, None
        now = self.schedules.resolve(self.method.tree, progress)
        objective: Objective = each_objective(now["objective"], lambda one: one.at(progress))
        self._metrics_before, self.generating = self.metrics.copy(), True
        with self.metrics.seconds("generate"):
            drawn = self.policy.draw(now["responses"], new, progress)
        self.generating = False
        groups: list[list[Response]] = drawn
        if not self._paired:
            groups = [[response] for group in drawn for response in group]
        if self.text is not None:
            groups = [*groups, *([block] for block in self.text(progress.step, len(new)))]
        if num_new is not None:
            groups = self._filled_up(groups, len(prompts))
        batches = [collate(part, self.pad_id) for part in self._split(groups, num_micro)]
        weights = token_weights(batches, groups_of(objective), self.method.normalise, self.world.add)
        micro = [self._micro_batch(objective, *one) for one in zip(batches, weights, strict=True)]
        self._count(batches, progress)
        with self.metrics.seconds("teacher"):
            for name, teacher in self.teachers.items():
                prefetch(teacher, name, micro, self.hidden_cache)
        return PreparedStep(progress, objective, tuple(micro))

    def with_batch_statistics(self, model: nn.Module, prepared: PreparedStep) -> PreparedStep:
        """Between `prepare` and the first loss: the step with the statistics that its objective needs.

        Student and teachers run on all micro-batches without gradients or dropout; the step is returned as it
        is where the objective needs none.
        """
        if "mean_likelihood_gaps" not in prepared.objective.requirements().batch_statistics:
            return prepared
        training, gaps = model.training, []
        model.eval()
        with torch.no_grad():
            for one in prepared.micro_batches:
                device = _device_of(model)
                found = self._asked(one, device).taken()
                micro = found.micro
                with self.metrics.seconds("batch_statistics"):  # the teacher's seconds count as its own
                    models, _ = self._compared(model, found)
                    with self._head_precision(device):
                        facts = fused_label_facts(
                            micro.objective, *models, rows=micro.rows, config=self.fused
                        )
                    gaps.append(SequenceGaps.of(facts, gap_teacher(micro.objective), micro.batch.responses))
        model.train(training)
        means = gap_means(gaps, self.world.add)
        return prepared.with_objective(
            each_objective(prepared.objective, lambda objective: objective.with_batch_statistics(means))
        )

    def loss(self, model: nn.Module, micro: MicroBatch, following: MicroBatch | None = None) -> StepLoss:
        """Once for each micro-batch: its part of the step's loss, without waiting for the device.

        The sum over micro-batches and ranks is the loss; it is multiplied by the number of ranks, because
        data-parallel training averages gradients over them.

        Args:
            model: the student.
            micro: one of the step's.
            following: the one that comes next, about which the teachers are asked beside the student's pass.
        """
        device = _device_of(model)
        found = self._answer(micro, following, device)
        micro, objective, gaps = found.micro, micro.objective, None
        with self.metrics.seconds("student"):
            models, student_layers = self._compared(model, found)
            rows = micro.rows
            with self._head_precision(device):
                if self._records_gaps:
                    rows = fused_label_facts(objective, *models, rows=rows, config=self.fused)
                    gaps = SequenceGaps.of(rows, gap_teacher(objective), micro.batch.responses)
                loss, values = fused_rows(
                    objective, *models, token_weight=micro.token_weight, rows=rows, config=self.fused
                )
            if objective.depths:
                with torch.autocast(loss.device.type, enabled=False):
                    more = objective.per_layers(student_layers, found.layers, rows)
                loss = loss + (more * micro.token_weight).sum()
                values = values + more.detach()
        self.metrics.add("tokens/student", float(micro.batch.num_tokens))
        value = loss.detach()
        metrics = _loss_by_source(objective, values, rows) | by_teacher(objective, micro.batch, rows, values)
        return StepLoss(loss * self.world.size, value, metrics, gaps)

    def check_finite(self, prepared: PreparedStep, losses: Sequence[StepLoss]) -> None:
        """Before the weights change.

        Raises:
            TrainingError: a loss of the step is not finite.
        """
        total = _total(losses)
        if not torch.isfinite(total):
            raise TrainingError(
                f"the loss became {total.item()} (objective {prepared.objective.name}). No weights were "
                "changed by this step. Usual causes: train.lr too high, train.clip 0, or float16 weights; "
                "try a tenth of train.lr, or student.dtype: float32."
            )

    def finish(self, prepared: PreparedStep, losses: Sequence[StepLoss]) -> None:
        """Once after each optimiser step, before anything is saved: metrics, and what schedules follow."""
        for one in losses:
            self.metrics.update(one.metrics)
        self.last_loss = _total(losses).item()
        if self.world.size > 1:
            self.last_loss = self.world.add(torch.tensor(self.last_loss, dtype=torch.float64)).item()
        for teacher in self._following().values():
            teacher.follow(prepared.progress.step + 1)
        self.metrics.add_mean("loss", self.last_loss, 1)
        self.observe("train_loss", self.last_loss, prepared.progress)
        gaps = [one.gaps for one in losses if one.gaps is not None]
        for name, mean in gap_means(gaps, self.world.add).items() if gaps else ():
            self.observe(name, mean, prepared.progress)
            self.metrics.add_mean(f"gap/{name.removesuffix('_gap')}", mean, 1)

    def close(self) -> list[str]:
        """Once at the end: close the teachers' files and connections; returns their closing remarks."""
        lines = [(name, teacher.close()) for name, teacher in self.teachers.items()]
        return [
            line if name == MAIN else f"teachers.{name}: {line}" for name, line in lines if line is not None
        ]

    def give_up(self) -> None:
        """Go back to before the step whose responses are being drawn."""
        assert self._metrics_before is not None
        self.generating = False
        self.metrics.replace(self._metrics_before)

    def observe(self, name: str, value: float, progress: Progress) -> None:
        """Pass a measurement to the schedules: "dev_loss", "train_loss", "teacher_gap", "student_gap"."""
        self.schedules.observe(name, value, progress)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs besides the trainer's weights, optimiser and random states."""
        return {
            "schedules": self.schedules.state_dict(),
            "policy": self.policy.state_dict(),
            "metrics": self.metrics.state_dict(),
            "teachers": {name: one.state_dict() for name, one in self._following().items()},
        }

    def dealt_out(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What this process has to load, from the states of all of another number of processes.

        The first one goes on with what all of them have measured.
        """
        measured = [state["metrics"] for state in states] if self.world.rank == 0 else []
        return {
            **states[0],
            "policy": self.policy.dealt_out([state["policy"] for state in states]),
            "metrics": over_processes(measured).state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave.

        Raises:
            TrainingError: the state is of another version of Stillhouse.
        """
        missing = {"schedules", "policy", "metrics", "teachers"} - state.keys()
        if missing:
            raise TrainingError(
                "The checkpoint was written by another version of Stillhouse: it lacks "
                + ", ".join(sorted(missing))
                + ". Resume with the version named in environment.json of the run, or train anew."
            )
        self.schedules.load_state_dict(state["schedules"])
        self.policy.load_state_dict(state["policy"])
        self.metrics.load_state_dict(state["metrics"])
        for name, teacher in self._following().items():
            teacher.load_state_dict(state["teachers"][name])

    def _following(self) -> dict[str, FollowingTeacher]:
        """The teachers that move with the student, by the first of the names of each."""
        found: dict[str, FollowingTeacher] = {}
        for name, teacher in self.teachers.items():
            if isinstance(teacher, FollowingTeacher) and not any(one is teacher for one in found.values()):
                found[name] = teacher
        return found

    def _filled_up(self, groups: list[list[Response]], count: int) -> list[list[Response]]:
        """At least so many groups, those that are missing as copies of one without weight in the loss."""
        copied = next(share[0] for share in self.world.gather(groups[:1]) if share)
        repeated = [replace(response, repeated=True) for response in copied]
        return [*groups, *[repeated] * (count - len(groups))]

    def _split(self, groups: Sequence[Sequence[Response]], num_micro: int) -> list[list[Response]]:
        if self.micro_batch_tokens is None:
            return split(groups, num_micro, by_length=True)
        return split_by_tokens(groups, self.micro_batch_tokens, packed=self.packed, agree=self._agreed)

    def _agreed(self, needed: int, groups: int) -> int:
        """The same number of micro-batches on all ranks: sharded models speak to each other in every pass."""
        found = self.world.gather((needed, groups))
        return min(max(most for most, _ in found), *(least for _, least in found))

    def _micro_batch(self, objective: Objective, batch: Batch, weight: Tensor) -> MicroBatch:
        """A batch with the weight of each position, and what the main teacher reads."""
        token_weight = weight.flatten()[batch.row_positions]
        rows = replace(batch.rows(), loss_mask=(token_weight != 0).numpy())
        slots: tuple[int, ...] = ()
        if self.hidden_cache:
            slots = tuple(self.hidden_cache.slot(response) for response in batch.responses)
        read: dict[str, TokenBatch] = {
            name: read_by_teacher(batch, self.pad_id, name) for name in self.teachers if name != MAIN
        }
        if self.translator is None:
            read[MAIN] = read_by_teacher(batch, self.pad_id)
            if MAIN in self.teachers:
                rows = replace(rows, alignment=alignment_with(batch, read[MAIN]))
        else:
            read[MAIN], alignment = self.translator.teacher_batch(batch.responses)
            rows = replace(rows, alignment=alignment)
        own = {name: one for name, one in read.items() if one is not batch}
        return MicroBatch(objective, batch, rows, token_weight, own, slots)

    def _asked(self, micro: MicroBatch, device: torch.device) -> Pending[TeacherOutputs]:
        """What the teachers say about a micro-batch, on its way beside the student's pass."""
        return self._beside.run(lambda: self._signals.of(micro.to(device)), device)

    def _answer(
        self, micro: MicroBatch, following: MicroBatch | None, device: torch.device
    ) -> TeacherOutputs:
        """What the teachers say about a micro-batch; they go on to the following one."""
        ahead, self._ahead = self._ahead, None
        pending = ahead[1] if ahead is not None and ahead[0] is micro else self._asked(micro, device)
        found = pending.taken()
        if following is not None:
            self._ahead = following, self._asked(following, device)
        return found

    def _head_precision(self, device: torch.device) -> AbstractContextManager[Any]:
        """What the products of the head are computed in."""
        if self.head_dtype is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.head_dtype)

    def _compared(
        self, model: nn.Module, found: TeacherOutputs
    ) -> tuple[tuple[Tensor, ModelHead, Mapping[str, ModelSignal]], Layers]:
        """Hidden states and head of the student, and what its teachers say; and the student's layers."""
        micro = found.micro
        layers: Layers = {}
        if micro.objective.depths:
            hidden, layers = layer_rows(model, micro.batch, micro.objective.depths)
        else:
            hidden = hidden_rows(model, micro.batch)
        return (hidden, head_of(model, self.vocab).whole(), found.signals), layers

    def _count(self, batches: Sequence[Batch], progress: Progress) -> None:
        """What the metrics log shows of the step's responses, schedules and tokens."""
        responses = [one for batch in batches for one in batch.responses if not one.repeated]
        for source in SOURCES if responses else ():
            share = sum(response.source == source for response in responses) / len(responses)
            if share or source in self.method.responses.sources():
                self.metrics.add_mean(f"responses/{source}", share, 1)
        rewards = [response.reward for response in responses if response.reward is not None]
        if rewards:
            self.metrics.add_mean("responses/reward", sum(rewards), len(rewards))
        ages = [progress.step - r.student_version for r in responses if r.student_version is not None]
        if ages:
            self.metrics.add_mean("responses/student_age", float(sum(ages)), len(ages))
        values = self.schedules.values(progress)
        for name, value in {
            **self.policy.metrics(),
            **{f"schedule/{path}": value for path, value in values.items()},
        }.items():
            self.metrics.add_mean(name, value, 1)
        if self.translator is not None:
            for name, (total, count) in self.translator.metrics().items():
                self.metrics.add_mean(name, total, count)
        counts = [
            rows
            for batch in batches
            for rows, one in zip(batch.row_counts, batch.responses, strict=True)
            if not one.repeated
        ]
        tokens = int(sum(counts))
        self.tokens += tokens
        self.metrics.add("tokens", float(tokens))
        self.metrics.add("sequences", float(len(counts)))


def _total(losses: Sequence[StepLoss]) -> Tensor:
    """This process's part of the step's loss, in fp64 and still on the device."""
    return sum((one.value.double() for one in losses), start=torch.zeros(()))


def groups_of(objective: Objective) -> dict[str, tuple[int, float]]:
    """source -> (number of its mean, loss weight): sources under one objective share a mean.

    The weights within a map are part of its values already; here counts the weight of the whole.
    """
    apart = objective.sources
    numbers = dict.fromkeys(SOURCES, 0) if apart is None else {source: n for n, source in enumerate(apart)}
    return {source: (number, float(objective.loss_weight)) for source, number in numbers.items()}


def _loss_by_source(objective: Objective, values: Tensor, rows: Rows) -> dict[str, Metric]:
    """The mean value of the tokens of each source, without the weight that a map's values hold."""
    assert rows.sources is not None
    found = {}
    for code in np.unique(rows.sources).tolist():
        source = SOURCES[code]
        weight = objective.source_weight(source)
        if weight:
            trained = rows.sources == code
            if rows.loss_mask is not None:
                trained = trained & rows.loss_mask
            chosen = RowIndex.of(np.flatnonzero(trained)).pick(values)
            found[f"loss/{source}"] = Metric(chosen.sum().double() / weight, "mean", chosen.shape[0])
    return found


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
