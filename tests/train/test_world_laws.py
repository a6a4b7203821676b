"""Steps of many processes have the gradients of one, under DDP and FSDP2; see `world_laws`."""

from __future__ import annotations

import pytest
from tests.children import ranks
from tests.train import world_laws


@pytest.mark.parametrize("size", [2, 4])
def test_processes_have_the_gradients_of_one(size: int) -> None:
    assert ranks(size, world_laws.main) == [0] * size
