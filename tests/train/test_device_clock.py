"""Times of a device that runs behind the program are read when a row is written, and none is lost."""

from __future__ import annotations

import pytest
import torch

from stillhouse.train.device import HostClock, device_memory, phase_clock
from stillhouse.train.metrics import MetricAccumulator, over_processes


class Queue:
    """A device that works off its queue only when somebody waits for it; each mark is a second after the one
    before."""

    ready = False

    def __init__(self) -> None:
        self.queued = 0
        self.waits = 0

    def mark(self) -> int:
        self.queued += 1
        return self.queued

    def between(self, start: int, end: int) -> float:
        self.waits += 1
        return float(end - start)


def timed(metrics: MetricAccumulator) -> None:
    """1 s of the teacher within 3 s of the student, then 1 s backward."""
    with metrics.seconds("student"), metrics.seconds("teacher"):
        pass
    metrics.since("backward", metrics.mark())


WANTED = {"seconds/student": 3.0, "seconds/teacher": 1.0, "seconds/backward": 1.0}


def test_nothing_waits_before_the_row() -> None:
    queue = Queue()
    metrics = MetricAccumulator(queue)
    for _ in range(2):
        timed(metrics)
    assert queue.waits == 0
    assert metrics.row() == {name: 2 * seconds for name, seconds in WANTED.items()}
    assert metrics.row() == {}


def test_a_step_that_is_given_up_takes_its_times_along_and_leaves_the_others() -> None:
    metrics = MetricAccumulator(Queue())
    timed(metrics)
    before = metrics.copy()
    timed(metrics)
    metrics.replace(before)
    assert metrics.row() == WANTED


def test_a_checkpoint_has_the_times_so_far() -> None:
    metrics = MetricAccumulator(Queue())
    timed(metrics)
    resumed = MetricAccumulator(Queue())
    timed(resumed)
    resumed.load_state_dict(metrics.state_dict())
    timed(resumed)
    assert resumed.total("seconds/student") == 6.0
    assert over_processes([resumed.state_dict(), metrics.state_dict()]).row()["seconds/student"] == 6.0


def test_on_a_cpu_the_programs_clock_is_the_works() -> None:
    cpu = torch.device("cpu")
    assert isinstance(phase_clock(cpu), HostClock)
    assert device_memory(cpu) == {}
    metrics = MetricAccumulator()
    with pytest.raises(ZeroDivisionError), metrics.seconds("student"):
        _ = 1 / 0
    assert "seconds/student" in metrics.row(), "what failed has taken its time too"
