"""The fused loss under DDP and FSDP2, over two processes, against the gradient of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tests.children import ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from stillhouse.fused import fused_loss
from stillhouse.objectives import build

COUNT, VOCAB, THIN, WIDE = 6, 11, 4, 5


class Student(nn.Module):
    """A body and a head whose gradient only comes through the fused loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(THIN, THIN, dtype=torch.float64)
        self.head = nn.Linear(THIN, VOCAB, bias=False, dtype=torch.float64)

    def forward(self, inputs: Tensor, teacher: Tensor, teacher_head: Tensor, weight: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(inputs))
        return fused_loss(build("skew_kl"), hidden, self.head.weight, teacher, teacher_head, weight)


def data() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2 * COUNT, THIN), (2 * COUNT, WIDE), (VOCAB, WIDE))
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)


def check(model: nn.Module, wanted: dict[str, Tensor], share: slice) -> None:
    inputs, teacher, teacher_head = data()
    weight = torch.full((share.stop - share.start,), 2 / (2 * COUNT), dtype=torch.float64)  # x world size
    model(inputs[share], teacher[share], teacher_head, weight).backward()
    for name, parameter in model.named_parameters():
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        torch.testing.assert_close(grad, wanted[name.removeprefix("module.")], msg=name)


def gradients() -> None:
    dist.init_process_group("gloo")
    inputs, teacher, teacher_head = data()
    alone = Student()
    alone(inputs, teacher, teacher_head, torch.full((2 * COUNT,), 1 / (2 * COUNT)).double()).backward()
    wanted = {name: parameter.grad for name, parameter in alone.named_parameters()}
    share = slice(0, 4) if dist.get_rank() == 0 else slice(4, 2 * COUNT)  # unequal on purpose
    check(DistributedDataParallel(Student()), wanted, share)
    sharded = Student()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(sharded.body, mesh=mesh)
    sharded.head = fully_shard(sharded.head, mesh=mesh)
    assert isinstance(sharded.head.weight, DTensor)
    check(sharded, wanted, share)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
def test_ddp_and_a_sharded_head_give_the_gradient_of_one_process() -> None:
    assert ranks(2, gradients) == [0, 0]
