"""The shards of `stillhouse generate` and `stillhouse curate` as tasks of Ray Data."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from stillhouse import console
from stillhouse.errors import DataError, EnvironmentFault, StillhouseError, listed
from stillhouse.locks import only_one_writes
from stillhouse.models import TeacherModel
from stillhouse.rollouts.offline.filter_files import FilterResult, filter_files
from stillhouse.rollouts.offline.filters import Filter
from stillhouse.rollouts.offline.merging import merge_shards
from stillhouse.runs.config import RunConfig
from stillhouse.runs.generate import GenerateArguments, GenerateResult, generate, written_result
from stillhouse.runs.servers import teacher_text_server
from stillhouse.signals import handled, stop
from stillhouse.urls import is_remote

RETRIES = 3
"""How often Ray begins a shard again whose worker has died; it goes on from what was saved."""
_NAMED = 8
"""Shards that a message names."""

logger = logging.getLogger("stillhouse")


def generate_on_ray(config: RunConfig, arguments: GenerateArguments) -> GenerateResult:
    """Generate with a task of Ray for each of `arguments.shards`.

    Raises:
        EnvironmentFault: Ray is not installed or has too few GPUs, or a shard failed.
        DataError: a shard cannot use its input or what is there of the output.
    """
    arguments = replace(arguments, output=_anywhere(arguments.output))
    on_server = arguments.by == "teacher" and teacher_text_server(config) is not None
    done = _run_shards(
        partial(_generate_shard, config, arguments),
        arguments.output,
        arguments.shards,
        gpus=0 if on_server else config.engine.gpus,
    )
    return written_result(arguments.output, done[0].total, min(one.resumed for one in done))


def filter_on_ray(
    paths: Sequence[Path],
    filters: Sequence[Filter],
    output: Path,
    *,
    held_out: Sequence[str] = (),
    teacher: TeacherModel | None = None,
    shards: int,
) -> FilterResult:
    """`filter_files` with a task of Ray for each shard.

    Raises:
        EnvironmentFault: Ray is not installed, or a shard failed.
        DataError: a shard cannot use its input or what is there of the output.
    """
    output = _anywhere(output)
    check = partial(filter_files, paths, filters, output, held_out=held_out, teacher=teacher)
    write = partial(_check_shard, check, shards)
    done: list[FilterResult] = _run_shards(write, output, shards, gpus=int(teacher is not None))
    return next((one for one in done if one.finished), None) or check()


def _generate_shard(config: RunConfig, arguments: GenerateArguments, index: int) -> GenerateResult:
    return generate(config, replace(arguments, shard=index))


def _check_shard(check: Callable[..., FilterResult], shards: int, index: int) -> FilterResult:
    return check(shard=(index, shards))


def _anywhere(output: Path) -> Path:
    return output if is_remote(output) else output.absolute()


def _run_shards(write: Callable[[int], Any], output: Path, shards: int, gpus: int) -> list[Any]:
    """What `write` returns for each shard, once all are written and joined.

    The cluster is that of RAY_ADDRESS, or this machine. A shard that fails leaves the others alone.

    Args:
        write: writes the shard of this number, or what is left of it.
        output: the file of all shards.
        shards: how many there are.
        gpus: how many a shard takes, where there are any.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise EnvironmentFault("--ray needs ray. Install it with: pip install 'stillhouse[ray]'") from None
    done: dict[int, _Done] = {}
    with _cluster(ray), handled(stop):
        task: Any = _Task(write, output, shards, str(Path.cwd()))
        rows = _results(ray, task, shards, _gpus_of(ray, gpus))
        told: set[str] = set()
        with console.progress(f"Shards of {output.name}", total=shards) as bar:
            for row in rows:
                one: _Done = pickle.loads(row["done"])
                done[int(row["shard"])] = one
                for text in dict.fromkeys(one.warnings):
                    if text not in told:
                        logger.warning("%s", text)
                told.update(one.warnings)
                bar.advance(1)
    died = _Done(problem=f"its worker died {RETRIES + 1} times, as for want of memory; Ray's logs say more")
    failed = {n: one for n in range(shards) if (one := done.get(n, died)).problem}
    if failed:
        raise _failure(failed, shards)
    merge_shards(output)  # nothing is left of it, unless a store showed the shards too late to all of them
    return [done[index].result for index in sorted(done)]


def _results(ray: Any, task: Any, shards: int, gpus: int) -> Iterator[dict[str, Any]]:
    """The answers of the tasks, as they end."""
    numbers = ray.data.range(shards, override_num_blocks=shards)
    with warnings.catch_warnings():  # Ray will end the one way to say how often it tries, and names no other
        warnings.filterwarnings("ignore", "`ray_remote_args_fn` is deprecated")
        mapped = numbers.map_batches(
            task,
            batch_size=1,
            num_gpus=gpus or None,
            max_calls=1 if gpus else None,  # a worker that ends has left its GPU to the next shard
            ray_remote_args_fn=partial(dict, max_retries=RETRIES),  # by default it tries for ever
        )
    answers: Iterator[dict[str, Any]] = mapped.iter_rows()
    return answers


@dataclass(frozen=True)
class _Done:
    """What came of a shard."""

    result: Any = None
    problem: str = ""
    by_user: bool = False
    """Whether the user's input is what is wrong."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Task:
    """What Ray Data calls on the number of a shard, in a process of its own."""

    write: Callable[[int], Any]
    output: Path
    shards: int
    folder: str
    """Where relative paths begin."""

    def __call__(self, batch: Mapping[str, Sequence[int]]) -> dict[str, list[Any]]:
        """Write the shard; a failure is an answer, as Ray Data would end all shards for an exception."""
        with contextlib.suppress(FileNotFoundError):  # on another machine the paths may all be absolute
            os.chdir(self.folder)
        (index,) = map(int, batch["id"])
        result, problem, by_user = None, "", False
        with _warnings() as told:
            try:
                with only_one_writes(self.output, f".{index}-of-{self.shards}"):
                    result = self.write(index)
            except StillhouseError as error:
                problem, by_user = str(error), error.exit_code == StillhouseError.exit_code
            except Exception as error:  # noqa: BLE001 - of an engine, a device, a disk: others go on
                traceback.print_exc()  # into Ray's logs
                problem = f"{type(error).__name__}: {error}"
        return {"shard": [index], "done": [pickle.dumps(_Done(result, problem, by_user, tuple(told)))]}


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """The warnings within the block."""
    texts: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    handler = Collector(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield texts
    finally:
        logger.removeHandler(handler)


def _failure(failed: Mapping[int, _Done], shards: int) -> StillhouseError:
    """An error that says which shards failed, why, and how they are resumed."""
    kind = DataError if all(one.by_user for one in failed.values()) else EnvironmentFault
    by_problem: dict[str, list[int]] = {}
    for index, one in sorted(failed.items()):
        by_problem.setdefault(one.problem, []).append(index)
    if len(failed) == shards and len(by_problem) == 1:
        return kind(f"--ray: every shard failed: {next(iter(by_problem))}")
    problems = [f"shard {_names(which, shards)}: {problem}" for problem, which in by_problem.items()]
    first = min(failed)
    return kind(
        f"--ray: {len(failed)} of {shards} shards failed, the others are kept:\n{listed(problems)}\n"
        f"Run the command again: it resumes what failed alone. Without Ray: --shard {first}/{shards}"
        f"{' and so on' if len(failed) > 1 else ''} instead of --ray {shards}."
    )


def _names(indices: Sequence[int], shards: int) -> str:
    named = ", ".join(f"{index}/{shards}" for index in indices[:_NAMED])
    return named if len(indices) <= _NAMED else f"{named} and {len(indices) - _NAMED} more"


def _gpus_of(ray: Any, gpus: int) -> int:
    """The GPUs that a task asks for: none where the cluster has none.

    Raises:
        EnvironmentFault: no machine has as many, and Ray would wait for one.
    """
    machines = [node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]]
    most = int(max(machines, default=0))
    if 0 < most < gpus:
        raise EnvironmentFault(
            f"--ray: a shard takes {gpus} GPUs of one machine (engine), and the largest machine has {most}."
        )
    return gpus if most else 0


@contextlib.contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    """A cluster: the one that is connected, or one that is left, or ended, with the block."""
    connected = ray.is_initialized()
    if not connected:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise EnvironmentFault(f"--ray: no cluster: {error}") from error
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.max_errored_blocks
    context.enable_progress_bars, context.max_errored_blocks = False, -1
    log = logging.getLogger("ray.data")
    level = log.level
    log.setLevel(logging.CRITICAL)  # what fails is said by `_failure`
    try:
        yield
    finally:
        log.setLevel(level)
        context.enable_progress_bars, context.max_errored_blocks = before
        if not connected:
            ray.shutdown()
