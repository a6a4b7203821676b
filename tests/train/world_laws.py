"""What each of several processes does: steps of recipes under DDP, FSDP2 and, of four, HSDP against those of
one process.

All methods and both parallelisms in one start of the processes. Models and loss are float64, token counts of
the processes differ, and gradients are accumulated over two micro-batches.
"""

from __future__ import annotations

import copy
import itertools
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from tests import tiny
from tests.train import fsdp_on_cpu
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from stillhouse import recipes
from stillhouse.config import Layer, Layered
from stillhouse.core.distributed import Ranks, SingleProcess, World, is_sharded
from stillhouse.core.types import Progress, Prompt, Response
from stillhouse.data.collate import collate
from stillhouse.fused import FusedConfig
from stillhouse.models import LoraConfig, unwrap
from stillhouse.models.adapters import add_lora
from stillhouse.models.sharding import TrainedStudent, keep_head_whole, shard_for_inference
from stillhouse.objectives.registry import REGISTRY as OBJECTIVES
from stillhouse.rollouts.base import REGISTRY as POLICIES
from stillhouse.rollouts.base import StatelessPolicy
from stillhouse.teachers.live import LiveTeacher
from stillhouse.train.step import Method, Step

PROMPTS, MICRO = 16, 2
LATE = Progress(step=8, max_steps=9, epoch=1.6, epochs=1.8)  # rules that begin later have begun
METHODS: dict[str, dict[str, Any]] = {
    "kd": {"student": {"lora": True}},
    "gkd": {"student": {"tie_word_embeddings": True}},
    "distillm": {"student": {}},
    "distillm2": {"student": {"tie_word_embeddings": True}, "objective": {"teacher_gap": "batch"}},
    "minillm": {"student": {}},
}
"""Method -> a student of another kind, and what brings in the statistics of a whole step."""
WRITERS: dict[str, Sequence[str]] = {
    "kd": ("fixed",), "gkd": ("fixed", "student"), "distillm": ("student", "fixed"),
    "distillm2": ("teacher", "student"), "minillm": ("student",),
}  # fmt: skip


class GivenResponses(StatelessPolicy):
    """The same responses however many processes there are: pairs, or one to each prompt."""

    def __init__(self, writers: Sequence[str], paired: bool) -> None:
        rng = random.Random(3)
        self.responses = {}
        for index, prompt in enumerate(tiny.prompts(PROMPTS)):
            by = writers if paired else [writers[index % len(writers)]]
            self.responses[prompt.id] = [self._written(prompt, one, rng) for one in by]

    @staticmethod
    def _written(prompt: Prompt, source: Any, rng: random.Random) -> Response:
        ids = (*(rng.randrange(2, tiny.VOCAB) for _ in range(rng.randint(1, 11))), tiny.END)
        logprobs = tuple(-rng.uniform(1, 4) for _ in ids)
        return Response(prompt, ids, source, student_version=8, logprobs=logprobs)

    def draw(self, now: Any, prompts: Sequence[Prompt], progress: Progress) -> list[list[Response]]:
        return [self.responses[prompt.id] for prompt in prompts]


def make_student(more: dict[str, Any]) -> nn.Module:
    lora = more.get("lora", False)
    student = tiny.model(1, dtype=torch.float64, **{k: v for k, v in more.items() if k != "lora"})
    if lora:
        torch.manual_seed(4)
        student = add_lora(student, LoraConfig(rank=2, alpha=4.0))
        for name, weight in student.named_parameters():
            if "lora_B" in name:  # zero at the start, where lora_A would have no gradient
                nn.init.normal_(weight, std=0.1)
    return student.double().train()


def sharded(student: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    """In the groups of accelerate's FSDP2: layers, [norm, head] with a tied embedding, the rest.

    Over all processes, or on a mesh of replicas and shards.
    """
    inner = unwrap(student)
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh)
    tied = inner.config.tie_word_embeddings
    first = [inner.model.embed_tokens] if tied else []
    if not tied:
        fully_shard(inner.model.embed_tokens, mesh=mesh)
    fully_shard([*first, inner.model.norm, inner.lm_head], mesh=mesh, reshard_after_forward=False)
    return fully_shard(student, mesh=mesh)


def replicas() -> DeviceMesh:
    """Of four processes two groups, each with a whole copy of the weights."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))


def make_step(name: str, teacher: nn.Module, world: World, chunk_rows: int | None = None) -> Step:
    values = Layered.merged(Layer.read(recipes.find(name).path, "recipe")).values
    objective = OBJECTIVES.parse({**values["objective"], **METHODS[name].get("objective", {})})
    policy = POLICIES.parse(values["responses"])
    return Step(
        Method(policy, objective, values.get("train", {}).get("normalise", "token")),
        GivenResponses(WRITERS[name], "pairs" in objective.requirements().rows),
        {"main": LiveTeacher(teacher, teacher.config.vocab_size, in_step=is_sharded(teacher))},
        tiny.PAD,
        teacher.config.vocab_size,
        world=world,
        fused=FusedConfig(chunk_rows=chunk_rows),
    )


def taken(step: Step, model: nn.Module, prompts: Sequence[Prompt], num_micro: int) -> float:
    """An optimiser step up to its gradients, as the trainer takes it; its loss over all processes."""
    prepared = step.with_batch_statistics(model, step.prepare(prompts, LATE, num_micro))
    losses = []
    for place, micro in enumerate(prepared.micro_batches):
        last = place + 1 == len(prepared.micro_batches)
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        keep_head_whole(model, not last)
        waits = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()
        with waits:
            losses.append(step.loss(model, micro))
            losses[-1].loss.backward()
    step.finish(prepared, losses)
    return step.last_loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): whole(weight.grad).clone()
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def compare(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    assert found.keys() == wanted.keys(), what
    size = max(one.abs().max().item() for one in wanted.values())
    assert size > 1e-4, what
    for name, expected in wanted.items():
        assert expected.abs().max() > 0, f"{what}: {name} has no gradient"
        error = (found[name] - expected).abs().max().item() / expected.abs().max().item()
        assert error < 1e-6, f"{what}: {name} differs by {error:.1e}"


@contextmanager
def launched_in_groups(asked: bool) -> Iterator[None]:
    """What accelerate's launcher says for two replicas of two shards."""
    if asked:
        os.environ.update(fsdp_on_cpu.GROUPS)
    yield
    for name in fsdp_on_cpu.GROUPS:
        os.environ.pop(name, None)


def check_method(name: str, rank: int, size: int) -> None:
    teacher = tiny.model(7, width=24, dtype=torch.float64)
    prompts, more = tiny.prompts(PROMPTS), METHODS[name]["student"]
    alone = make_student(more)
    loss = taken(make_step(name, teacher, SingleProcess()), alone, prompts, size * MICRO)
    wanted = gradients(alone)
    norm = nn.utils.clip_grad_norm_(alone.parameters(), 1e-3)
    own = prompts[rank * PROMPTS // size : (rank + 1) * PROMPTS // size]
    for kind in ("ddp", "fsdp2", "hsdp") if size == 4 else ("ddp", "fsdp2"):
        student, mesh = make_student(more), replicas() if kind == "hsdp" else None
        model = DistributedDataParallel(student) if kind == "ddp" else sharded(student, mesh)
        with launched_in_groups(kind == "hsdp"):
            shared = teacher if kind == "ddp" else shard_for_inference(copy.deepcopy(teacher))
        found = taken(make_step(name, shared, Ranks(rank, size)), model, own, MICRO)
        assert abs(found / loss - 1) < 1e-9, f"{name}, {kind}: loss {found} instead of {loss}"
        compare(gradients(model), wanted, f"{name}, {kind}, {size} processes")
        clipped = whole(nn.utils.clip_grad_norm_(model.parameters(), 1e-3))
        assert abs(clipped / norm - 1) < 1e-9


class Gathers(TorchDispatchMode):
    """Counts the gathers of at least so many numbers, and over how many processes they go."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.over = least, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_allgather_base_" in str(func):
            gathered, own = (one.numel() for one in args[:2])
            if gathered >= self.least:
                self.over.append(gathered // own)
        return func(*args, **(kwargs or {}))


def check_head_is_gathered_once(rank: int, size: int) -> None:
    """In a step of two micro-batches and many chunks, and from the processes that share a replica alone.

    The head is larger than all other weights together.
    """
    teacher = tiny.model(7, width=24, dtype=torch.float64, vocab_size=2048)
    own = tiny.prompts(PROMPTS)[rank * PROMPTS // size : (rank + 1) * PROMPTS // size]
    meshes = [(None, size), (replicas(), 2)] if size == 4 else [(None, size)]
    for (mesh, shards), rows in itertools.product(meshes, (None, 3)):
        student = tiny.model(1, dtype=torch.float64, vocab_size=2048, tie_word_embeddings=True)
        model = sharded(student.train(), mesh)
        step = make_step("distillm2", teacher, Ranks(rank, size), rows)
        with Gathers(2048 * 16) as gathers:
            taken(step, model, own, MICRO)
        assert gathers.over == [shards], f"gathers of the head over {gathers.over}, chunks of {rows} rows"


def check_whole_student(rank: int, size: int) -> None:
    """What reads the student between steps reads an ordinary model, with the weights of now."""
    for more in ({"tie_word_embeddings": True}, {"lora": True}):
        student = make_student(more)
        before = {name: weight.clone() for name, weight in student.state_dict().items()}
        pair = TrainedStudent(student, sharded=True)
        model = sharded(pair.trained)
        pair.release()
        assert not sum(weight.numel() for weight in student.parameters())
        held = sum(weight.to_local().numel() for weight in model.parameters())
        assert held < 1.3 * sum(weight.numel() for weight in model.parameters()) / size
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(1.0)
        with pair.gathered():
            for name, weight in student.state_dict().items():
                torch.testing.assert_close(weight, before[name] + 1.0)
            copy.deepcopy(student)(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
        assert not sum(weight.numel() for weight in student.parameters())


def check_sharded_teacher(rank: int, size: int) -> None:
    """Its hidden states are those of the whole model, and a process holds its share of all but the head."""
    whole = tiny.model(7, width=24, layers=4, dtype=torch.float64).requires_grad_(False)
    shared = shard_for_inference(copy.deepcopy(whole))
    batch = collate(tiny.responses(5, seed=rank), tiny.PAD)
    expected, teacher = LiveTeacher(whole, tiny.VOCAB), LiveTeacher(shared, tiny.VOCAB, in_step=True)
    torch.testing.assert_close(teacher.hidden(batch), expected.hidden(batch), rtol=1e-12, atol=1e-12)
    for _ in range(2):  # and after a pass
        layers = (weight for weight in shared.parameters() if weight is not teacher.head.weight)
        held = sum(w.to_local().numel() if isinstance(w, DTensor) else w.numel() for w in layers)
        all_of_it = sum(weight.numel() for weight in whole.parameters()) - expected.head.weight.numel()
        assert held < 1.15 * all_of_it / size + 64
        teacher.hidden(batch)


def check_teacher_sharded_in_a_replica(rank: int, size: int) -> None:
    """Its processes hold it together, and ask nothing of the others: these need not even read."""
    if size != 4:
        return
    whole = tiny.model(7, width=24, dtype=torch.float64).requires_grad_(False)
    with launched_in_groups(True):
        shared = shard_for_inference(copy.deepcopy(whole))
    assert {w.device_mesh.size() for w in shared.parameters() if isinstance(w, DTensor)} == {2}
    expected, teacher = LiveTeacher(whole, tiny.VOCAB), LiveTeacher(shared, tiny.VOCAB, in_step=True)
    if rank < 2:
        batch = collate(tiny.responses(5, seed=rank), tiny.PAD)
        torch.testing.assert_close(teacher.hidden(batch), expected.hidden(batch), rtol=1e-12, atol=1e-12)


def main() -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    for name in METHODS:
        check_method(name, rank, size)
    check_head_is_gathered_once(rank, size)
    check_whole_student(rank, size)
    check_sharded_teacher(rank, size)
    check_teacher_sharded_in_a_replica(rank, size)
    dist.destroy_process_group()
