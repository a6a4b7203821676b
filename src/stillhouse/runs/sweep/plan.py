"""From a sweep's file to its runs: every combination resolved and checked before the first one starts."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillhouse.config import Layer, Layered, dotted, validate
from stillhouse.config.layers import COMMAND_LINE, OF_THE_SWEEP
from stillhouse.config.strict_yaml import KeyPath
from stillhouse.config.trees import plain
from stillhouse.config.writing import dump
from stillhouse.console.format import setting_text
from stillhouse.console.text import each_text_once, filtered_records
from stillhouse.errors import ConfigError, Fault, StillhouseError
from stillhouse.runs.checks import check_length, preflight
from stillhouse.runs.config import RunConfig
from stillhouse.runs.estimate import estimate
from stillhouse.runs.resolve import Resolved, given_layers, refuse_chain, resolve_layers
from stillhouse.runs.sweep.config import RangeConfig, SweepConfig
from stillhouse.runs.sweep.folder import SweepFolder
from stillhouse.runs.sweep.origins import configuration_key
from stillhouse.runs.sweep.sharing import with_shared_signal

logger = logging.getLogger("stillhouse")

SEED = "train.seed"
ALIKE = ("name", "output", "train.seed", "train.lr", "train.schedule", "train.warmup", "train.weight_decay")
"""What the size of a run does not depend on."""
LONGEST_NAME = 120
"""Characters of a run's name, whose folder has to be possible everywhere."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the things that an axis can be.

    Example: `Choice("method", "KD", {"recipe": "kd"}, "sweep.yaml:4")`
    """

    axis: str
    label: str
    values: Mapping[str, Any]
    """Dotted name of a field -> its value."""
    origin: str

    @property
    def short(self) -> str:
        """As a part of a name: `KD`, `seed-1`, `lr-0.001`."""
        plain_name = self.axis == "recipe" or list(self.values) != [self.axis]
        return slug(self.label if plain_name else f"{self.axis.rpartition('.')[2]}-{self.label}")


@dataclass(frozen=True, slots=True)
class Combination:
    """One choice of each axis."""

    choices: tuple[Choice, ...]

    @property
    def name(self) -> str:
        """The name of its run; the seed stands last, so that what seeds share is the name of them all."""
        ordered = sorted(self.choices, key=lambda choice: choice.axis == SEED)
        return "-".join(choice.short for choice in ordered)[:LONGEST_NAME].rstrip("-._")

    @property
    def labels(self) -> dict[str, str]:
        """Axis -> its value, as tables and records show it."""
        return {choice.axis: choice.label for choice in self.choices}


@dataclass(frozen=True, slots=True)
class Member:
    """One run of a sweep."""

    name: str
    labels: dict[str, str]
    """Axis -> its value, as tables and records show it."""
    resolved: Resolved
    size: Mapping[str, Any] = field(default_factory=dict)
    """What `stillhouse check` says of it."""


@dataclass
class Refusals:
    """What the checks refused: each fault with the runs that have it."""

    by_fault: dict[str, list[str]] = field(default_factory=dict)
    names: dict[str, dict[str, str]] = field(default_factory=dict)
    """Run -> its choices."""

    def add(self, name: str, labels: dict[str, str], error: StillhouseError) -> None:
        """Note what is wrong with one run."""
        self.names[name] = labels
        faults = error.faults if isinstance(error, ConfigError) else (error,)
        for fault in faults:
            self.by_fault.setdefault(str(fault), []).append(name)

    def lines(self, runs: int) -> list[str]:
        """Each fault once, with the runs that it is in."""
        return [f"{fault} ({_in_runs(names, runs)})" for fault, names in self.by_fault.items()]


class SweepPlan:
    """A sweep's file with the origin of each value, and the runs that follow from it."""

    def __init__(
        self, source: str | Path | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()
    ) -> None:
        """Read and check the file; the runs are made by `member`.

        Args:
            source: the YAML file of a sweep, or its content as a dictionary.
            overrides: `name=value` texts, or keyword values: of the sweep, or with `run.` before them of the
                run that all have in common.

        Raises:
            ConfigError: everything that is wrong with the sweep's own values.
        """
        texts = overrides if not isinstance(overrides, Mapping) else ()
        words = overrides if isinstance(overrides, Mapping) else {}
        own = [_override(text) for text in texts if not text.startswith("run.")]
        own += [Layer.keywords({k: v}) for k, v in words.items() if not k.startswith("run.")]
        of_run = [Layer.override(text.removeprefix("run.")) for text in texts if text.startswith("run.")]
        of_run += [Layer.keywords({k[4:]: v}) for k, v in words.items() if k.startswith("run.")]
        layered = Layered.merged(*given_layers(source), *own)
        self.config, _ = validate(SweepConfig, layered)
        self.folder = SweepFolder(self.config.place)
        layer = Layer(layered.values, layered.origins)
        base = layer.below("run") if isinstance(self.config.run, dict) else Layer.read(self.config.run)
        self._base = [base, *of_run]
        refuse_chain(self._base)
        self._sizes: dict[str, Mapping[str, Any]] = {}
        self.axes = _axes(self.config, layered.origins)
        self.ranges = {path: one for path, one in self.config.values.items() if isinstance(one, RangeConfig)}

    def grid(self) -> list[Combination]:
        """Every combination of the listed values, the last axis changing fastest."""
        return [Combination(choices) for choices in itertools.product(*self.axes.values())]

    def each_value_once(self) -> list[Combination]:
        """Combinations in which each listed value and both ends of each range occur, the others at their
        first: what can be checked of a search before it draws."""
        ends = {
            path: [Choice(path, setting_text(v), {path: v}, OF_THE_SWEEP) for v in (one.low, one.high)]
            for path, one in self.ranges.items()
        }
        axes = self.axes | ends
        first = {axis: choices[0] for axis, choices in axes.items()}
        found = [tuple(first.values())]
        found += [tuple((first | {axis: one}).values()) for axis, all in axes.items() for one in all[1:]]
        return [Combination(choices) for choices in found]

    def member(self, combination: Combination, name: str | None = None) -> Member:
        """The run of a combination.

        Raises:
            StillhouseError: its values do not fit together, or a file is missing.
        """
        name = name or combination.name
        own = {"name": name, "output.folder": str(self.folder.run(name))}
        if self.config.share.text:
            own["output.shared"] = str(self.folder.shared)
        layers = [
            Layer.at(path, v, one.origin) for one in combination.choices for path, v in one.values.items()
        ]
        layers += [Layer.at(path, value, OF_THE_SWEEP) for path, value in own.items()]
        quiet = Layer.at("output.report", False, OF_THE_SWEEP)  # the sweep has one page
        base = Layer.joined([quiet, *self._base])
        resolved = resolve_layers([base, Layer.joined(layers)])
        if self.config.share.signal:
            resolved = with_shared_signal(resolved, self.folder.shared / "teacher-cache")
        preflight(resolved.config)
        _judged(self.config, resolved.config)
        return Member(name, combination.labels, resolved, self._size(resolved.config))

    def members(self, combinations: Iterable[Combination]) -> tuple[list[Member], Refusals]:
        """The runs of all combinations, and what the checks refused.

        Raises:
            ConfigError: a value makes no difference, so that two runs would be the same.
        """
        found: list[Member] = []
        refused = Refusals()
        with filtered_records(each_text_once()):
            for combination, name in _named(combinations):
                try:
                    found.append(self.member(combination, name))
                except StillhouseError as error:
                    refused.add(name, combination.labels, error)
        _all_different(found)
        return found, refused

    def _size(self, config: RunConfig) -> Mapping[str, Any]:
        """What `stillhouse check` says of a run; runs that differ in seed or learning rate alone are asked
        once.

        Raises:
            StillhouseError: data or models cannot be read, or do not fit.
        """
        key = configuration_key(config, ALIKE)
        if key not in self._sizes:
            found = estimate(config)
            for note in check_length(config, found["prompts"]):
                logger.warning(note)
            self._sizes[key] = found
        return self._sizes[key]

    def notes(self) -> list[str]:
        """What the run that all have in common says in vain."""
        base = Layer.joined(self._base)
        return [
            f"run.{dotted(path)} ({base.origins[path]}) has no effect: each run of a sweep has its own"
            for path in (("name",), ("output", "folder"))
            if path in base.origins
        ]

    def as_yaml(self) -> str:
        """The sweep with all of its values, the run included."""
        return dump({**plain(self.config), "run": Layer.joined(self._base).values})


def slug(text: str) -> str:
    """Letters, digits, dots and dashes of a text, for the name of a folder."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or "none"


def _override(text: str) -> Layer:
    """`a.b=value`; what follows `values.` is the name of one field, dots and all."""
    path, equals, value = text.partition("=")
    if not path.startswith("values.") or not equals:
        return Layer.override(text)
    parsed = Layer.override(f"value={value}").values["value"]
    return Layer.of({"values": {path.removeprefix("values."): parsed}}, COMMAND_LINE)


def _axes(config: SweepConfig, origins: Mapping[KeyPath, str]) -> dict[str, list[Choice]]:
    """Axis -> what it can be; ranges are none."""
    found: dict[str, list[Choice]] = {}
    for word, named in config.variants.items():
        found[word] = [
            Choice(word, label, values, origins.get(("variants", word, label), OF_THE_SWEEP))
            for label, values in named.items()
        ]
    for path, given in config.values.items():
        if isinstance(given, RangeConfig):
            continue
        if not all(path.split(".")):
            raise ConfigError(Fault(f"values.{path}", "is no dotted name of a field, such as train.lr"))
        found[path] = [
            Choice(path, setting_text(value), {path: value}, _origin(origins, path, place))
            for place, value in enumerate(given)
        ]
        labels = [choice.label for choice in found[path]]
        if twice := [label for place, label in enumerate(labels) if label in labels[:place]]:
            raise ConfigError(Fault(f"values.{path}", "is listed twice", got=twice[0]))
    return found


def _origin(origins: Mapping[KeyPath, str], path: str, place: int) -> str:
    return origins.get(("values", path, place), OF_THE_SWEEP)


def _named(combinations: Iterable[Combination]) -> list[tuple[Combination, str]]:
    """Each with a name of its own."""
    found: dict[str, Combination] = {}
    for combination in combinations:
        names = itertools.chain([combination.name], (f"{combination.name}-{n}" for n in itertools.count(2)))
        found[next(name for name in names if name not in found)] = combination
    return [(combination, name) for name, combination in found.items()]


def _all_different(members: Sequence[Member]) -> None:
    """Refuse two runs with the same configuration: the value that tells them apart has no effect."""
    seen: dict[str, Member] = {}
    for member in members:
        same = seen.setdefault(
            configuration_key(member.resolved.config, ("name", "output", "recipe")), member
        )
        if same is not member:
            axes = [axis for axis, label in member.labels.items() if same.labels[axis] != label]
            raise ConfigError(
                Fault(
                    " and ".join(axes),
                    f"makes no difference: {same.name} and {member.name} would be the same run",
                    hint="Take one of the two values away, or what the run's own file says: its values lie "
                    "above those of a recipe.",
                )
            )


def metric_of(sweep: SweepConfig, run: RunConfig) -> str:
    """What a run is judged by on data.valid."""
    return sweep.metric or (run.train.best_by if run.train.validate_rouge else "loss")


def _judged(sweep: SweepConfig, run: RunConfig) -> None:
    """Refuse a run that cannot be judged where the search has to.

    Raises:
        ConfigError: it is not validated, or not by this metric.
    """
    if not sweep.judged:
        return
    who = "search: optuna" if sweep.search.kind == "optuna" else "stop_early"
    if run.data.valid is None or run.train.validate_every == "never":
        hint = "Set data.valid and train.validate_every."
        raise ConfigError(Fault("data.valid", f"{who} judges runs by their validation", hint=hint))
    if metric_of(sweep, run) == "rouge_l" and not run.train.validate_rouge:
        raise ConfigError(
            Fault("metric", "rouge_l is not measured with train.validate_rouge: false", allowed="loss")
        )


def _in_runs(names: Sequence[str], runs: int) -> str:
    if len(names) == runs:
        return f"in all {runs} runs" if runs > 1 else f"in {names[0]}"
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"in {len(names)} of {runs} runs: {shown}"
