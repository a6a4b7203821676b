"""`stillhouse generate` on Ray Data: each worker has the engine of the configuration and writes a shard."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stillhouse.errors import DataError, EnvironmentFault
from stillhouse.runs.config import RunConfig
from stillhouse.runs.generate import GenerateArguments, GenerateResult, generate, written_result
from stillhouse.urls import is_remote


@dataclass(frozen=True)
class _ShardWriter:
    """What `map_batches` calls on the numbers of shards, in a process of its own."""

    config: RunConfig
    arguments: GenerateArguments
    folder: str
    """Where relative paths begin."""

    def __call__(self, batch: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Write these shards, or what is left of them."""
        with contextlib.suppress(FileNotFoundError):  # on another machine the paths may all be absolute
            os.chdir(self.folder)
        done = [generate(self.config, replace(self.arguments, shard=int(index))) for index in batch["id"]]
        return {"total": [one.total for one in done], "resumed": [one.resumed for one in done]}


def generate_on_ray(config: RunConfig, arguments: GenerateArguments) -> GenerateResult:
    """Generate with a worker for each shard, on the cluster of RAY_ADDRESS or on this machine.

    A worker that dies is started again by Ray and resumes its shard. Where the cluster has GPUs, each worker
    gets as many as its engine is parallel over.

    Raises:
        EnvironmentFault: Ray is not installed, or a worker failed.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise EnvironmentFault("--ray needs ray. Install it with: pip install 'stillhouse[ray]'") from None
    if not is_remote(arguments.output):
        arguments = replace(arguments, output=Path(arguments.output).absolute())
    with _cluster(ray):
        gpus = getattr(config.engine, "tensor_parallel_size", 1) if ray.cluster_resources().get("GPU") else 0
        writer: Any = _ShardWriter(config, arguments, str(Path.cwd()))
        shards = ray.data.range(arguments.shards, override_num_blocks=arguments.shards)
        try:
            done = shards.map_batches(writer, batch_size=1, num_gpus=gpus or None).take_all()
        except ray.exceptions.RayError as error:
            raise EnvironmentFault(f"--ray: a worker failed: {error}") from error
    if not arguments.output.exists():
        raise DataError(
            f"{arguments.output}: is not complete; stillhouse merge says which shards are missing"
        )
    return written_result(arguments.output, done[0]["total"], min(one["resumed"] for one in done))


@contextlib.contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    """A cluster: the one that is connected, or one that ends with the block."""
    if ray.is_initialized():
        yield
        return
    ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()
