"""Models whose weights are sharded over processes: a teacher for inference, and a student to train beside the
same model whole, for whatever writes, reads or saves with it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.core.distributed import group_sizes
from stillhouse.models.hidden import unwrap
from stillhouse.models.load import local_device


def shard_for_inference(model: nn.Module) -> nn.Module:
    """Shard the weights of a frozen model over all processes by FSDP2, in place; with hybrid sharding over
    those that share a replica of the student.

    Each process keeps its share of every layer, and gathers one layer at a time while it reads. The head, and
    an input embedding that is tied to it, stays whole: the loss of each micro-batch needs all of it.

    Args:
        model: a causal language model on the CPU, frozen; where there is a GPU, its share is moved there.
    """
    from torch.distributed.fsdp import fully_shard

    head = unwrap(model).get_output_embeddings().to(local_device())
    whole, mesh = set(head.parameters()), _shard_group()
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in kinds and whole.isdisjoint(module.parameters()):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=whole, reshard_after_forward=True)
    return model


def _shard_group() -> Any:
    """The mesh of the processes that share a replica; None: of all. As accelerate numbers
    them, the shards of a replica are neighbours."""
    sizes = group_sizes() or {}
    groups = {name: sizes.get(f"{name}_size", 1) for name in ("dp_replicate", "dp_shard")}
    if min(groups.values()) == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(local_device().type, tuple(groups.values()), mesh_dim_names=tuple(groups))
    return mesh["dp_shard"]


def keep_head_whole(model: nn.Module, keep: bool) -> None:
    """Whether the backward passes that come leave the head of an FSDP2 model gathered.

    The fused loss takes the whole head in each micro-batch; kept between them it is gathered once a step.
    ZeRO-3 keeps it for good: it has no shorter time than that of the head's own forward pass.
    """
    from torch.distributed.fsdp import FSDPModule

    head = unwrap(model).get_output_embeddings()
    if isinstance(head, FSDPModule):
        head.set_reshard_after_backward(not keep, recurse=False)
    for weight in head.parameters():
        if hasattr(weight, "ds_id") and not weight.ds_persist:
            weight.ds_persist = True
            wrapper: Any = model
            wrapper.optimizer.parameter_offload.persistent_parameters.append(weight)


class TrainedStudent:
    """A student as it is trained, and as whatever else reads it.

    The two are one model unless its weights are sharded. Generation, evaluation and saving loop as long as
    their data last, which differs between processes, while sharded models wait for each other in each pass.
    So these read `model`, an ordinary model that has weights inside of `gathered` alone.

    Example:
        >>> student = TrainedStudent(model, sharded=True)
        >>> trainer = Trainer(model=student.trained, ...)  # shards it
        >>> student.release()
        >>> with student.gathered():
        ...     engine.generate(...)
    """

    def __init__(self, model: nn.Module, sharded: bool = False) -> None:
        """Around a loaded model.

        Args:
            model: whole.
            sharded: whether its weights will be sharded over processes.
        """
        self.model = self.trained = model
        self.sharded = sharded
        self._released = False
        if not sharded:
            return
        memo: dict[int, Any] = {
            id(weight): nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
            for weight in model.parameters()
        }
        self.trained = copy.deepcopy(model, memo)  # weights of its own, in the same memory so far

    def release(self) -> None:
        """Once the trained model is sharded: let go of the whole weights."""
        if not self.sharded:
            return
        for weight in self.model.parameters():
            weight.data = weight.data.new_empty(0)
        self._released = True

    @torch.no_grad()
    def gather(self) -> None:
        """Give `model` the weights of now, for good. All processes of the run do so together."""
        if not self._released:
            return
        weights = dict(self.model.named_parameters())
        for name, whole in whole_weights(self.trained):
            weights[name].data = whole.to(weights[name].dtype)
        self._released = False

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """`model` has the weights of now inside. All processes of the run enter together."""
        released = self._released
        self.gather()
        try:
            yield
        finally:
            if released:
                self.release()


def whole_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a sharded model, whole, by the names that they have without wrappers."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for name, weight in model.named_parameters():
        plain = name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
        with _partitions_of(weight):
            if hasattr(weight, "full_tensor"):
                yield plain, weight.full_tensor().detach()
            else:
                yield plain, weight.detach().clone()


def _partitions_of(weight: Any) -> AbstractContextManager[Any]:
    """A weight of ZeRO-3 is whole inside."""
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    from deepspeed import zero

    gathered: AbstractContextManager[Any] = zero.GatheredParameters([weight])
    return gathered
