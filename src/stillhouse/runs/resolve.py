"""From YAML, recipe and overrides to one checked configuration with the origin of every value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse import recipes
from stillhouse.config import Layer, Layered, flatten, to_yaml, validate, walk
from stillhouse.config.strict_yaml import KeyPath
from stillhouse.core.types import SOURCES
from stillhouse.engines import Sampling
from stillhouse.errors import ConfigError, Fault, ModelError
from stillhouse.files import locate
from stillhouse.models.paths import is_run, resolve_path
from stillhouse.runs.config import RunConfig

ROWS: frozenset[KeyPath] = frozenset(
    {("data", "train"), ("data", "valid"), ("data", "text"), ("evaluate", "data")}
)
"""Where a bare text is the path of a set of rows; elsewhere it is the kind of a part."""
OBJECTIVE: KeyPath = ("objective",)
STARTS = ("path", "gguf_file", "tokenizer", "from_teacher", "from_config")
"""What a configuration may say about where the student starts."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A configuration, and where each of its values comes from.

    Example: `resolve("run.yaml", ["train.lr=1e-4"]).provenance["train.lr"]["origin"]  # "command line"`
    """

    config: RunConfig
    provenance: dict[str, dict[str, Any]]
    yaml: str


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
    given = Layer.of(source, "dictionary") if isinstance(source, Mapping) else Layer.read(source)
    if isinstance(overrides, Mapping):
        upper = [Layer.keywords(overrides)]
    else:
        upper = [Layer.override(text) for text in overrides]
    layered = _stacked([given, *upper])
    name = layered.values.get("recipe")
    if name is not None:
        if not isinstance(name, str):
            raise ConfigError(Fault("recipe", "must be the name of a method", got=repr(name)))
        recipe = recipes.find(name)
        layered = _stacked([Layer.read(recipe.path, f"recipe {recipe.name}"), given, *upper])
    _name_default_kinds(layered)
    if start_from is not None:
        _start_from(str(start_from), layered)
    config, origins = validate(RunConfig, layered)
    config = _with_limits(config, origins)
    values = flatten(config)
    provenance = {path: {"value": values[path], "origin": origin} for path, origin in origins.items()}
    return Resolved(config, provenance, to_yaml(config))


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
    for layer in layers:
        layered.values = _spelled_out(layered.values, layer.values, (), layered.origins)
        layered.add(layer)
    return layered


def _spelled_out(
    below: dict[str, Any], above: Mapping[str, Any], path: KeyPath, origins: dict[KeyPath, str]
) -> dict[str, Any]:
    """`below` with each text that a mapping of `above` would replace turned into a mapping itself."""
    spelled = dict(below)
    for key, upper in above.items():
        here, lower = (*path, key), below.get(key)
        if not isinstance(upper, Mapping):
            continue
        name = "path" if here in ROWS else "kind"
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
