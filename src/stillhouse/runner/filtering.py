"""Filters over stage files, outside any training: what is kept, what is dropped and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stillhouse import console
from stillhouse.curate.filters.base import Around, Drop, Filter
from stillhouse.curate.judging import judge, needs_of
from stillhouse.curate.reading import files_of_round
from stillhouse.curate.samples import Sample, digest_of
from stillhouse.curate.scoring import mean_logprobs
from stillhouse.curate.stages import Stage, header, read_header, read_rows
from stillhouse.data.prompts import parse_source
from stillhouse.errors import ConfigError, DataError, Fault
from stillhouse.files import STAGE, write_jsonl
from stillhouse.models import TeacherModel, load_teacher
from stillhouse.responses.base import derived_seed

Key = tuple[str, int]
"""(id of the prompt, number of the sample)."""


@dataclass(frozen=True)
class Result:
    """What became of the rows.

    Example: `Result(asked=9, kept=7, counts=[("teacher", "empty", "empty", 2)], done_before=False)`
    """

    asked: int
    """Prompts (pairs, where there are two sides)."""
    kept: int
    counts: list[tuple[str, str, str, int]]
    """(side, filter, reason, how many responses)."""
    done_before: bool


def parse_filters(texts: Sequence[str]) -> list[Filter]:
    """Filters as the command line gives them: a name, or YAML such as `{kind: overlap, n: 8}`.

    Raises:
        ConfigError: it is no YAML, there is no such filter, or its options are wrong.
    """
    from pydantic import TypeAdapter, ValidationError

    from stillhouse.config.strict_yaml import parse_value
    from stillhouse.curate.filters import FilterField

    found, faults = [], []
    adapter: TypeAdapter[Any] = TypeAdapter(FilterField)
    for text in texts:
        try:
            found.append(adapter.validate_python(parse_value(text)))
        except ValidationError as error:
            faults += [
                Fault("--filter", f"{'.'.join(map(str, one['loc']))} {one['msg']}".strip(), got=text)
                for one in error.errors()
            ]
    if faults:
        raise ConfigError(*faults)
    return found


def curate(
    paths: Sequence[Path],
    filters: Sequence[Filter],
    output: Path,
    *,
    held_out: Sequence[str] = (),
    teacher: TeacherModel | None = None,
) -> Result:
    """Pass the rows of stage files through filters, into `output` and, with reasons, OUTPUT.dropped.jsonl.

    Rows for the same prompt that stand on the teacher's and the student's side are a pair: both are dropped
    if one of them is.

    Raises:
        Stale: `output` was made in another way.
        DataError: a file cannot be read.
        ConfigError: a filter needs something that was not given.
    """
    sides = read_sides(paths)
    _check_needs(filters, held_out, sides, teacher)
    head = header(
        "curated",
        filters=[one.model_dump(mode="json") for one in filters],
        held_out=derived_seed(0, *sorted(held_out)) if held_out else None,
        sides={name: digest_of(side) for name, side in sides.items()},
    )
    away = output.with_name(f"{output.stem}.dropped.jsonl")
    stage = Stage(output, head)
    asked = len({key for side in sides.values() for key in map(_key, side)})
    done = stage.rows()
    if done is not None:
        return _done_before(done, away, asked)
    sides = {name: _scored(side, filters, name, teacher) for name, side in sides.items()}
    drops = _judged(sides, filters, held_out)
    kept = [s.row() for side in sides.values() for s in side if _key(s) not in drops]
    rows = [
        {**sample.row(), "dropped": drops[_key(sample)]}
        for side in sides.values()
        for sample in side
        if _key(sample) in drops
    ]
    write_jsonl(away, [{STAGE: {**head, "stage": "dropped"}}, *rows])
    write_jsonl(output, [{STAGE: head}, *kept])
    return Result(asked, asked - len(drops), _counts(drops), False)


def read_sides(paths: Sequence[Path]) -> dict[str, list[Sample]]:
    """The samples of files (of a run folder, its newest round), by the side on which they stand.

    Raises:
        DataError: there is nothing, or a prompt twice on a side.
    """
    files: list[Path] = []
    for path in paths:
        files += [found[0] for found in files_of_round(path)[1].values()] if path.is_dir() else [path]
    sides: dict[str, list[Sample]] = {}
    for path in files:
        if not path.is_file():
            raise DataError(f"{path}: no such file or run folder")
        for sample in _samples(path):
            sides.setdefault(sample.response.source, []).append(sample)
    for name, side in sides.items():
        key, count = Counter(map(_key, side)).most_common(1)[0]
        if count > 1:
            raise DataError(f"prompt {key[0]}: {count} responses of the same number on the {name}'s side")
    if not sides:
        raise DataError(f"{', '.join(map(str, paths))}: hold no rows")
    return sides


def _samples(path: Path) -> list[Sample]:
    """The rows of a stage file, or of plain JSON Lines with prompt and response."""
    source = parse_source(str(path))
    if path.suffix == ".jsonl":
        first = path.read_bytes().split(b"\n", 1)[0]
        if f'"{STAGE}"'.encode() in first and read_header(path) is not None:
            return [Sample.of(row) for row in read_rows(path)]
    found = []
    for number, row in enumerate(source.rows(Counter())):
        if row.response is None:
            raise DataError(f"{row.where}: has no response to judge")
        raw = {
            "number": number,
            "id": f"{path.stem}:{number + 1}",
            "by": "data",
            **row.question(),
            "response": row.response,
            "references": list(row.references),
            "facts": dict(row.facts),
        }
        found.append(Sample.of(raw))
    return found


def _key(sample: Sample) -> Key:
    return sample.response.prompt.id, sample.index


def _check_needs(
    filters: Sequence[Filter],
    held_out: Sequence[str],
    sides: Mapping[str, Sequence[Sample]],
    teacher: TeacherModel | None,
) -> None:
    for one in filters:
        if "held_out" in one.needs and not held_out and getattr(one, "against", None) is None:
            raise ConfigError(
                Fault(
                    f"--filter {one.kind}",
                    "has nothing to compare with",
                    hint="Name the evaluation sets: --held-out FILE, or --like RUN.YAML.",
                )
            )
    if "teacher_logprob" not in needs_of(filters) or teacher is not None:
        return
    unscored = sum("teacher" not in s.scores for side in sides.values() for s in side if not s.missing)
    if unscored:
        raise ConfigError(
            Fault(
                "--teacher",
                f"{unscored} responses have no likelihood under the teacher, which a filter needs",
                hint="Name the teacher, or write the file with --score.",
            )
        )


def _scored(
    samples: list[Sample], filters: Sequence[Filter], side: str, teacher: TeacherModel | None
) -> list[Sample]:
    """The samples with the teacher's likelihood, where a filter needs it and it is not there."""
    wanted = "teacher_logprob" in needs_of([one for one in filters if one.sides in ("all", side)])
    places = [p for p, s in enumerate(samples) if "teacher" not in s.scores and not s.missing]
    if not wanted or not places or teacher is None:
        return samples
    without = [samples[p].response.prompt.id for p in places if not samples[p].response.token_ids]
    if without:
        raise DataError(f"{without[0]}: has no token ids to measure a likelihood of; `generate` writes some.")
    model = load_teacher(teacher)
    scored = list(samples)
    with console.progress("Measuring likelihoods", total=len(places)) as bar:
        for start in range(0, len(places), 64):
            some = places[start : start + 64]
            values = mean_logprobs(model, [samples[p].response for p in some], pad_id=0)
            for place, value in zip(some, values, strict=True):
                scored[place] = replace(samples[place], scores={**samples[place].scores, "teacher": value})
            bar.advance(len(some))
    return scored


def _judged(
    sides: Mapping[str, list[Sample]], filters: Sequence[Filter], held_out: Sequence[str]
) -> dict[Key, list[dict[str, Any]]]:
    """Why each dropped prompt is dropped."""
    found: dict[Key, list[dict[str, Any]]] = {}
    partners = {name: {_key(sample): sample for sample in side} for name, side in sides.items()}
    for name, side in sides.items():
        other = next((partners[key] for key in partners if key != name), {})
        numbered = [replace(sample, number=place) for place, sample in enumerate(side)]
        beside = {s.number: other[_key(s)] for s in numbered if _key(s) in other}
        around = Around(lambda: held_out, beside)
        side_of_pair = name if len(sides) > 1 else None
        for place, (kind, drop) in judge(numbered, filters, around, side_of_pair).dropped.items():
            found.setdefault(_key(side[place]), []).append(_told(name, kind, drop))
    if {"teacher", "student"} <= sides.keys():
        for name, there in partners.items():
            for key in set().union(*partners.values()) - there.keys():
                found.setdefault(key, []).append(_told(name, "missing", Drop("no response")))
    return found


def _told(side: str, kind: str, drop: Drop) -> dict[str, Any]:
    return {"side": side, "filter": kind, "reason": drop.reason, "detail": drop.detail}


def _counts(drops: Mapping[Key, Sequence[Mapping[str, Any]]]) -> list[tuple[str, str, str, int]]:
    counts = Counter((d["side"], d["filter"], d["reason"]) for told in drops.values() for d in told)
    return [(*key, count) for key, count in counts.items()]


def _done_before(kept: Sequence[Mapping[str, Any]], away: Path, asked: int) -> Result:
    rows = list(read_rows(away)) if away.exists() else []
    drops = {(row["id"], row.get("sample", 0)): row["dropped"] for row in rows}
    return Result(asked, len({(row["id"], row.get("sample", 0)) for row in kept}), _counts(drops), True)
