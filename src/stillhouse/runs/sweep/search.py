"""Which run comes next, and which is stopped early: a grid in its order, or trials that Optuna suggests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stillhouse.config.layers import OF_THE_SWEEP
from stillhouse.console.format import setting_text
from stillhouse.core.seeds import derived_seed
from stillhouse.errors import EnvironmentFault, StillhouseError
from stillhouse.files import read_jsonl_leniently
from stillhouse.runs.sweep.config import OptunaConfig, SweepConfig
from stillhouse.runs.sweep.plan import (
    Choice,
    Combination,
    Member,
    Refusals,
    SweepPlan,
    metric_of,
)


class Search(Protocol):
    """Where the runs of a sweep come from."""

    total: int
    """How many there are."""

    def next(self) -> Member | None:
        """The next run; None: there is none left."""
        ...

    def stops(self, member: Member, rows: Sequence[Validated]) -> bool:
        """Whether a run that has been validated so is stopped."""
        ...

    def ended(self, member: Member, rows: Sequence[Validated], early: bool) -> None:
        """A run has come to its end, or was stopped early."""
        ...


@dataclass(frozen=True, slots=True)
class Validated:
    """A validation of a run. Example: `Validated(150, 31.2)`"""

    step: int
    value: float


def validations(member: Member, metric: str) -> list[Validated]:
    """What a run has been validated with so far, but for the one before its training."""
    path = Path(str(member.resolved.config.output.folder)) / "metrics.jsonl"
    found, _ = read_jsonl_leniently(path)
    rows = [row for row in found if row.get("phase") == "valid" and row.get("step", 0) > 0]
    return [Validated(row["step"], float(row[metric])) for row in rows if row.get(metric) is not None]


def kept_value(member: Member, rows: Sequence[Validated], lower: bool) -> float | None:
    """The validation of the weights that a run keeps: its best, or its last."""
    if not rows:
        return None
    if member.resolved.config.train.keep == "last":
        return rows[-1].value
    return (min if lower else max)(row.value for row in rows)


class GridSearch:
    """The runs of a grid in their order."""

    def __init__(self, sweep: SweepConfig, members: Sequence[Member], finished: Sequence[Member]) -> None:
        """Go through the runs.

        Args:
            sweep: decides whether runs are stopped early.
            members: those that have not come to their end.
            finished: those that have, which others are judged by.
        """
        self.total = len(members) + len(finished)
        self._waiting = list(members)
        self._trials: _Trials | None = None
        if sweep.stop_early is not None and (members or finished):
            run = (*members, *finished)[0].resolved.config
            self._trials = _Trials(sweep, metric_of(sweep, run), None)
            for member in finished:
                self.ended(member, validations(member, self._trials.metric), early=False)

    def next(self) -> Member | None:
        """See `Search`."""
        return self._waiting.pop(0) if self._waiting else None

    def stops(self, member: Member, rows: Sequence[Validated]) -> bool:
        """See `Search`."""
        return self._trials is not None and self._trials.stops(self._trials.ask(member.name), rows)

    def ended(self, member: Member, rows: Sequence[Validated], early: bool) -> None:
        """See `Search`."""
        if self._trials is not None:
            self._trials.tell(self._trials.ask(member.name), member, rows, early)


class OptunaSearch:
    """Trials whose values Optuna suggests; what it has suggested and heard is in the sweep's folder."""

    def __init__(self, plan: SweepPlan, refused: Refusals) -> None:
        """Go on with the trials that are there.

        Args:
            plan: the sweep.
            refused: takes combinations that the checks refuse, if the sweep leaves these out.
        """
        assert isinstance(plan.config.search, OptunaConfig)
        self.total = plan.config.search.trials
        self._plan, self._refused, self._search = plan, refused, plan.config.search
        first = plan.member(plan.each_value_once()[0]).resolved.config
        self._trials = _Trials(plan.config, metric_of(plan.config, first), plan.folder.journal)
        self._waiting = self._trials.running()
        self._of_member: dict[str, Any] = {}

    def next(self) -> Member | None:
        """See `Search`: first the trials that were interrupted or have failed, then new ones."""
        while self._waiting or self._trials.count() < self.total:
            trial = self._waiting.pop(0) if self._waiting else self._trials.ask_next(self._search)
            combination = self._combination(trial)
            name = f"trial-{trial.number:03d}"
            try:
                member = self._plan.member(combination, name)
            except StillhouseError as error:
                self._trials.fail(trial)
                if not self._plan.config.skip_refused:
                    raise
                self._refused.add(name, combination.labels, error)
                continue
            self._of_member[name] = trial
            return member
        return None

    def stops(self, member: Member, rows: Sequence[Validated]) -> bool:
        """See `Search`."""
        return self._trials.stops(self._of_member[member.name], rows)

    def ended(self, member: Member, rows: Sequence[Validated], early: bool) -> None:
        """See `Search`."""
        self._trials.tell(self._of_member[member.name], member, rows, early)

    def _combination(self, trial: Any) -> Combination:
        choices = []
        for axis, listed in self._plan.axes.items():
            label = trial.suggest_categorical(axis, [choice.label for choice in listed])
            choices.append(next(choice for choice in listed if choice.label == label))
        for path, one in self._plan.ranges.items():
            whole = isinstance(one.low, int) and isinstance(one.high, int)
            suggest = trial.suggest_int if whole else trial.suggest_float
            value = suggest(path, one.low, one.high, log=one.log)
            choices.append(Choice(path, setting_text(value), {path: value}, OF_THE_SWEEP))
        return Combination(tuple(choices))


class _Trials:
    """A study of Optuna: in the sweep's folder, or in memory where its runs are given."""

    def __init__(self, sweep: SweepConfig, metric: str, journal: Path | None) -> None:
        optuna = _optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self.metric = metric
        self.lower = metric == "loss"
        rule = sweep.stop_early
        pruner = optuna.pruners.NopPruner()
        if rule is not None:
            pruner = optuna.pruners.PercentilePruner(100 * rule.worse_than, rule.runs, rule.steps)
        storage = None
        if journal is not None:
            backend = optuna.storages.journal.JournalFileBackend(str(journal))
            storage = optuna.storages.JournalStorage(backend)
        self._study = optuna.create_study(
            storage=storage,
            study_name=sweep.name,
            direction="minimize" if self.lower else "maximize",
            pruner=pruner,
            load_if_exists=True,
        )
        self._by_name: dict[str, Any] = {}
        self._reported: dict[int, int] = {}

    def count(self) -> int:
        """How many trials there are."""
        return len(self._study.trials)

    def running(self) -> list[Any]:
        """Trials that have not come to their end."""
        states = (self._optuna.trial.TrialState.RUNNING,)
        found = self._study.get_trials(deepcopy=False, states=states)
        return [self._optuna.Trial(self._study, one._trial_id) for one in found]

    def ask(self, name: str) -> Any:
        """The trial of a run that is given."""
        if name not in self._by_name:
            self._by_name[name] = self._study.ask()
        return self._by_name[name]

    def ask_next(self, search: OptunaConfig) -> Any:
        """A new trial. Its draws depend on its number and on what is known by then, not on interruptions."""
        seed = derived_seed(search.seed, "trial", self.count()) % 2**32
        samplers = self._optuna.samplers
        if search.sampler == "random":
            self._study.sampler = samplers.RandomSampler(seed=seed)
        else:
            self._study.sampler = samplers.TPESampler(
                seed=seed, n_startup_trials=search.random_trials, constant_liar=True
            )
        return self._study.ask()

    def stops(self, trial: Any, rows: Sequence[Validated]) -> bool:
        """Tell what is new, up to the validation by which the run is stopped."""
        for row in rows:
            if row.step > self._reported.get(trial.number, 0):
                self._reported[trial.number] = row.step
                trial.report(row.value, row.step)
                if trial.should_prune():
                    return True
        return False

    def tell(self, trial: Any, member: Member, rows: Sequence[Validated], early: bool) -> None:
        """The trial has come to its end."""
        states = self._optuna.trial.TrialState
        if early:
            self._study.tell(trial, state=states.PRUNED)
            return
        for row in rows:
            if row.step > self._reported.get(trial.number, 0):
                self._reported[trial.number] = row.step
                trial.report(row.value, row.step)
        value = kept_value(member, rows, self.lower)
        if value is None or not math.isfinite(value):
            self.fail(trial)
        else:
            self._study.tell(trial, value)

    def fail(self, trial: Any) -> None:
        """The trial gives no value."""
        self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)


def _optuna() -> Any:
    try:
        import optuna
        import optuna.storages.journal
    except ImportError as error:
        raise EnvironmentFault(
            "search: optuna and stop_early need Optuna. Install it with: pip install 'stillhouse[sweep]'"
        ) from error
    return optuna
