"""From a YAML file with `stages:` to the checked configuration of every stage."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stillhouse.config import Layer, Layered, dotted, nearest
from stillhouse.config.strict_yaml import KeyPath
from stillhouse.errors import ConfigError, Fault
from stillhouse.files import ROWS_FILE
from stillhouse.runs.chains.conversions import CONVERSIONS, conversion_stage
from stillhouse.runs.chains.data_stages import data_stage
from stillhouse.runs.chains.references import References
from stillhouse.runs.chains.sections import SECTIONS
from stillhouse.runs.chains.stages import Stage, TrainingStage
from stillhouse.runs.config import RunConfig
from stillhouse.runs.resolve import STAGES, STARTS, given_layers, resolve_layers

CHAIN = "chain"
"""The origin of what follows from the chain: the folders of its stages."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
OF_THE_CHAIN: tuple[KeyPath, ...] = (("name",), ("output", "folder"), ("output", "report"))
"""Shared values that are the chain's own, and not those of each stage."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Stages in order. Example: `resolve_chain("chain.yaml").stages[0].name  # "warm"`"""

    name: str
    folder: Path
    """Each stage has the folder of its name in it."""
    stages: tuple[Stage, ...]
    report: bool = True
    """Write report.html about all stages at the end."""
    notes: tuple[str, ...] = ()
    """What a user should know of the values: those without effect, those that a change of kind dropped."""

    def folder_of(self, stage: str) -> Path:
        """The run folder of a stage."""
        return self.folder / stage

    def following(self, stage: str) -> tuple[str, ...]:
        """The stages that start from this one, directly or through others, in order."""
        found = {stage}
        for one in self.stages:
            if found & set(one.after):
                found.add(one.name)
        return tuple(one.name for one in self.stages if one.name in found and one.name != stage)


def resolve_chain(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Chain:
    """Check every stage: default < recipe < shared values < the stage's own < overrides.

    Args:
        source: a YAML file with `stages`, or its content as a dictionary.
        overrides: as `stillhouse.runs.resolve.resolve` has them; a name such as `stages.distil.train.lr` is
            for one stage, `train.lr` for all.

    Raises:
        ConfigError: everything that is wrong in all stages, at once.
    """
    given, upper = given_layers(source, overrides)
    names = _names(given, upper)
    shared = [_without(layer, STAGES) for layer in (given, upper)]
    _refuse_unknown_keys(shared)
    folder, name, report = _of_the_chain(shared)
    values = {
        stage: Layered.merged(*(_below(layer, (STAGES, stage)) for layer in (given, upper))).values
        for stage in names
    }
    leaves = {stage: ROWS_FILE for stage, own in values.items() if SECTIONS.keys() & own.keys()}
    stages: list[Stage] = []
    set_here: dict[str, frozenset[str]] = {}
    faults: list[tuple[str, Fault | str]] = []
    for stage in names:
        own = [_below(layer, (STAGES, stage)) for layer in (given, upper)]
        set_here[stage] = frozenset(dotted(path) for layer in own for path in layer.origins)
        try:
            stages.append(_stage(stage, names, leaves, folder, shared, own))
        except ConfigError as error:
            faults += [(stage, fault) for fault in error.faults]
    if faults:
        raise ConfigError(*_once(faults))
    return Chain(name, folder, tuple(stages), report, tuple(_notes(stages, set_here)))


def _names(given: Layer, upper: Layer) -> list[str]:
    """The stages in order.

    Raises:
        ConfigError: there is none, one has no values, or a name cannot be that of a folder.
    """
    stages = given.values.get(STAGES)
    origin = given.origins.get((STAGES,))
    if not isinstance(stages, Mapping) or not stages:
        raise ConfigError(
            Fault(
                STAGES,
                "needs the stages by name, in order",
                hint="Such as stages: {warm: {recipe: sft, ...}, distil: {student: {path: stage:warm}, ...}}",
                origin=origin,
            )
        )
    faults = []
    for name, values in stages.items():
        path, origin = f"{STAGES}.{name}", given.origins.get((STAGES, name))
        if not NAME.fullmatch(name):
            problem = "the name of a stage is that of its folder: letters, digits, and . _ - behind the first"
            faults.append(Fault(path, problem, got=name, origin=origin))
        elif not isinstance(values, Mapping):
            faults.append(Fault(path, "needs values, such as recipe: sft", origin=origin))
    for name in upper.values.get(STAGES) or {}:
        if name not in stages:
            problem = f"no stage is called {name!r}{nearest(name, list(stages))}"
            origin = upper.origins.get((STAGES, name))
            faults.append(Fault(f"{STAGES}.{name}", problem, allowed=", ".join(stages), origin=origin))
    if faults:
        raise ConfigError(*faults)
    return list(stages)


def _refuse_unknown_keys(shared: Sequence[Layer]) -> None:
    if faults := _unknown_keys(shared, [*RunConfig.model_fields, STAGES]):
        raise ConfigError(*faults)


def _unknown_keys(layers: Sequence[Layer], known: list[str]) -> list[Fault]:
    return [
        Fault(
            key,
            f"unknown key{nearest(key, known)}",
            allowed=", ".join(known),
            origin=layer.origins.get((key,)),
        )
        for layer in layers
        for key in layer.values
        if key not in known
    ]


def _of_the_chain(shared: Sequence[Layer]) -> tuple[Path, str, bool]:
    """Folder, name and whether there is to be a page; taken out of what the stages share.

    Raises:
        ConfigError: one of them has another type.
    """
    found: dict[KeyPath, Any] = {}
    faults = []
    for index, layer in enumerate(shared):
        for path in OF_THE_CHAIN:
            value, rest = _taken(layer.values, path)
            if value is _NOTHING:
                continue
            shared[index].values.clear()
            shared[index].values.update(rest)
            wanted = bool if path[-1] == "report" else str | Path
            if not isinstance(value, wanted) or (path == ("name",) and not NAME.fullmatch(str(value))):
                told = "true or false" if wanted is bool else "a name" if path == ("name",) else "a path"
                faults.append(
                    Fault(
                        ".".join(map(str, path)),
                        f"must be {told}",
                        repr(value),
                        origin=layer.origins.get(path),
                    )
                )
            found[path] = value
    if faults:
        raise ConfigError(*faults)
    name = str(found.get(("name",), CHAIN))
    return (
        Path(found.get(("output", "folder")) or Path("runs") / name),
        name,
        found.get(("output", "report"), True),
    )


def _stage(
    name: str,
    names: Sequence[str],
    leaves: Mapping[str, str],
    folder: Path,
    shared: Sequence[Layer],
    own: Sequence[Layer],
) -> Stage:
    references = References(folder, names, name, leaves)
    given = [key for layer in own for key in layer.values]
    sections = [key for key in (*CONVERSIONS, *SECTIONS) if key in given]
    faults = _unknown_keys(own, [*RunConfig.model_fields, *CONVERSIONS, *SECTIONS])
    for layer in own:
        if _taken(layer.values, ("output", "folder"))[0] is not _NOTHING:
            origin = layer.origins.get(("output", "folder"))
            hint = "Set output.folder of the chain."
            faults.append(
                Fault(
                    "output.folder",
                    f"a stage has its folder in the chain's: {folder / name}",
                    hint=hint,
                    origin=origin,
                )
            )
    if faults:
        raise ConfigError(*faults)
    beneath = Layer.of({"name": name, "output": {"report": False}}, CHAIN)
    above = Layer.of({"output": {"folder": str(folder / name)}}, CHAIN)
    starts = any(
        isinstance(layer.values.get("student"), Mapping) and set(layer.values["student"]) & set(STARTS)
        for layer in own
    )
    common = [_without_start(shared[0]) if starts else shared[0], shared[1]]
    layers = [beneath, common[0], own[0], common[1], own[1], above]
    if sections:
        made = data_stage if sections[0] in SECTIONS else conversion_stage
        return made(sections[0], layers, own, name, references)
    resolved = resolve_layers(layers, references.put)
    return TrainingStage(name, folder / name, tuple(references.found), resolved=resolved)


def _without_start(layer: Layer) -> Layer:
    """Shared values without where the student starts, for a stage that says it itself."""
    student = layer.values.get("student")
    if not isinstance(student, Mapping):
        return layer
    kept = {key: value for key, value in student.items() if key not in STARTS}
    return Layer({**layer.values, "student": kept}, layer.origins)


def _without(layer: Layer, key: str) -> Layer:
    values = {name: value for name, value in layer.values.items() if name != key}
    return Layer(values, {path: origin for path, origin in layer.origins.items() if path[:1] != (key,)})


def _below(layer: Layer, path: KeyPath) -> Layer:
    """The values at a path as a layer of their own; empty if there are none."""
    values: Any = layer.values
    for key in path:
        values = values.get(key, {}) if isinstance(values, Mapping) else {}
    depth = len(path)
    origins = {at[depth:]: origin for at, origin in layer.origins.items() if at[:depth] == path}
    return Layer(dict(values) if isinstance(values, Mapping) else {}, origins)


_NOTHING = object()


def _taken(values: Mapping[str, Any], path: KeyPath) -> tuple[Any, dict[str, Any]]:
    """The value at a path, and the values without it."""
    key, *rest = path
    if not isinstance(values, Mapping) or key not in values:
        return _NOTHING, dict(values)
    kept = {name: value for name, value in values.items() if name != key}
    if not rest:
        return values[str(key)], kept
    inner = values[str(key)]
    if not isinstance(inner, Mapping):
        return _NOTHING, dict(values)
    found, inside = _taken(inner, tuple(rest))
    return found, {**kept, str(key): inside}


def _once(faults: Sequence[tuple[str, Fault | str]]) -> list[Fault | str]:
    """Faults with their stage in the path; one of a shared value, which several stages have, is once."""
    plain = [fault for _, fault in faults]
    found: list[Fault | str] = []
    for stage, fault in faults:
        if plain.count(fault) > 1:
            one: Fault | str = fault
        elif isinstance(fault, Fault):
            one = replace(fault, path=f"{STAGES}.{stage}.{fault.path}")
        else:
            one = f"{STAGES}.{stage}: {fault}"
        if one not in found:
            found.append(one)
    return found


def _notes(stages: Sequence[Stage], own: Mapping[str, frozenset[str]]) -> list[str]:
    """What is told of the values; of a shared one without effect only where no stage makes use of it.

    Args:
        stages: all stages.
        own: the paths that each sets itself.
    """
    told: list[str] = []
    training = [stage for stage in stages if isinstance(stage, TrainingStage)]
    counted = [note for stage in training for note in stage.notes]
    for stage in stages:
        for note in stage.notes:
            if note.partition("=")[0] in own[stage.name]:
                told.append(f"{STAGES}.{stage.name}.{note}")
            elif counted.count(note) == len(training):
                told.append(note)
    return list(dict.fromkeys(told))
