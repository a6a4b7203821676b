"""Filters over files of responses, outside any training: `stillhouse curate`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stillhouse import console
from stillhouse.core.seeds import derived_seed
from stillhouse.data.datasets import dataset_at
from stillhouse.data.images import image_references
from stillhouse.data.reading import Reading
from stillhouse.errors import ConfigError, DataError, Fault, ModelError
from stillhouse.files import STAGE, write_jsonl
from stillhouse.models import TeacherModel, fingerprint_of_files, load_teacher, load_tokenizer
from stillhouse.rollouts.offline.curation import NO_RESPONSE, apply_filters, requirements_of
from stillhouse.rollouts.offline.filters import Drop, Filter
from stillhouse.rollouts.offline.reading import round_files
from stillhouse.rollouts.offline.samples import Sample, SampleKey, samples_digest
from stillhouse.rollouts.offline.scoring import mean_logprobs
from stillhouse.rollouts.offline.stage_files import StageFile, read_header, read_rows, stage_header

Position = tuple[str, int]
"""(source, index among its samples)."""
SCORE_CHUNK = 64
"""Responses that are scored between two saves."""


@dataclass(frozen=True)
class FilterResult:
    """How many prompts were kept, and why responses were dropped.

    Example: `FilterResult(prompts=9, kept=7, counts=[("teacher", "empty", "empty", 2)], cached=False)`
    """

    prompts: int
    """Pairs, where there are two sources."""
    kept: int
    counts: list[tuple[str, str, str, int]]
    """(source, filter, reason, how many responses)."""
    cached: bool
    """Whether the output was there already, from the same rows and filters."""


def filter_files(
    paths: Sequence[Path],
    filters: Sequence[Filter],
    output: Path,
    *,
    held_out: Sequence[str] = (),
    teacher: TeacherModel | None = None,
) -> FilterResult:
    """Pass the rows of stage files through filters, into `output` and, with reasons, OUTPUT.dropped.jsonl.

    A teacher's and a student's response to the same prompt are a pair: both are dropped if one of them is.

    Args:
        paths: stage files, JSONL with responses, or run folders (of which the newest round counts).
        filters: in order.
        output: the rows that are kept.
        held_out: texts that filters against contamination compare with.
        teacher: scores responses that have no likelihood yet.

    Raises:
        StageMismatch: `output` comes from other rows or filters.
        DataError: a file cannot be read.
        ConfigError: a filter needs something that was not given.
    """
    by_source = read_samples(paths)
    _check_held_out(filters, held_out)
    unscored = _unscored(by_source, filters)
    _check_unscored([by_source[name][place] for name, place in unscored], teacher)
    scorer = _fingerprint(teacher) if teacher is not None and unscored else None
    header = stage_header(
        "curated",
        filters=[one.model_dump(mode="json") for one in filters],
        held_out=derived_seed(0, *sorted(held_out)) if held_out else None,
        sources={name: samples_digest(samples) for name, samples in by_source.items()},
        teacher=scorer,
    )
    prompts = len({sample.key for samples in by_source.values() for sample in samples})
    done = StageFile(output, header).rows()
    if done is not None:
        return _cached(done, _dropped_path(output), prompts)
    unscored_digest = samples_digest([by_source[name][place] for name, place in unscored])
    scores = StageFile(
        output.with_name(f"{output.stem}.scores.jsonl"),
        stage_header("scores", teacher=scorer, of=unscored_digest),
    )
    if teacher is not None and unscored:
        _score(by_source, unscored, teacher, scores)
    drops = _reasons(by_source, filters, held_out)
    samples = [sample for found in by_source.values() for sample in found]
    dropped = [{**one.to_row(), "dropped": drops[one.key]} for one in samples if one.key in drops]
    kept = [one.to_row() for one in samples if one.key not in drops]
    write_jsonl(_dropped_path(output), [{STAGE: {**header, "stage": "dropped"}}, *dropped])
    write_jsonl(output, [{STAGE: header}, *kept])
    for shard in scores.shards():
        shard.unlink(missing_ok=True)
    return FilterResult(prompts, prompts - len(drops), _counts(drops), False)


def _dropped_path(output: Path) -> Path:
    return output.with_name(f"{output.stem}.dropped.jsonl")


def read_samples(paths: Sequence[Path]) -> dict[str, list[Sample]]:
    """The samples of files, by source; of a run folder, those of its newest round.

    Raises:
        DataError: there are none, or a source has the same sample of a prompt twice.
    """
    files: list[Path] = []
    for path in paths:
        files += [found[0] for found in round_files(path)[1].values()] if path.is_dir() else [path]
    by_source: dict[str, list[Sample]] = {}
    for path in files:
        if not path.is_file():
            raise DataError(f"{path}: no such file or run folder")
        for sample in _samples(path):
            by_source.setdefault(sample.response.source, []).append(sample)
    for name, samples in by_source.items():
        key, count = Counter(sample.key for sample in samples).most_common(1)[0]
        if count > 1:
            raise DataError(f"prompt {key[0]}: {count} responses of the same number from the {name}")
    if not by_source:
        raise DataError(f"{', '.join(map(str, paths))}: contain no rows")
    return by_source


def _samples(path: Path) -> list[Sample]:
    """The rows of a stage file, or of plain JSON Lines with prompt and response."""
    source = dataset_at(path)
    if path.suffix == ".jsonl":
        first = path.read_bytes().split(b"\n", 1)[0]
        if f'"{STAGE}"'.encode() in first and read_header(path) is not None:
            return [Sample.from_row(row) for row in read_rows(path)]
    found = []
    for number, row in enumerate(source.rows(Reading())):
        if not row.has_response:
            raise DataError(f"{row.location}: has no response to filter")
        raw = {
            "number": number,
            "id": f"{path.stem}:{number + 1}",
            "by": "data",
            **row.prompt_fields(),
            **({"images": image_references(row)} if row.image_values else {}),
            "response": row.references[0] if row.references else row.response,
            "references": list(row.references),
            "facts": dict(row.extra),
        }
        found.append(Sample.from_row(raw))
    return found


def samples_by_prompt(paths: Sequence[Path]) -> tuple[list[Sample], list[list[Sample]]]:
    """All responses of some files, and those to the same prompt together.

    Raises:
        DataError: a file cannot be read.
    """
    groups: dict[str, list[Sample]] = {}
    samples = [one for found in read_samples(paths).values() for one in found if not one.missing]
    for sample in map(_without_itself, samples):
        groups.setdefault(_question(sample), []).append(sample)
    return samples, list(groups.values())


def _without_itself(sample: Sample) -> Sample:
    """A response of a plain data file is no reference to be ranked by."""
    response = sample.response
    if sample.by != "data":
        return sample
    prompt = replace(response.prompt, references=())
    return replace(sample, response=replace(response, prompt=prompt))


def _question(sample: Sample) -> str:
    """What responses to the same prompt have in common, whatever file and row they are from."""
    prompt = sample.response.prompt
    return json.dumps(prompt.as_fields(), sort_keys=True, default=str)


def _check_held_out(filters: Sequence[Filter], held_out: Sequence[str]) -> None:
    for one in filters:
        needed = "evaluation_texts" in one.requirements().data
        if needed and not held_out and getattr(one, "against", None) is None:
            raise ConfigError(
                Fault(
                    f"--filter {one.kind}",
                    "has nothing to compare with",
                    hint="Name the evaluation sets: --held-out FILE, or --like RUN.YAML.",
                )
            )


def _check_unscored(unscored: Sequence[Sample], teacher: TeacherModel | None) -> None:
    if unscored and teacher is None:
        raise ConfigError(
            Fault(
                "--teacher",
                f"{len(unscored)} responses have no likelihood under the teacher, which a filter needs",
                hint="Name the teacher, or write the file with --score.",
            )
        )
    for sample in unscored:
        response = sample.response
        if not response.token_ids or not response.prompt.token_ids:
            raise DataError(
                f"{response.prompt.id}: has no token ids to score; files of `stillhouse generate` have them."
            )


def _unscored(by_source: Mapping[str, Sequence[Sample]], filters: Sequence[Filter]) -> list[Position]:
    """The samples without a likelihood under the teacher that a filter needs."""
    return [
        (name, place)
        for name, samples in by_source.items()
        if requirements_of([f for f in filters if len(by_source) == 1 or f.source in ("all", name)]).models
        for place, sample in enumerate(samples)
        if "teacher" not in sample.scores and not sample.missing
    ]


def _fingerprint(teacher: TeacherModel) -> str:
    """A digest of the teacher's files; a hub name that is not cached yet is downloaded first."""
    try:
        return fingerprint_of_files(teacher)
    except ModelError:
        load_teacher(teacher)
        return fingerprint_of_files(teacher)


def _score(
    by_source: Mapping[str, list[Sample]],
    unscored: Sequence[Position],
    teacher: TeacherModel,
    stage: StageFile,
) -> None:
    """Put the teacher's likelihood into these samples, reusing scores that an interrupted process saved.

    Raises:
        DataError: their token ids are not the teacher's.
    """
    vocab = len(load_tokenizer(teacher))
    for name, place in unscored:
        response = by_source[name][place].response
        if max(*response.prompt.token_ids, *response.token_ids) >= vocab:
            raise DataError(
                f"{response.prompt.id}: has token ids that the tokenizer of {teacher.path} does not know. "
                "Name a teacher (--teacher) with the tokenizer of the model that generated the file."
            )
    stage.rename_stale()
    scores = {number: float(row["score"]) for number, row in stage.partial_rows().items()}
    blocks = [
        range(start, min(start + SCORE_CHUNK, len(unscored)))
        for start in range(0, len(unscored), SCORE_CHUNK)
    ]
    left = [block for block in blocks if not scores.keys() >= set(block)]  # whole: rounding stays the same
    done = len(unscored) - sum(map(len, left))
    model = load_teacher(teacher) if left else None
    with console.progress("Scoring responses", total=len(unscored), done=done) as bar:
        for block in left:
            some = [by_source[name][place].response for name, place in (unscored[n] for n in block)]
            assert model is not None
            found = dict(zip(block, mean_logprobs(model, some, pad_id=0, vocab=vocab), strict=True))
            stage.append([{"number": number, "score": score} for number, score in found.items()])
            scores |= found
            bar.advance(len(some))
    for number, (name, place) in enumerate(unscored):
        sample = by_source[name][place]
        by_source[name][place] = replace(sample, scores={**sample.scores, "teacher": scores[number]})


def _reasons(
    by_source: Mapping[str, list[Sample]], filters: Sequence[Filter], held_out: Sequence[str]
) -> dict[SampleKey, list[dict[str, Any]]]:
    """Why each dropped prompt is dropped."""
    found: dict[SampleKey, list[dict[str, Any]]] = {}
    drops = apply_filters(by_source, filters, lambda: held_out, any_source=len(by_source) == 1)
    for source, places in drops.items():
        for place, drop in places.items():
            found.setdefault(by_source[source][place].key, []).append(_reason(source, drop))
    if {"teacher", "student"} <= by_source.keys():
        keys = {source: {sample.key for sample in samples} for source, samples in by_source.items()}
        for source, there in keys.items():
            for key in set().union(*keys.values()) - there:
                found.setdefault(key, []).append(_reason(source, NO_RESPONSE))
    return found


def _reason(source: str, drop: Drop) -> dict[str, Any]:
    return {"source": source, "filter": drop.filter, "reason": drop.reason, "detail": drop.detail}


def _counts(drops: Mapping[SampleKey, Sequence[Mapping[str, Any]]]) -> list[tuple[str, str, str, int]]:
    counts = Counter((d["source"], d["filter"], d["reason"]) for reasons in drops.values() for d in reasons)
    return [(*key, count) for key, count in counts.items()]


def _cached(kept: Sequence[Mapping[str, Any]], dropped_path: Path, prompts: int) -> FilterResult:
    rows = list(read_rows(dropped_path)) if dropped_path.exists() else []
    drops = {(row["id"], row.get("sample", 0)): row["dropped"] for row in rows}
    return FilterResult(
        prompts, len({(row["id"], row.get("sample", 0)) for row in kept}), _counts(drops), True
    )
