"""From YAML, recipe and overrides to one checked configuration with the origin of every value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stillhouse import recipes
from stillhouse.config import (
    Dropped,
    Layer,
    Layered,
    class_at,
    dotted,
    flatten,
    kind_of,
    to_yaml,
    validate,
    walk,
)
from stillhouse.config.strict_yaml import KeyPath
from stillhouse.core.requirements import MAIN
from stillhouse.core.types import SOURCES
from stillhouse.engines import Sampling
from stillhouse.errors import ConfigError, Fault, ModelError
from stillhouse.files import locate
from stillhouse.models.paths import is_run, resolve_path
from stillhouse.runs import inert
from stillhouse.runs.config import RunConfig

ROWS: frozenset[KeyPath] = frozenset(
    {("data", "train"), ("data", "valid"), ("data", "text"), ("evaluate", "data")}
)
"""Where a bare text is the path of a set of rows; elsewhere it is the kind of a part."""
CONTEXT = ("data", "teacher_context")
"""A text alone is short for that of the main teacher."""
OBJECTIVE: KeyPath = ("objective",)
STARTS = ("path", "gguf_file", "tokenizer", "from_teacher", "from_config")
"""What a configuration may say about where the student starts."""
SAMPLING: KeyPath = ("engine", "sampling")
STAGES = "stages"
"""What a file has that is a chain of runs (`runs/chains`)."""
RECIPE = "recipe "
"""How the origin of a recipe's values begins."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A configuration, and where each of its values comes from.

    Example: `resolve("run.yaml", ["train.lr=1e-4"]).provenance["train.lr"]["origin"]  # "command line"`
    """

    config: RunConfig
    provenance: dict[str, dict[str, Any]]
    yaml: str
    notes: tuple[str, ...] = ()
    """What a user should know of the values: those that a change of kind dropped, those without effect."""


def resolve(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    start_from: str | Path | None = None,
) -> Resolved:
    """Put the layers on top of each other and check the result: default < recipe < file < overrides.

    Args:
        source: a YAML file, or its content as a dictionary.
        overrides: `a.b=value` texts of the command line, or keyword values of a Python call.
        start_from: a finished run whose student this one starts from, whatever the layers say of the start.

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    layers = given_layers(source, overrides)
    refuse_chain(layers)
    return resolve_layers(layers, None if start_from is None else partial(_start_from, str(start_from)))


def is_chain(source: str | Path | Mapping[str, Any]) -> bool:
    """Whether a YAML file, or the same as a dictionary, has stages.

    Raises:
        ConfigError: the file cannot be read.
    """
    return STAGES in given_layers(source)[0].values


def is_reward_run(source: Path) -> bool:
    """Whether a YAML file is one of `stillhouse reward`: it names the model that is trained, and no student.

    Raises:
        ConfigError: the file cannot be read.
    """
    values = Layer.read(source).values
    return "model" in values and not values.keys() & {"student", "teacher", "recipe", "objective"}


def refuse_chain(layers: Sequence[Layer]) -> None:
    """Refuse what says `stages` where one run is asked for.

    Raises:
        ConfigError: it does.
    """
    if any(STAGES in layer.values for layer in layers):
        raise ConfigError(
            Fault(
                STAGES,
                "this file is a chain of several runs, and one run is asked for",
                hint="stillhouse run and stillhouse check take a chain; others its stages' folders, or a "
                "file without stages.",
            )
        )


def given_layers(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()
) -> list[Layer]:
    """What a user gives: the file or dictionary, and the values that lie over it. See `resolve`."""
    given = Layer.of(source, "dictionary") if isinstance(source, Mapping) else Layer.read(source)
    if isinstance(overrides, Mapping):
        return [given, Layer.keywords(overrides)]
    return [given, Layer.joined([Layer.override(text) for text in overrides])]


def resolve_layers(layers: Sequence[Layer], rewrite: Callable[[Layered], None] | None = None) -> Resolved:
    """As `resolve`, from the layers themselves.

    Args:
        layers: the first has the lowest precedence; a recipe that they name lies beneath all.
        rewrite: changes the merged values before they are checked.

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    layered = _stacked(layers)
    name = layered.values.get("recipe")
    if name is not None:
        if not isinstance(name, str):
            raise ConfigError(Fault("recipe", "must be the name of a method", got=repr(name)))
        recipe = recipes.find(name)
        layered = _stacked([Layer.read(recipe.path, f"{RECIPE}{recipe.name}"), *layers])
    _prefer_the_users_sampling(layered)
    _name_default_kinds(layered)
    if rewrite is not None:
        rewrite(layered)
    config, origins = validate(RunConfig, layered)
    config = _with_limits(config, origins)
    values = flatten(config)
    provenance = {path: {"value": values[path], "origin": origin} for path, origin in origins.items()}
    told = (
        *map(_told, layered.dropped),
        *inert.notes(config, provenance, RECIPE),
        *inert.same_models(config),
    )
    return Resolved(config, provenance, to_yaml(config), told)


def _told(dropped: Dropped) -> str:
    was = f"{dotted(dropped.path)}={dropped.value} ({dropped.origin})"
    owner = f"kind {dropped.kind}" if dropped.kind else "another form of it"
    return f"{was} is dropped: it belongs to {owner}, and {dropped.because} says {dropped.by}"


def _prefer_the_users_sampling(layered: Layered) -> None:
    """`engine.sampling` is the default of every sampling of the responses: the user's values there beat
    a recipe's values here."""
    engine = _mapping(_mapping(layered.values.get("engine")).get("sampling"))
    own = {key: origin for key in engine if not _of_recipe(origin := layered.origin((*SAMPLING, key)) or "")}

    def visit(value: Any, path: KeyPath) -> Any:
        if isinstance(value, list):
            return [visit(item, (*path, index)) for index, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        result = {key: visit(item, (*path, key)) for key, item in value.items()}
        origins = {key: layered.origin((*path, key)) or "" for key in result}
        if not str(path[-1]).endswith("sampling") or not any(map(_of_recipe, origins.values())):
            return result
        for key, origin in own.items():
            follows = key not in result and key != "max_tokens"  # a length limit follows it anyway
            if follows or _of_recipe(origins.get(key, "")):
                result[key] = engine[key]
                layered.origins[(*path, key)] = origin
        return result

    if own and "responses" in layered.values:
        layered.values["responses"] = visit(layered.values["responses"], ("responses",))


def _of_recipe(origin: str) -> bool:
    return origin.startswith(RECIPE)


def _same_option(
    values: Layered, path: KeyPath, below: Mapping[str, Any], above: Mapping[str, Any], name: str
) -> bool:
    """Whether both kinds have an option of this name with the same type and range."""
    old = class_at(RunConfig, path, _with(values.values, path, below))
    new = class_at(RunConfig, path, _with(values.values, path, above))
    if old is None or new is None:
        return False
    one, other = old.model_fields.get(name), new.model_fields.get(name)
    if one is None or other is None:
        return False
    return one.annotation == other.annotation and one.metadata == other.metadata


def _with(values: Any, path: KeyPath, inner: Any) -> Any:
    """`values` with what is at `path` replaced."""
    if not path:
        return inner
    return {**_mapping(values), path[0]: _with(_mapping(values).get(str(path[0])), path[1:], inner)}


def _start_from(run: str, layered: Layered) -> None:
    """The student of a run in place of whatever the layers start from."""
    try:
        finished = is_run(locate(run)) and resolve_path(run)
    except ModelError as error:
        raise ConfigError(Fault("--from", str(error))) from error
    if not finished:
        raise ConfigError(
            Fault("--from", "is not the folder of a run", got=run, hint="Give a folder such as runs/kd.")
        )
    student = _mapping(layered.values.get("student"))
    kept = {name: value for name, value in student.items() if name not in STARTS}
    layered.values["student"] = {**kept, "path": run}
    layered.origins[("student", "path")] = "--from"


def _name_default_kinds(layered: Layered) -> None:
    """Options without a kind, such as `engine.batch_size=128`, are those of the part that is the default."""
    for name, info in RunConfig.model_fields.items():
        kind, options = getattr(info.default, "kind", None), layered.values.get(name)
        if kind is not None and isinstance(options, Mapping) and "kind" not in options:
            layered.values[name] = {"kind": kind, **options}
            layered.origins[(name, "kind")] = "default"


def _with_limits(config: RunConfig, origins: dict[str, str]) -> RunConfig:
    """The length limit of each sampling that sets none, written out, so that the resolved file says all."""
    own = config.engine.sampling
    written = own.max_tokens if "max_tokens" in own.model_fields_set else config.data.max_response

    def visit(path: str, value: Any) -> Any:
        if not isinstance(value, Sampling) or "max_tokens" in value.model_fields_set:
            return value
        follows = path.startswith("responses.")
        origins[f"{path}.max_tokens"] = "engine.sampling.max_tokens" if follows else "data.max_response"
        limit = written if follows else config.data.max_response
        return value.model_copy(update={"max_tokens": limit})

    limited: RunConfig = walk(config, visit)
    return limited


def _stacked(layers: Sequence[Layer]) -> Layered:
    """All layers merged; a short form (`train: rows.jsonl`, `objective: jsd`) takes options from above."""
    layered = Layered()
    layered.fits = partial(_same_option, layered)
    for layer in map(partial(_kinds_named, layered), layers):
        layered.values = _spelled_out(layered.values, layer.values, (), layered.origins)
        layered.add(layer)
    return layered


def _kinds_named(below: Layered, layer: Layer) -> Layer:
    """The layer with a bare kind (`responses: on_policy`) as a mapping where there is one below it."""
    origins = dict(layer.origins)

    def visit(value: Any, path: KeyPath, lower: Any) -> Any:
        if isinstance(value, dict):
            inner = _mapping(lower)
            return {key: visit(item, (*path, key), inner.get(key)) for key, item in value.items()}
        if path == CONTEXT and isinstance(value, str) and isinstance(lower, dict):
            origins[(*path, MAIN)] = origins[path]
            return {MAIN: value}
        if not isinstance(value, str) or "kind" not in _mapping(lower) or path in ROWS:
            return value
        named = class_at(RunConfig, path, _with(below.values, path, {"kind": value}))
        if named is None or kind_of(named) != value:
            return value
        origins[(*path, "kind")] = origins[path]
        return {"kind": value}

    return Layer(visit(layer.values, (), below.values), origins)


def _spelled_out(
    below: dict[str, Any], above: Mapping[str, Any], path: KeyPath, origins: dict[KeyPath, str]
) -> dict[str, Any]:
    """`below` with each text that a mapping of `above` would replace turned into a mapping itself."""
    spelled = dict(below)
    for key, upper in above.items():
        here, lower = (*path, key), below.get(key)
        if not isinstance(upper, Mapping):
            continue
        name = "path" if here in ROWS else MAIN if here == CONTEXT else "kind"
        if here == OBJECTIVE and "kind" in _mapping(lower) and upper.keys() & set(SOURCES) - {"kind"}:
            spelled[key] = {}  # a map from source to objective takes the place of a single objective
        elif isinstance(lower, str) and name not in upper and "kind" not in upper:
            spelled[key] = {name: lower}
            origins[(*here, name)] = origins[here]
        elif isinstance(lower, dict):
            spelled[key] = _spelled_out(lower, upper, here, origins)
    return spelled


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
