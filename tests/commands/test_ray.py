"""`generate --ray` and `curate --ray` on a real cluster of two workers: kills, interruptions, faults."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.rollouts.offline.stage_files import read_rows
from stillhouse.runs import ray_data
from tests.children import Said, end, start, write_to
from tests.workshop import Workshop, _child

GENERATE = ("generate", "run.yaml", "-n", "4", "--chunk", "2")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Two workers of this machine; the address of their cluster."""
    ray = pytest.importorskip("ray")
    before = signal.getsignal(signal.SIGTERM)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
    signal.signal(signal.SIGTERM, before)


class Killer(threading.Thread):
    """Kills the worker of a shard, or interrupts a process, once the shard has more than so many rows."""

    def __init__(self, output: Path, place: str, rows: int, interrupt: int | None = None) -> None:
        super().__init__()
        self._shard = output.with_name(f"{output.stem}.shard-{place}.jsonl")
        self._lock = output.with_name(f".{output.name}.{place}.lock")
        self._rows = rows
        self._interrupt = interrupt
        self.worker = 0
        self.saved = 0
        self.start()

    def run(self) -> None:
        deadline = time.monotonic() + 300
        while self._found() <= self._rows and time.monotonic() < deadline:
            time.sleep(0.01)
        self.worker = json.loads(self._lock.read_text())["process"]
        if self._interrupt is None:
            os.kill(self.worker, signal.SIGKILL)
        else:
            os.kill(self._interrupt, signal.SIGINT)
        self.saved = self._found()

    def _found(self) -> int:
        try:
            return self._shard.read_bytes().count(b"\n") - 1
        except FileNotFoundError:
            return 0


def test_a_shard_whose_worker_dies_is_resumed_alone(
    workshop: Workshop, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert workshop.stillhouse(*GENERATE, "-o", "whole.jsonl").code == 0
    whole = (workshop.folder / "whole.jsonl").read_bytes()
    output = workshop.folder / "teacher.jsonl"
    command = (*GENERATE, "-o", "teacher.jsonl", "--ray", "2")
    with monkeypatch.context() as patched:
        patched.setattr(ray_data, "RETRIES", 0)
        killer = Killer(output, "1-of-2", 4)
        said = workshop.stillhouse(*command)
        killer.join()
    assert killer.saved < 48, "the shard was killed while it was written"
    assert said.code == 3, said.out + said.err
    assert "1 of 2 shards failed, the others are kept:\nshard 1/2: its worker died" in said.err
    assert "--shard 1/2 instead of --ray 2" in said.err
    assert "Traceback" not in said.err
    kept = [workshop.folder / f"teacher.shard-{n}-of-2.jsonl" for n in (0, 1)]
    assert len(list(read_rows(kept[0]))) == 48
    there = 48 + len(list(read_rows(kept[1])))
    assert 48 < there < 96
    first = kept[0].stat().st_mtime_ns
    killer = Killer(output, "1-of-2", there - 48 + 2)  # Ray begins this one again by itself
    held = os.open(kept[0], os.O_RDONLY)
    said = workshop.stillhouse(*command)
    killer.join()
    assert (said.code, killer.saved < 48) == (0, True), said.err
    assert "teacher.jsonl: 96 responses, " in said.out
    assert f"; {there} of them were there before" in said.out
    assert os.fstat(held).st_mtime_ns == first, "the shard that was whole is not written again"
    os.close(held)
    assert output.read_bytes() == whole
    assert not list(workshop.folder.glob("*.shard-*"))


def test_generate_and_curate_in_parquet_in_a_store(workshop: Workshop, cluster: str) -> None:
    store = f"local://{workshop.folder}"
    filters = ("-f", "empty", "-f", "duplicates", "-f", "{kind: format, forbid: '[Vv]'}")
    for name, more in (("one", ()), ("ray", ("--ray", "2"))):
        said = workshop.stillhouse(*GENERATE, "-o", f"{store}/{name}.parquet", *more)
        assert said.code == 0, said.err
        said = workshop.stillhouse(
            "curate", f"{store}/{name}.parquet", "-o", f"{store}/{name}-kept.parquet", *filters, *more
        )
        assert said.code == 0, said.err
        assert " has a forbidden pattern" in said.out
        told = said.out.replace(name, "NAME")
        if name == "one":
            counted = told
    assert told == counted
    for end_of in (".parquet", "-kept.parquet", "-kept.dropped.parquet"):
        paths = [workshop.folder / f"{name}{end_of}" for name in ("one", "ray")]
        assert list(read_rows(paths[0])) == list(read_rows(paths[1]))
    again = workshop.stillhouse("curate", "one.parquet", "-o", "one-kept.parquet", *filters, "--ray", "2")
    assert "nothing to do" in again.out
    other = ("curate", "one.parquet", "-o", "one-kept.parquet", "-f", "empty", "--ray", "2")
    assert "--ray: every shard failed: " in workshop.refused(*other)


def test_ctrl_c_ends_the_workers_and_keeps_what_they_saved(workshop: Workshop, cluster: str) -> None:
    """From a process that joins the cluster by its address."""
    command = (*GENERATE, "-o", "teacher.jsonl")
    out, err = workshop.folder / ".out", workshop.folder / ".err"
    child = start(_joined, out, err, (*command, "--ray", "1"), env={"RAY_ADDRESS": cluster})
    killer = Killer(workshop.folder / "teacher.jsonl", "0-of-1", 2, interrupt=child.pid)
    said = Said(end(child), out.read_text(), err.read_text())
    killer.join()
    assert said.code == 130, said.err
    assert "Interrupted by Ctrl-C." in said.err
    assert "Traceback" not in said.err
    deadline = time.monotonic() + 60
    while Path(f"/proc/{killer.worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{killer.worker}").exists(), "nobody writes any more"
    assert 2 < len(list(read_rows(workshop.folder / "teacher.shard-0-of-1.jsonl"))) < 96
    said = workshop.stillhouse(*command)
    assert said.code == 0, said.err
    assert "of them were there before" in said.out


def _joined(out: Path, err: Path, arguments: tuple[str, ...]) -> None:
    write_to(out, err)
    _child(arguments, None, None)


def test_mistakes_are_told_before_anything_starts(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("-o", "a.jsonl", "--ray", "2")
    curate = ("curate", "train.jsonl", "-f", "empty")
    assert "--ray: starts all shards" in workshop.refused(*GENERATE, *more, "--shard", "0/1")
    assert "--ray: starts all shards" in workshop.refused(*curate, *more, "--shard", "0/1")
    assert "teacher.path" in workshop.refused(*GENERATE, "teacher.path=nowhere", *more)
    assert "--ray: has no effect with --drafts" in workshop.refused(
        "curate", "train.jsonl", "--drafts", "2", *more
    )
    monkeypatch.setitem(sys.modules, "ray", None)
    for command in (GENERATE, curate):
        said = workshop.stillhouse(*command, *more)
        assert (said.code, "pip install 'stillhouse[ray]'" in said.err) == (3, True)


@pytest.mark.parametrize(
    ("gpus", "machines", "taken"), [(4, [2, 8], 4), (4, [], 0), (4, [0], 0), (4, [2], None)]
)
def test_gpus_of_a_task(gpus: int, machines: list[int], taken: int | None) -> None:
    """Ray would wait for ever for a machine that no cluster has."""

    class Cluster:
        @staticmethod
        def nodes() -> list[dict[str, Any]]:
            return [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": float(one)}} for one in machines]

    if taken is not None:
        assert ray_data._gpus_of(Cluster, gpus) == taken
    else:
        with pytest.raises(ray_data.EnvironmentFault, match="takes 4 GPUs of one machine"):
            ray_data._gpus_of(Cluster, gpus)
