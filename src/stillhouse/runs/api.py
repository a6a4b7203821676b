"""`stillhouse.run`: a run or a chain from Python."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillhouse.errors import ConfigError, Fault
from stillhouse.runs.resolve import is_chain, resolve
from stillhouse.runs.result import Result


def run(
    source: str | Path | Mapping[str, Any],
    *,
    resume: bool = False,
    start_from: str | Path | None = None,
    redo: str | None = None,
    until: str | None = None,
    **overrides: Any,
) -> Result:
    """Distil as a YAML file or a dictionary says: one run, or a chain of them (`stages`).

    Args:
        source: a YAML file, or the same as a dictionary.
        resume: continue the run in the folder from its newest complete checkpoint; of a chain, leave finished
            stages as they are.
        start_from: a finished run whose student this new one starts from; not for a chain.
        redo: of a chain, the stage to make anew with all that follow from it.
        until: of a chain, the stage to end after.
        **overrides: values that lie over those of the source: `train={"lr": 1e-4}`, or with a dotted name
            `**{"train.lr": 1e-4}`.

    Returns:
        The run folder and the metrics; of a chain those of its last stage, and all stages by name.

    Raises:
        StillhouseError: configuration, data, models or machine are not as needed; the message says what.

    Example:
        >>> result = stillhouse.run("run.yaml", train={"epochs": 2.0})
        >>> result.metrics["rouge_l"]
    """
    chained = is_chain(source)
    refuse_options_of_other(chained, start_from=start_from, redo=redo, until=until)
    if chained:
        from stillhouse.runs.chains.resolve import resolve_chain

        chain = resolve_chain(source, overrides)
        from stillhouse.runs.chains.execute import run_chain

        return run_chain(chain, resume=resume, redo=redo, until=until)
    resolved = resolve(source, overrides, start_from=start_from)
    from stillhouse.runs.execute import execute  # with all that trains: after what may be refused

    return execute(resolved, resume=resume)


def refuse_options_of_other(chain: bool, *, start_from: Any, redo: Any, until: Any) -> None:
    """Refuse options of a chain for a run, and of a run for a chain.

    Raises:
        ConfigError: naming each.
    """
    if chain:
        hint = "Name it where a stage starts: student: {path: ...}."
        faults = [Fault("--from", "is for a single run, and this is a chain", str(start_from), hint=hint)]
        faults = faults if start_from is not None else []
    else:
        given = {"--redo": redo, "--until": until}
        problem = "is for a chain, and this file has no stages"
        faults = [Fault(name, problem, str(value)) for name, value in given.items() if value is not None]
    if faults:
        raise ConfigError(*faults)
